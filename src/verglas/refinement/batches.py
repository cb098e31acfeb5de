"""Which particles are worked on together: as many as memory allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.expectation.classes import ClassGrid
from verglas.kernels.blocks import Blocks


@dataclass(frozen=True)
class FineBytes:
    """Bytes that a fine search takes: for a child of an orientation among the samples, for a shifted image, for a slice."""

    sample: float
    shift: float
    row: float

    def runs(self, blocks: Blocks, grid: ClassGrid, budget: float) -> list[tuple[int, int]]:
        """Consecutive runs (first, last) of particles whose children of these coarse samples need at most `budget`."""
        each = grid.children_per_orientation
        limit = grid.count * each * self.row  # particles share slices: all of them together never need more than the grid
        if blocks.count is not None:  # then the host can tell without waiting that all of them fit
            slices = min(len(blocks.slice_N) * each * self.row, limit)
            if blocks.count * each * self.sample + len(blocks.shift_M) * self.shift + slices <= budget:
                return [(0, blocks.particles)]
        slices_B = (blocks.slice_ptr_B1.diff() * each).clamp_max(grid.count * each)
        bytes_B = blocks.value_ptr_B1.diff() * each * self.sample + blocks.shift_ptr_B1.diff() * self.shift
        used_B, rows_B = torch.stack([bytes_B, slices_B * self.row]).double().cumsum(1).cpu()
        return runs_within(used_B, rows_B, limit, budget)


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
