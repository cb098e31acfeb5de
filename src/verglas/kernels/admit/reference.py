"""`admit` in torch, any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks

SAMPLES_AT_ONCE = 2**24  # bounds the memory of the index arrays


@dataclass(frozen=True)
class Parents:
    """See README.md. slice_prior_N, shift_prior_M: logs, per entry of the lists; kept_N: -inf for pairs left out.

    blocks.slice_N: numbers of coarse orientations, int64 where they need it.
    """

    blocks: Blocks
    kept_N: Tensor
    slice_prior_N: Tensor
    shift_prior_M: Tensor

    def part(self, first: int, last: int) -> Parents:
        """Of particles first..last-1 alone."""
        ranges = self.blocks.ranges(first, last)
        slices, shifts, values = ranges
        blocks = self.blocks.part(first, last, ranges)
        return Parents(blocks, self.kept_N[values], self.slice_prior_N[slices], self.shift_prior_M[shifts])


def admit_reference(score_N: Tensor, blocks: Blocks, parents: Parents, slices_each: int, shifts_each: int) -> None:
    """See README.md; changes `score_N` in place."""
    slice_prior_N, shift_prior_M = parents.slice_prior_N.to(score_N), parents.shift_prior_M.to(score_N)
    lists = parents.blocks
    parent_shifts_B = lists.shift_ptr_B1[1:] - lists.shift_ptr_B1[:-1]
    for begin in range(0, blocks.samples, SAMPLES_AT_ONCE):
        end = min(begin + SAMPLES_AT_ONCE, blocks.samples)
        position = torch.arange(begin, end, device=score_N.device)
        particle = torch.searchsorted(blocks.value_ptr_B1, position, right=True) - 1
        within = position - blocks.value_ptr_B1[particle]
        shifts = parent_shifts_B[particle]
        a = torch.div(within, shifts * shifts_each, rounding_mode="floor")
        t = torch.div(within - a * (shifts * shifts_each), shifts_each, rounding_mode="floor")
        a = torch.div(a, slices_each, rounding_mode="floor")
        prior = slice_prior_N[lists.slice_ptr_B1[particle] + a] + shift_prior_M[lists.shift_ptr_B1[particle] + t]
        kept = parents.kept_N[lists.value_ptr_B1[particle] + a * shifts + t]
        score_N[begin:end] = torch.where(kept > -math.inf, score_N[begin:end] + prior, -math.inf)
