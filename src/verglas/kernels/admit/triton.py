"""`admit` on the GPU: one pass over the scores, a few programs for each particle that share its slices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.admit.reference import Parents
from verglas.kernels.blocks import Blocks

SLICES, SHIFTS = 32, 32  # of a step
PROGRAMS = 8192  # about as many keep a GPU busy


@triton.jit(do_not_specialize=["slices_each", "shifts_each"])
def _admit_kernel(
    score, value_ptr, slice_ptr, shift_ptr, parent_ptr, slice_prior, shift_prior, kept, slices_each, shifts_each,
    SLICES: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slice_0, shift_0, parent_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i), tl.load(parent_ptr + i)
    parents = (tl.load(shift_ptr + i + 1) - shift_0).to(tl.int32)
    n, m = (tl.load(slice_ptr + i + 1) - slice_0).to(tl.int32) * slices_each, parents * shifts_each
    score += tl.load(value_ptr + i)
    for first in range(tl.program_id(1) * SLICES, n, tl.num_programs(1) * SLICES):
        a = first + tl.arange(0, SLICES)
        parent_a = a // slices_each
        prior_a = tl.load(slice_prior + slice_0 + parent_a, mask=a < n, other=0.0).to(tl.float32)
        for begin in range(0, m, SHIFTS):
            t = begin + tl.arange(0, SHIFTS)
            parent_t = t // shifts_each
            prior_t = tl.load(shift_prior + shift_0 + parent_t, mask=t < m, other=0.0).to(tl.float32)
            inside = (a < n)[:, None] & (t < m)[None, :]
            wanted = tl.load(kept + parent_0 + (parent_a * parents)[:, None] + parent_t[None, :], mask=inside, other=0.0)
            at = score + a.to(tl.int64)[:, None] * m + t[None, :]
            value = tl.load(at, mask=inside, other=0.0) + (prior_a[:, None] + prior_t[None, :])
            tl.store(at, tl.where(wanted > float("-inf"), value, float("-inf")), mask=inside)


def admit_triton(score_N: Tensor, blocks: Blocks, parents: Parents, slices_each: int, shifts_each: int) -> None:
    """See `admit_reference`; scores in float32 and contiguous (TypeError for others: they are changed in place)."""
    if score_N.dtype != torch.float32 or not score_N.is_contiguous():
        raise TypeError(f"the Triton kernel changes contiguous float32 scores, got {score_N.dtype}")
    if not len(score_N):
        return
    lists = parents.blocks
    programs = min(triton.cdiv(PROGRAMS, lists.particles), triton.cdiv(len(blocks.slice_N), SLICES))
    _admit_kernel[(lists.particles, programs)](
        score_N, blocks.value_ptr_B1, lists.slice_ptr_B1, lists.shift_ptr_B1, lists.value_ptr_B1, parents.slice_prior_N,
        parents.shift_prior_M, parents.kept_N, slices_each, shifts_each, SLICES=SLICES, SHIFTS=SHIFTS,
    )  # fmt: skip
