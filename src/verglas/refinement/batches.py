"""Which particles are worked on together: as many as memory allows."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_within(used_B: Tensor, rows_B: Tensor, limit: float, budget: float) -> list[tuple[int, int]]:
    """Consecutive runs (first, last) of particles that need at most `budget` bytes each, or are a single particle.

    used_B, rows_B: running sums of the bytes of each particle's own arrays and of its slices, float64 on the CPU; the slices of
    a run never need more than `limit`.
    """
    runs, first, used, rows = [], 0, 0.0, 0.0
    while first < len(used_B):
        needed_B = used_B[first:] - used + (rows_B[first:] - rows).clamp_max(limit)  # grows with every particle
        last = first + max(1, int(torch.searchsorted(needed_B, budget, right=True)))
        runs.append((first, last))
        first, used, rows = last, float(used_B[last - 1]), float(rows_B[last - 1])
    return runs
