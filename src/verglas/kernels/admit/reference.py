"""`admit` in torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks

SAMPLES_AT_ONCE = 2**26  # bounds the memory of the index arrays


def admit_reference(score_N: Tensor, blocks: Blocks, bias_P: Tensor, parents: Blocks, slices_each: int, shifts_each: int) -> None:
    """See README.md; adds to `score_N` in place."""
    ends = blocks.value_ptr_B1.tolist() if blocks.samples > SAMPLES_AT_ONCE else [0, blocks.samples]
    begin = 0
    for end in ends:
        if end - begin < SAMPLES_AT_ONCE and end != ends[-1]:
            continue
        position = torch.arange(begin, end, device=score_N.device)
        particle = torch.searchsorted(blocks.value_ptr_B1, position, right=True) - 1
        within = position - blocks.value_ptr_B1[particle]
        shifts = (blocks.shift_ptr_B1[1:] - blocks.shift_ptr_B1[:-1])[particle]
        a = torch.div(within, shifts, rounding_mode="floor")
        parent_shift = torch.div(within - a * shifts, shifts_each, rounding_mode="floor")
        parent = torch.div(a, slices_each, rounding_mode="floor") * torch.div(shifts, shifts_each, rounding_mode="floor")
        score_N[begin:end] += bias_P[parents.value_ptr_B1[particle] + parent + parent_shift].to(score_N)
        begin = end
