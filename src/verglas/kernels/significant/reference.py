"""`significant` in torch, any device: candidates by a bound, then one sort of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Significance:
    """Per particle: largest log weight, log of the sum, position of the largest, smallest accepted log weight, their number."""

    max_B: Tensor
    log_sum_B: Tensor
    best_B: Tensor
    threshold_B: Tensor
    count_B: Tensor


def significant_reference(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float) -> Significance:
    """See README.md; floats in float64, positions and counts in int64."""
    n_B = ptr_B1[1:] - ptr_B1[:-1]
    run_N = torch.repeat_interleave(torch.arange(len(n_B), device=ptr_B1.device), n_B)
    value_N = log_weight_N.double()
    max_B = value_N.new_full((len(n_B),), -math.inf).scatter_reduce_(0, run_N, value_N, "amax")
    usable_B = torch.isfinite(max_B)
    weight_N = torch.exp(value_N - torch.where(usable_B, max_B, 0.0)[run_N])
    sum_B = torch.zeros_like(max_B).index_add_(0, run_N, weight_N)
    position_N = torch.arange(len(value_N), device=value_N.device)
    best_B = torch.full_like(n_B, len(value_N)).scatter_reduce_(
        0, run_N, torch.where(value_N == max_B[run_N], position_N, len(value_N)), "amin"
    )
    bound_B = (1 - fraction) * sum_B / n_B.clamp_min(1)
    candidate_C = ((weight_N >= bound_B[run_N]) & usable_B[run_N]).nonzero().squeeze(1)
    run_C, weight_C = run_N[candidate_C], weight_N[candidate_C]
    order = torch.argsort(weight_C, descending=True, stable=True)
    order = order[torch.argsort(run_C[order], stable=True)]
    run_C, weight_C = run_C[order], weight_C[order]
    first_B = torch.searchsorted(run_C, torch.arange(len(n_B), device=run_C.device))
    cumulative_C = weight_C.cumsum(0)
    before_C = cumulative_C - weight_C
    start_B = torch.where(first_B < len(before_C), before_C[first_B.clamp_max(max(len(before_C) - 1, 0))], 0.0)
    accepted_C = before_C - start_B[run_C] <= fraction * sum_B[run_C]  # the sum before this one has not crossed yet
    smallest_B = torch.full_like(max_B, math.inf).scatter_reduce_(
        0, run_C[accepted_C], value_N[candidate_C[order]][accepted_C], "amin"
    )
    accepted_N = (value_N >= smallest_B[run_N]).long()
    count_B = torch.zeros_like(n_B).index_add_(0, run_N, accepted_N)
    log_sum_B = torch.where(usable_B, max_B + torch.log(sum_B), max_B)
    return Significance(max_B, log_sum_B, best_B, smallest_B, count_B)


def chosen_reference(log_weight_N: Tensor, ptr_B1: Tensor, threshold_B: Tensor) -> tuple[Tensor, Tensor]:
    """See README.md: (ptr [B + 1], positions), int64."""
    n_B = ptr_B1[1:] - ptr_B1[:-1]
    threshold_N = torch.repeat_interleave(threshold_B, n_B, output_size=len(log_weight_N))
    index_N = (log_weight_N >= threshold_N).nonzero().squeeze(1)
    return torch.searchsorted(index_N, ptr_B1), index_N
