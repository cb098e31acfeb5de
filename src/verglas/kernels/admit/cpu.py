"""`admit` on the CPU: one pass in Numba."""

from __future__ import annotations

import math

import numba
from torch import Tensor

from verglas.kernels.admit.reference import Parents
from verglas.kernels.blocks import Blocks


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _admit(score, value_ptr, kept, kept_ptr, slice_ptr, shift_ptr, slice_prior, shift_prior, slices_each, shifts_each):
    for i in numba.prange(len(value_ptr) - 1):
        n, m = slice_ptr[i + 1] - slice_ptr[i], shift_ptr[i + 1] - shift_ptr[i]
        for a in range(n * slices_each):
            parent = a // slices_each
            row, parents = value_ptr[i] + a * m * shifts_each, kept_ptr[i] + parent * m
            prior = slice_prior[slice_ptr[i] + parent]
            for t in range(m):
                if kept[parents + t] == -math.inf:
                    for c in range(shifts_each):
                        score[row + t * shifts_each + c] = -math.inf
                else:
                    add = prior + shift_prior[shift_ptr[i] + t]
                    for c in range(shifts_each):
                        score[row + t * shifts_each + c] += add


def admit_cpu(score_N: Tensor, blocks: Blocks, parents: Parents, slices_each: int, shifts_each: int) -> None:
    """See README.md."""
    lists = parents.blocks
    _admit(
        score_N.numpy(), blocks.value_ptr_B1.numpy(), parents.kept_N.numpy(), lists.value_ptr_B1.numpy(),
        lists.slice_ptr_B1.numpy(), lists.shift_ptr_B1.numpy(), parents.slice_prior_N.to(score_N).numpy(),
        parents.shift_prior_M.to(score_N).numpy(), slices_each, shifts_each,
    )  # fmt: skip
