"""`admit` on the CPU: one pass in Numba."""

from __future__ import annotations

import numba
from torch import Tensor

from verglas.kernels.blocks import Blocks


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _admit(score, value_ptr, slice_ptr, shift_ptr, bias, bias_ptr, slices_each, shifts_each):
    for i in numba.prange(len(value_ptr) - 1):
        n, m = slice_ptr[i + 1] - slice_ptr[i], shift_ptr[i + 1] - shift_ptr[i]
        groups = m // shifts_each
        for a in range(n):
            row, prior = value_ptr[i] + a * m, bias_ptr[i] + (a // slices_each) * groups
            for g in range(groups):
                for c in range(shifts_each):
                    score[row + g * shifts_each + c] += bias[prior + g]


def admit_cpu(score_N: Tensor, blocks: Blocks, bias_P: Tensor, parents: Blocks, slices_each: int, shifts_each: int) -> None:
    """See README.md."""
    _admit(
        score_N.numpy(), blocks.value_ptr_B1.numpy(), blocks.slice_ptr_B1.numpy(), blocks.shift_ptr_B1.numpy(),
        bias_P.to(score_N).numpy(), parents.value_ptr_B1.numpy(), slices_each, shifts_each,
    )  # fmt: skip
