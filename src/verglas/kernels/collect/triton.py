"""`collect` on the GPU: weights (slices x shifts) @ images (shifts x coefficients) on the tensor cores, then atomic adds.

* `active_lists` reads the posterior once and drops the slices and shifts of a particle whose weights are all 0.
* A program adds a block of a particle's slices with atomics: particles that share a slice meet in the table without a sort,
  and the shifts are summed before anything is written. What is written limits the speed: three float32 sums for each
  coefficient of each pair of particle and slice. Sums are not repeatable to the last bit.
* float16 images: the weights enter as two float16 halves (22 bits) relative to the largest weight of the slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.tasks import Tile, lengths, list_tasks, smallest_class

SCAN = Tile(64, 32, 0, 4, 1)  # slices and shifts of a program that reads the posterior
SLICE_BLOCKS = (16, 64)  # the smallest that holds a particle's active slices; beyond the last, several programs
SHIFT_STEP = 32
COEFFICIENTS = 128
WEIGHT_SCALE = tl.constexpr(1024.0)  # the largest weight as float16: its low half stays clear of the smallest float16
TINIEST = tl.constexpr(1e-30)  # weights are not scaled up further: float32 would overflow


@triton.jit
def _active_kernel(
    posterior, slice_ptr, shift_ptr, value_ptr, task_particle, task_block, total, peak, slice_used, shift_used,
    SLICES: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """Sum, largest modulus and use of every slice's weights; use of every shift."""
    i = tl.load(task_particle + tl.program_id(0)).to(tl.int64)
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    n, m = tl.load(slice_ptr + i + 1) - slice_0, tl.load(shift_ptr + i + 1) - shift_0
    a = tl.load(task_block + tl.program_id(0)).to(tl.int64) * SLICES + tl.arange(0, SLICES)
    at = tl.load(value_ptr + i) + a * m
    row_total, row_peak = tl.zeros([SLICES], tl.float32), tl.zeros([SLICES], tl.float32)
    row_used = tl.zeros([SLICES], tl.int32)
    for first in range(0, m, SHIFTS):
        t = first + tl.arange(0, SHIFTS)
        p = tl.load(posterior + at[:, None] + t[None, :], mask=(a < n)[:, None] & (t < m)[None, :], other=0.0)
        used = (p != 0).to(tl.int32)
        row_total += tl.sum(p, 1)
        row_peak = tl.maximum(row_peak, tl.max(tl.abs(p), 1))
        row_used = tl.maximum(row_used, tl.max(used, 1))
        tl.store(shift_used + shift_0 + t, tl.full([SHIFTS], 1, tl.int8), mask=tl.max(used, 0) > 0)
    tl.store(total + slice_0 + a, row_total, mask=a < n)
    tl.store(peak + slice_0 + a, row_peak, mask=a < n)
    tl.store(slice_used + slice_0 + a, row_used.to(tl.int8), mask=a < n)


@dataclass(frozen=True)
class ActiveLists:
    """The slices and shifts of each particle that any nonzero weight uses, as positions in slice_N and shift_M of Blocks.

    total_N, peak_N: sum and largest modulus of the weights of every slice of Blocks (kept or not), float32.
    """

    slice_ptr_B1: Tensor
    slice_at_A: Tensor
    shift_ptr_B1: Tensor
    shift_at_A: Tensor
    total_N: Tensor
    peak_N: Tensor


def active_lists(posterior_N: Tensor, blocks: Blocks) -> ActiveLists:
    """One pass over the posterior (float32, contiguous)."""
    n_slices, device = len(blocks.slice_N), posterior_N.device
    total_N, peak_N = torch.zeros(2, n_slices, device=device).unbind()
    slice_used = torch.zeros(n_slices, dtype=torch.int8, device=device)
    shift_used = torch.zeros(len(blocks.shift_M), dtype=torch.int8, device=device)
    n_B, m_B = lengths(blocks.slice_ptr_B1), lengths(blocks.shift_ptr_B1)
    for tasks in list_tasks(n_B, (m_B > 0).long(), torch.zeros_like(n_B), [SCAN]):
        _active_kernel[(len(tasks.block_J),)](
            posterior_N, blocks.slice_ptr_B1, blocks.shift_ptr_B1, blocks.value_ptr_B1, tasks.particle_J, tasks.block_J,
            total_N, peak_N, slice_used, shift_used, SLICES=SCAN.slices, SHIFTS=SCAN.shifts, num_warps=SCAN.warps,
        )  # fmt: skip
    slice_ptr, slice_at = _keep(slice_used, blocks.slice_ptr_B1)
    shift_ptr, shift_at = _keep(shift_used, blocks.shift_ptr_B1)
    return ActiveLists(slice_ptr, slice_at, shift_ptr, shift_at, total_N, peak_N)


def _keep(used_N: Tensor, ptr_B1: Tensor) -> tuple[Tensor, Tensor]:
    """CSR pointers and places of the used elements of a CSR list."""
    before = torch.cat([ptr_B1.new_zeros(1), used_N.cumsum(0)])
    return before[ptr_B1], used_N.nonzero()[:, 0].int()


@triton.jit
def split_weights(p):
    """A float32 matrix as the sum of two float16 ones (22 bits of its largest element)."""
    high = p.to(tl.float16)
    return high, (p - high.to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=["n_images"])
def _collect_kernel(
    posterior, shifted, weight, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr,
    active_slice_ptr, active_slice, active_shift_ptr, active_shift, total, peak, task_particle, task_block,
    data_out, total_out, n_images, n_coefficients, length,
    SLICES: tl.constexpr, SHIFTS: tl.constexpr, COEFFICIENTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    patches = tl.cdiv(length, COEFFICIENTS)  # a row, real plane and imaginary plane, is one vector of `length` numbers
    task, patch = tl.program_id(0) // patches, tl.program_id(0) % patches
    i = tl.load(task_particle + task).to(tl.int64)
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    stride = tl.load(shift_ptr + i + 1) - shift_0
    active_0, used_0 = tl.load(active_slice_ptr + i), tl.load(active_shift_ptr + i)
    n, m = tl.load(active_slice_ptr + i + 1) - active_0, tl.load(active_shift_ptr + i + 1) - used_0
    a = tl.load(task_block + task) * SLICES + tl.arange(0, SLICES)
    slice_at = tl.load(active_slice + active_0 + a, mask=a < n, other=0)
    weight_at = tl.load(value_ptr + i) + (slice_at - slice_0) * stride - shift_0
    unit = tl.maximum(tl.load(peak + slice_at, mask=a < n, other=1.0), TINIEST) / WEIGHT_SCALE  # of the scaled weights
    per_unit = 1.0 / unit
    k = patch * COEFFICIENTS + tl.arange(0, COEFFICIENTS)
    data = tl.zeros([SLICES, COEFFICIENTS], tl.float32)
    for first in range(0, m, SHIFTS):
        t = first + tl.arange(0, SHIFTS)
        shift_at = tl.load(active_shift + used_0 + t, mask=t < m, other=0)
        p_mask = (a < n)[:, None] & (t < m)[None, :]
        p = tl.load(posterior + weight_at[:, None] + shift_at[None, :], mask=p_mask, other=0.0)
        image = tl.load(shift_list + shift_at, mask=t < m, other=0).to(tl.int64) + i * n_images
        image_mask = (t < m)[:, None] & (k < length)[None, :]
        image_MK = tl.load(shifted + (image * length)[:, None] + k[None, :], mask=image_mask, other=0.0)
        if HALF:
            high, low = split_weights(p * per_unit[:, None])
            data = tl.dot(low, image_MK, tl.dot(high, image_MK, data))
        else:
            data = tl.dot(p, image_MK, data, input_precision="tf32x3")
    if HALF:
        data *= unit[:, None]
    u = tl.load(slice_list + slice_at, mask=a < n, other=0).to(tl.int64)
    data_mask = (a < n)[:, None] & (k < length)[None, :]
    tl.atomic_add(data_out + (u * length)[:, None] + k[None, :], data, mask=data_mask, sem="relaxed")
    if patch * COEFFICIENTS < n_coefficients:
        inside = k < n_coefficients
        w = tl.load(weight + i * n_coefficients + k, mask=inside, other=0.0)
        slice_total = tl.load(total + slice_at, mask=a < n, other=0.0)
        total_at = total_out + (u * n_coefficients)[:, None] + k[None, :]
        total_mask = (a < n)[:, None] & inside[None, :]
        tl.atomic_add(total_at, slice_total[:, None] * w[None, :], mask=total_mask, sem="relaxed")


def collect_triton(
    posterior_N: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, blocks: Blocks, data_U2K: Tensor, total_UK: Tensor
) -> None:
    """See `collect_reference`; images in float16 or float32, everything else in float32, tables contiguous."""
    if shifted_BT2K.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"the Triton kernel reads float16 or float32 images, got {shifted_BT2K.dtype}")
    for table in (data_U2K, total_UK):
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise TypeError(f"the Triton kernel adds to contiguous float32 tables, got {table.dtype}")
    posterior, weight = posterior_N.float().contiguous(), weight_BK.float().contiguous()
    shifted = shifted_BT2K.contiguous()
    n_images, n_coefficients, length = shifted.shape[1], shifted.shape[3], 2 * shifted.shape[3]
    active = active_lists(posterior, blocks)
    n_B = lengths(active.slice_ptr_B1)
    tiles = [Tile(block, SHIFT_STEP, COEFFICIENTS, 4, 2) for block in SLICE_BLOCKS]
    for tasks in list_tasks(n_B, torch.ones_like(n_B), smallest_class(n_B, SLICE_BLOCKS), tiles):
        tile = tasks.tile
        _collect_kernel[(len(tasks.block_J) * triton.cdiv(length, tile.coefficients),)](
            posterior, shifted, weight, blocks.slice_N, blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1,
            blocks.value_ptr_B1, active.slice_ptr_B1, active.slice_at_A, active.shift_ptr_B1, active.shift_at_A,
            active.total_N, active.peak_N, tasks.particle_J, tasks.block_J, data_U2K, total_UK,
            n_images, n_coefficients, length,
            SLICES=tile.slices, SHIFTS=tile.shifts, COEFFICIENTS=tile.coefficients, HALF=shifted.dtype == torch.float16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
