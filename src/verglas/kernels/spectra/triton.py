"""`spectra` on the GPU: a program takes one particle and a block of coefficients and runs through the particle's slices.

* Weights^T (shifts x slices) @ slices (slices x coefficients) on the tensor cores gives for each shift the prediction that its
  poses expect; the images are read once, at the end. |P|^2 is summed beside it in float32.
* Slices and shifts whose weights are all 0 are dropped first (`active_lists` of `collect`).
* float16: the weights enter as two float16 halves (22 bits) relative to the largest weight of the batch.
* Shells are summed as a product with the 0/1 matrix of coefficients and shells: no atomics, repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.collect.triton import TINIEST, WEIGHT_SCALE, active_lists, split_weights
from verglas.kernels.tasks import Tile, lengths, list_tasks, smallest_class

SHIFT_BLOCKS = (16, 32, 64, 128)  # the smallest that holds a particle's active shifts; beyond the last, several rounds
SLICE_STEP = 32
COEFFICIENTS = 64


@triton.jit(do_not_specialize=["n_images"])
def _spectra_kernel(
    posterior, shifted, weight, slices, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr,
    active_slice_ptr, active_slice, active_shift_ptr, active_shift, total, largest, task_particle,
    cross_out, power_out, n_images, n_coefficients,
    SHIFTS: tl.constexpr, SLICES: tl.constexpr, COEFFICIENTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    patches = tl.cdiv(n_coefficients, COEFFICIENTS)
    i = tl.load(task_particle + tl.program_id(0) // patches).to(tl.int64)
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    stride = tl.load(shift_ptr + i + 1) - shift_0
    active_0, used_0 = tl.load(active_slice_ptr + i), tl.load(active_shift_ptr + i)
    n, m = tl.load(active_slice_ptr + i + 1) - active_0, tl.load(active_shift_ptr + i + 1) - used_0
    value_0 = tl.load(value_ptr + i) - shift_0
    unit = tl.maximum(tl.load(largest), TINIEST) / WEIGHT_SCALE  # of the scaled weights
    k = (tl.program_id(0) % patches) * COEFFICIENTS + tl.arange(0, COEFFICIENTS)
    inside = k < n_coefficients
    row = 2 * tl.cast(n_coefficients, tl.int64)
    cross = tl.zeros([COEFFICIENTS], tl.float32)
    power = tl.zeros([SLICES, COEFFICIENTS], tl.float32)
    for shift_first in range(0, m, SHIFTS):
        t = shift_first + tl.arange(0, SHIFTS)
        shift_at = tl.load(active_shift + used_0 + t, mask=t < m, other=0)
        expected_re = tl.zeros([SHIFTS, COEFFICIENTS], tl.float32)
        expected_im = tl.zeros([SHIFTS, COEFFICIENTS], tl.float32)
        for first in range(0, n, SLICES):
            a = first + tl.arange(0, SLICES)
            slice_at = tl.load(active_slice + active_0 + a, mask=a < n, other=0)
            p_at = posterior + value_0 + ((slice_at - slice_0) * stride)[None, :] + shift_at[:, None]
            p = tl.load(p_at, mask=(t < m)[:, None] & (a < n)[None, :], other=0.0)
            u = tl.load(slice_list + slice_at, mask=a < n, other=0).to(tl.int64)
            slice_mask = (a < n)[:, None] & inside[None, :]
            re = tl.load(slices + (u * row)[:, None] + k[None, :], mask=slice_mask, other=0.0)
            im = tl.load(slices + (u * row)[:, None] + n_coefficients + k[None, :], mask=slice_mask, other=0.0)
            if HALF:
                high, low = split_weights(p / unit)
                expected_re = tl.dot(low, re, tl.dot(high, re, expected_re))
                expected_im = tl.dot(low, im, tl.dot(high, im, expected_im))
            else:
                expected_re = tl.dot(p, re, expected_re, input_precision="tf32x3")
                expected_im = tl.dot(p, im, expected_im, input_precision="tf32x3")
            if shift_first == 0:
                square = re.to(tl.float32) * re.to(tl.float32) + im.to(tl.float32) * im.to(tl.float32)
                power += square * tl.load(total + slice_at, mask=a < n, other=0.0)[:, None]
        image_row = (tl.load(shift_list + shift_at, mask=t < m, other=0).to(tl.int64) + i * n_images) * row
        image_at = shifted + image_row[:, None] + k[None, :]
        image_mask = (t < m)[:, None] & inside[None, :]
        image_re = tl.load(image_at, mask=image_mask, other=0.0).to(tl.float32)
        image_im = tl.load(image_at + n_coefficients, mask=image_mask, other=0.0).to(tl.float32)
        cross += tl.sum(expected_re * image_re + expected_im * image_im, 0)
    if HALF:
        cross *= unit
    w = tl.load(weight + i * n_coefficients + k, mask=inside, other=0.0)
    tl.store(cross_out + i * n_coefficients + k, cross, mask=inside)
    tl.store(power_out + i * n_coefficients + k, tl.sum(power, 0) * w, mask=inside)


def spectra_triton(
    posterior_N: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `spectra_reference`; images and slices both in float16 or both in float32, everything else in float32."""
    dtype = slices_U2K.dtype
    if dtype not in (torch.float16, torch.float32) or shifted_BT2K.dtype != dtype:
        raise TypeError(f"images and slices must both be float16 or both float32, got {shifted_BT2K.dtype} and {dtype}")
    posterior, weight = posterior_N.float().contiguous(), weight_BK.float().contiguous()
    shifted, slices = shifted_BT2K.contiguous(), slices_U2K.contiguous()
    n_images, n_coefficients = shifted.shape[1], shifted.shape[3]
    active = active_lists(posterior, blocks)
    cross_BK, power_BK = torch.zeros_like(weight), torch.zeros_like(weight)
    if len(active.slice_at_A) == 0:
        return cross_BK.new_zeros(len(weight), n_shells), power_BK.new_zeros(len(weight), n_shells)
    largest = active.peak_N.max()
    n_B, m_B = lengths(active.slice_ptr_B1), lengths(active.shift_ptr_B1)
    tiles = [Tile(1 << 30, block, COEFFICIENTS, 8 if block > 64 else 4, 2) for block in SHIFT_BLOCKS]
    for tasks in list_tasks(n_B, (m_B > 0).long(), smallest_class(m_B, SHIFT_BLOCKS), tiles):
        tile = tasks.tile
        _spectra_kernel[(len(tasks.block_J) * triton.cdiv(n_coefficients, tile.coefficients),)](
            posterior, shifted, weight, slices, blocks.slice_N, blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1,
            blocks.value_ptr_B1, active.slice_ptr_B1, active.slice_at_A, active.shift_ptr_B1, active.shift_at_A,
            active.total_N, largest, tasks.particle_J, cross_BK, power_BK, n_images, n_coefficients,
            SHIFTS=tile.shifts, SLICES=SLICE_STEP, COEFFICIENTS=tile.coefficients, HALF=dtype == torch.float16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    in_shell_KS = (shell_K[:, None] == torch.arange(n_shells, device=shell_K.device)).float()
    return cross_BK @ in_shell_KS, power_BK @ in_shell_KS
