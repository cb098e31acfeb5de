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
COEFFICIENTS = 128


@triton.jit(do_not_specialize=["n_images"])
def _spectra_kernel(
    posterior, shifted, slices, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr,
    active_slice_ptr, active_slice, active_shift_ptr, active_shift, total, largest, task_particle,
    cross_out, power_out, n_images, length, one,
    SHIFTS: tl.constexpr, SLICES: tl.constexpr, COEFFICIENTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    patches = tl.cdiv(length, COEFFICIENTS)  # a row, real plane and imaginary plane, is one vector of `length` numbers
    i = tl.load(task_particle + tl.program_id(0) // patches).to(tl.int64)
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    stride = tl.load(shift_ptr + i + 1) - shift_0
    active_0, used_0 = tl.load(active_slice_ptr + i), tl.load(active_shift_ptr + i)
    n, m = tl.load(active_slice_ptr + i + 1) - active_0, tl.load(active_shift_ptr + i + 1) - used_0
    value_0 = tl.load(value_ptr + i) - shift_0
    unit = tl.maximum(tl.load(largest), TINIEST) / WEIGHT_SCALE  # of the scaled weights
    per_unit = 1.0 / unit
    k = (tl.program_id(0) % patches) * COEFFICIENTS + tl.arange(0, COEFFICIENTS)
    inside = k < length
    cross = tl.zeros([COEFFICIENTS], tl.float32)
    power = tl.zeros([SLICES, COEFFICIENTS], tl.float32)
    for shift_first in range(0, m, SHIFTS):
        t = shift_first + tl.arange(0, SHIFTS)
        shift_at = tl.load(active_shift + used_0 + t, mask=t < m, other=0)
        expected = tl.zeros([SHIFTS, COEFFICIENTS], tl.float32)
        first_round = tl.where(shift_first == 0, 1.0, 0.0)
        for first in range(0, n, SLICES):
            a = first + tl.arange(0, SLICES)
            slice_at = tl.load(active_slice + active_0 + a, mask=a < n, other=0)
            p_at = posterior + value_0 + ((slice_at - slice_0) * stride)[None, :] + shift_at[:, None]
            p = tl.load(p_at, mask=(t < m)[:, None] & (a < n)[None, :], other=0.0)
            u = tl.load(slice_list + slice_at, mask=a < n, other=0).to(tl.int64)
            slice_NK = tl.load(slices + (u * length)[:, None] + k[None, :], mask=(a < n)[:, None] & inside[None, :], other=0.0)
            once = slice_NK * tl.cast(one, slice_NK.dtype)  # a copy for the tensor cores: see the comment in `_compare_kernel`
            if HALF:
                high, low = split_weights(p * per_unit)
                expected = tl.dot(low, once, tl.dot(high, once, expected))
            else:
                expected = tl.dot(p, once, expected, input_precision="tf32x3")
            slice_total = first_round * tl.load(total + slice_at, mask=a < n, other=0.0)
            power += slice_NK.to(tl.float32) * slice_NK.to(tl.float32) * slice_total[:, None]
        image = tl.load(shift_list + shift_at, mask=t < m, other=0).to(tl.int64) + i * n_images
        image_mask = (t < m)[:, None] & inside[None, :]
        image_MK = tl.load(shifted + (image * length)[:, None] + k[None, :], mask=image_mask, other=0.0)
        cross += tl.sum(expected * image_MK.to(tl.float32), 0)
    if HALF:
        cross *= unit
    tl.store(cross_out + i * length + k, cross, mask=inside)
    tl.store(power_out + i * length + k, tl.sum(power, 0), mask=inside)


def spectra_triton(
    posterior_N: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `spectra_reference`; images and slices both in float16 or both in float32, everything else in float32."""
    dtype = slices_U2K.dtype
    if dtype not in (torch.float16, torch.float32) or shifted_BT2K.dtype != dtype:
        raise TypeError(f"images and slices must both be float16 or both float32, got {shifted_BT2K.dtype} and {dtype}")
    posterior, shifted, slices = posterior_N.float().contiguous(), shifted_BT2K.contiguous(), slices_U2K.contiguous()
    n_images, length = shifted.shape[1], 2 * shifted.shape[3]
    active = active_lists(posterior, blocks)
    n_B, m_B = lengths(active.slice_ptr_B1), lengths(active.shift_ptr_B1)
    cross_BL, power_BL = torch.zeros(2, blocks.particles, length, device=slices.device).unbind()
    largest = torch.cat([active.peak_N, active.peak_N.new_zeros(1)]).max()
    tiles = [Tile(1 << 30, block, COEFFICIENTS, 8 if block > 64 else 4, 2) for block in SHIFT_BLOCKS]
    for tasks in list_tasks(n_B, (m_B > 0).long(), smallest_class(m_B, SHIFT_BLOCKS), tiles):
        tile = tasks.tile
        _spectra_kernel[(len(tasks.block_J) * triton.cdiv(length, tile.coefficients),)](
            posterior, shifted, slices, blocks.slice_N, blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1,
            blocks.value_ptr_B1, active.slice_ptr_B1, active.slice_at_A, active.shift_ptr_B1, active.shift_at_A,
            active.total_N, largest, tasks.particle_J, cross_BL, power_BL, n_images, length, 1.0,
            SHIFTS=tile.shifts, SLICES=SLICE_STEP, COEFFICIENTS=tile.coefficients, HALF=dtype == torch.float16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    cross_BK = cross_BL.view_as(shifted[:, 0]).sum(1)
    power_BK = power_BL.view_as(shifted[:, 0]).sum(1) * weight_BK.float()
    in_shell_KS = (shell_K[:, None] == torch.arange(n_shells, device=shell_K.device)).float()
    return cross_BK @ in_shell_KS, power_BK @ in_shell_KS
