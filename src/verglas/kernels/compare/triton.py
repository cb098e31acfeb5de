"""`compare` on the GPU: one program scores a block of a particle's slices against a block of its shifts on the tensor cores.

* A row (real plane, then imaginary) is one vector of 2 K numbers. Slices are gathered by row once and serve both the cross
  term (as a matrix product with the shifted images) and the norm (in float32, from the values as stored).
* Rows are read 16 bytes at a time where K is a multiple of 8; pad K with zeros (A = W = 0) to get there. Any other K is
  correct but several times slower.
* Block sizes follow from how many slices and shifts particles have on average (`tile_for`); nothing is compiled again when
  K or the lists change, and nothing but the number of samples is asked of the device.
* Blocks none of whose samples is wanted are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks, Wanted
from verglas.kernels.tasks import Sizes, Tile, list_tasks

# The fastest of benchmarks/gpu_expectation.py --sweep on an H100, by the numbers of slices and shifts (`Sizes`).
FEW_OF_BOTH = Tile(16, 16, 128, 4, 3)  # up to 64 slices and 16 shifts
BY_SHIFTS = ((16, Tile(64, 16, 64, 4, 3)), (32, Tile(64, 32, 128, 4, 3)), (64, Tile(64, 64, 64, 4, 3)))  # up to so many shifts
MANY_SHIFTS = Tile(64, 128, 64, 4, 3)
SINGLE = Tile(64, 16, 32, 4, 2)  # of float32 operands


@triton.jit(do_not_specialize=["slices_each", "shifts_each"])
def _compare_kernel(
    images, weight, slices, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr, task_particle, task_block, task_count, out,
    kept, kept_ptr, slices_each, shifts_each, length, one,
    SLICES: tl.constexpr, SHIFTS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= tl.load(task_count):
        return
    i = tl.load(task_particle + tl.program_id(0)).to(tl.int64)
    block = tl.load(task_block + tl.program_id(0))
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    n, m = (tl.load(slice_ptr + i + 1) - slice_0).to(tl.int32), (tl.load(shift_ptr + i + 1) - shift_0).to(tl.int32)
    shift_blocks = tl.cdiv(m, SHIFTS)
    a = (block // shift_blocks) * SLICES + tl.arange(0, SLICES)
    t = (block % shift_blocks) * SHIFTS + tl.arange(0, SHIFTS)
    asked = (a < n)[:, None] & (t < m)[None, :]
    if WANTED:
        parent = (a // slices_each)[:, None] * (m // shifts_each) + (t // shifts_each)[None, :]
        best = tl.max(tl.load(kept + tl.load(kept_ptr + i) + parent, mask=asked, other=float("-inf")))
        if best == float("-inf"):
            return
    u = tl.load(slice_list + slice_0 + a, mask=a < n, other=0).to(tl.int64)
    image = tl.load(shift_list + shift_0 + t, mask=t < m, other=0).to(tl.int64)
    k = tl.arange(0, STEP)
    slice_at = slices + (u * length)[:, None] + k[None, :]
    image_at = images + (image * length)[None, :] + k[:, None]
    weight_at = weight + i * length + k
    cross = tl.zeros([SLICES, SHIFTS], tl.float32)
    power = tl.zeros([SLICES, STEP], tl.float32)
    w_next = tl.load(weight_at, mask=k < length, other=0.0)
    for first in range(0, length, STEP):
        inside = k < length - first
        w = w_next  # fetched a step ahead: what no product needs is not fetched early by the compiler
        w_next = tl.load(weight_at + first + STEP, mask=k < length - first - STEP, other=0.0)
        p = tl.load(slice_at + first, mask=(a < n)[:, None] & inside[None, :], other=0.0)
        image_KM = tl.load(image_at + first, mask=(t < m)[None, :] & inside[:, None], other=0.0)
        # Times a 1 unknown to the compiler: the product then reads p from registers. Without it Triton 3.6 lets the tensor
        # cores read p where the load for the step after next already writes, because the norm uses p too.
        cross = tl.dot(p * tl.cast(one, p.dtype), image_KM, cross, input_precision=PRECISION)
        power += p.to(tl.float32) * p.to(tl.float32) * w[None, :]
    score = cross - 0.5 * tl.sum(power, 1)[:, None]
    at = a[:, None] * m + t[None, :]  # a particle has less than 2^31 samples
    tl.store(out + tl.load(value_ptr + i) + at, score, mask=asked)


def tile_for(sizes: Sizes, single: bool) -> Tile:
    """How to cut particles with so many slices and shifts."""
    if single:
        return SINGLE
    if sizes.slices <= 64 and sizes.shifts <= 16:
        return FEW_OF_BOTH
    return next((tile for most, tile in BY_SHIFTS if sizes.shifts <= most), MANY_SHIFTS)


def compare_triton(
    images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, wanted: Wanted | None = None
) -> Tensor:
    """See `compare_reference`; images and slices both in float16 or both in float32, weights and sums in float32."""
    dtype = slices_U2K.dtype
    if dtype not in (torch.float16, torch.float32) or images.dtype != dtype:
        raise TypeError(f"images and slices must both be float16 or both float32, got {images.dtype} and {dtype}")
    single = dtype == torch.float32
    images, blocks = blocks.with_rows(images.contiguous())
    slices = slices_U2K.contiguous()
    weight_BL = weight_BK.float().repeat(1, 2)  # for both planes
    length, samples = weight_BL.shape[1], blocks.samples
    score = torch.empty(samples, dtype=torch.float32, device=slices.device)
    asked = (score, score, 1, 1)  # not read
    if wanted is not None:
        asked = wanted.kept_N, wanted.parents.value_ptr_B1, wanted.slices_each, wanted.shifts_each
    tile = tile_for(Sizes.of(blocks, samples), single)
    tasks = list_tasks(blocks, samples, tile)
    if samples:
        _compare_kernel[(tasks.bound,)](
            images, weight_BL, slices, blocks.slice_N, blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1,
            blocks.value_ptr_B1, tasks.particle_J, tasks.block_J, tasks.count, score, *asked, length, 1.0,
            SLICES=tile.slices, SHIFTS=tile.shifts, STEP=tile.coefficients, PRECISION="tf32x3" if single else "ieee",
            WANTED=wanted is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return score
