"""`significant` in torch, any device: candidates by a bound, then one sort of all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.kernels.blocks import owner

SAMPLES_AT_ONCE = 2**27


@dataclass(frozen=True)
class Significance:
    """Per particle: largest log weight, log of the sum, position of the largest, smallest accepted log weight, their number."""

    max_B: Tensor
    log_sum_B: Tensor
    best_B: Tensor
    threshold_B: Tensor
    count_B: Tensor


def significant_reference(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float) -> Significance:
    """See README.md; floats in float64, positions and counts in int64. Runs are taken a few at a time: bounded memory."""
    ends = ptr_B1.tolist()
    equal = len(ends) > 1 and all(b - a == ends[1] - ends[0] for a, b in itertools.pairwise(ends))
    at_once, parts, first = SAMPLES_AT_ONCE if equal else SAMPLES_AT_ONCE // 8, [], 0
    for run in range(1, len(ends)):
        if run == len(ends) - 1 or ends[run + 1] - ends[first] > at_once:
            values, ptr = log_weight_N[ends[first] : ends[run]], ptr_B1[first : run + 1] - ends[first]
            part = _of_equal_runs(values, run - first, fraction) if equal and len(values) else _of_runs(values, ptr, fraction)
            parts.append(replace(part, best_B=part.best_B + ends[first]))
            first = run
    if not parts:
        return _of_runs(log_weight_N, ptr_B1, fraction)
    return Significance(*(torch.cat([getattr(part, name) for part in parts]) for name in Significance.__dataclass_fields__))


def _of_equal_runs(log_weight_N: Tensor, runs: int, fraction: float) -> Significance:
    """Runs of equal length as rows of a matrix: no index per sample."""
    value_BN = log_weight_N.view(runs, -1)
    best = value_BN.max(1)
    usable_B = torch.isfinite(best.values)
    weight_BN = torch.exp(value_BN - torch.where(usable_B, best.values, 0.0)[:, None])
    sum_B = weight_BN.sum(1, dtype=torch.float64)
    bound_B = (1 - fraction) * sum_B / value_BN.shape[1]
    candidate_C = ((weight_BN >= bound_B.to(weight_BN)[:, None]) & usable_B[:, None]).flatten().nonzero().squeeze(1)
    run_C = torch.div(candidate_C, value_BN.shape[1], rounding_mode="floor")
    smallest_B = _smallest(log_weight_N[candidate_C].double(), weight_BN.flatten()[candidate_C].double(), run_C, fraction * sum_B)
    count_B = (value_BN >= smallest_B.to(value_BN)[:, None]).sum(1)
    max_B = best.values.double()
    log_sum_B = torch.where(usable_B, max_B + torch.log(sum_B), max_B)
    position_B = best.indices + torch.arange(runs, device=max_B.device) * value_BN.shape[1]
    return Significance(max_B, log_sum_B, position_B, smallest_B, count_B)


def _of_runs(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float) -> Significance:
    """Runs of any length."""
    n_B = ptr_B1[1:] - ptr_B1[:-1]
    run_N = owner(ptr_B1)
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
    smallest_B = _smallest(value_N[candidate_C], weight_N[candidate_C], run_N[candidate_C], fraction * sum_B)
    accepted_N = (value_N >= smallest_B[run_N]).long()
    count_B = torch.zeros_like(n_B).index_add_(0, run_N, accepted_N)
    log_sum_B = torch.where(usable_B, max_B + torch.log(sum_B), max_B)
    return Significance(max_B, log_sum_B, best_B, smallest_B, count_B)


def _smallest(value_C: Tensor, weight_C: Tensor, run_C: Tensor, needed_B: Tensor) -> Tensor:
    """Smallest accepted value of each run [B] among its candidates (sorted by run): largest first, until more than needed."""
    infinite_B = torch.full_like(needed_B, math.inf)
    if not len(value_C):
        return infinite_B
    order = torch.argsort(weight_C, descending=True, stable=True)
    order = order[torch.argsort(run_C[order], stable=True)]
    value_C, weight_C, run_C = value_C[order], weight_C[order], run_C[order]
    first_B = torch.searchsorted(run_C, torch.arange(len(needed_B), device=run_C.device))
    before_C = weight_C.cumsum(0) - weight_C
    start_B = torch.where(first_B < len(before_C), before_C[first_B.clamp_max(len(before_C) - 1)], 0.0)
    accepted_C = before_C - start_B[run_C] <= needed_B[run_C]  # the sum before this one has not crossed yet
    return infinite_B.scatter_reduce_(0, run_C[accepted_C], value_C[accepted_C], "amin")
