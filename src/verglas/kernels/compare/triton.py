"""`compare` on the GPU: one program scores a block of a particle's slices against a block of its shifts on the tensor cores.

* A row (real plane, then imaginary) is one vector of 2 K numbers. Slices are gathered by row once and serve both the cross
  term (as a matrix product with the shifted images) and the norm (in float32, from the values as stored).
* Rows are read 16 bytes at a time where K is a multiple of 8; pad K with zeros (A = W = 0) to get there. Any other K is
  correct but several times slower.
* Block sizes follow from how many slices and shifts a particle has (`tile_for`); nothing is compiled again when K or
  the lists change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.tasks import Tile, lengths, list_tasks, smallest_class

SLICE_LIMITS: tuple[int, ...] = (32, 128, 1 << 62)  # most slices of a particle that uses ...
SLICE_BLOCKS: tuple[int, ...] = (16, 64, 128)  # ... programs of so many slices
SHIFT_BLOCKS: tuple[int, ...] = (16, 32, 64, 128)  # the smallest that holds its shifts; beyond the last, several programs
SINGLE_SLICES, SINGLE_SHIFTS = 64, 64  # largest blocks of float32 operands


@triton.jit(do_not_specialize=["n_images"])
def _compare_kernel(
    shifted, weight, slices, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr, task_particle, task_block, out,
    n_images, length, one,
    SLICES: tl.constexpr, SHIFTS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.load(task_particle + tl.program_id(0)).to(tl.int64)
    block = tl.load(task_block + tl.program_id(0))
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    n, m = tl.load(slice_ptr + i + 1) - slice_0, tl.load(shift_ptr + i + 1) - shift_0
    shift_blocks = tl.cdiv(m, SHIFTS).to(tl.int32)
    a = (block // shift_blocks) * SLICES + tl.arange(0, SLICES)
    t = (block % shift_blocks) * SHIFTS + tl.arange(0, SHIFTS)
    u = tl.load(slice_list + slice_0 + a, mask=a < n, other=0).to(tl.int64)
    image = tl.load(shift_list + shift_0 + t, mask=t < m, other=0).to(tl.int64) + i * n_images
    k = tl.arange(0, STEP)
    slice_at = slices + (u * length)[:, None] + k[None, :]
    image_at = shifted + (image * length)[None, :] + k[:, None]
    weight_at = weight + i * length + k
    cross = tl.zeros([SLICES, SHIFTS], tl.float32)
    power = tl.zeros([SLICES, STEP], tl.float32)
    for first in range(0, length, STEP):
        inside = k < length - first
        w = tl.load(weight_at + first, mask=inside, other=0.0)
        p = tl.load(slice_at + first, mask=(a < n)[:, None] & inside[None, :], other=0.0)
        image_KM = tl.load(image_at + first, mask=(t < m)[None, :] & inside[:, None], other=0.0)
        # Times a 1 unknown to the compiler: the product then reads p from registers. Without it Triton 3.6 lets the tensor
        # cores read p where the load for the step after next already writes, because the norm uses p too.
        cross = tl.dot(p * tl.cast(one, p.dtype), image_KM, cross, input_precision=PRECISION)
        power += p.to(tl.float32) * p.to(tl.float32) * w[None, :]
    score = cross - 0.5 * tl.sum(power, 1)[:, None]
    at = a[:, None] * m.to(tl.int32) + t[None, :]  # a particle has less than 2^31 samples
    tl.store(out + tl.load(value_ptr + i) + at, score, mask=(a < n)[:, None] & (t < m)[None, :])


def tile_for(slices: int, shifts: int, single: bool) -> Tile:
    """How to cut a particle whose blocks are this large."""
    if single:
        slices, shifts = min(slices, SINGLE_SLICES), min(shifts, SINGLE_SHIFTS)
        return Tile(slices, shifts, 32, 4, 2)
    return Tile(slices, shifts, 64, 8 if slices > 64 else 4, 3)


def compare_triton(shifted_BT2K: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks) -> Tensor:
    """See `compare_reference`; images and slices both in float16 or both in float32, weights and sums in float32."""
    dtype = slices_U2K.dtype
    if dtype not in (torch.float16, torch.float32) or shifted_BT2K.dtype != dtype:
        raise TypeError(f"images and slices must both be float16 or both float32, got {shifted_BT2K.dtype} and {dtype}")
    single = dtype == torch.float32
    shifted, slices = shifted_BT2K.contiguous(), slices_U2K.contiguous()
    weight_BL = weight_BK.float().repeat(1, 2)  # for both planes
    score = torch.empty(blocks.samples, dtype=torch.float32, device=slices.device)
    n_B, m_B = lengths(blocks.slice_ptr_B1), lengths(blocks.shift_ptr_B1)
    tiles = [tile_for(a, t, single) for a in SLICE_BLOCKS for t in SHIFT_BLOCKS]
    class_B = smallest_class(n_B, SLICE_LIMITS) * len(SHIFT_BLOCKS) + smallest_class(m_B, SHIFT_BLOCKS)
    for tasks in list_tasks(n_B, m_B, class_B, tiles):
        tile = tasks.tile
        _compare_kernel[(len(tasks.block_J),)](
            shifted, weight_BL, slices, blocks.slice_N, blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1,
            blocks.value_ptr_B1, tasks.particle_J, tasks.block_J, score, shifted.shape[1], weight_BL.shape[1], 1.0,
            SLICES=tile.slices, SHIFTS=tile.shifts, STEP=tile.coefficients, PRECISION="tf32x3" if single else "ieee",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return score
