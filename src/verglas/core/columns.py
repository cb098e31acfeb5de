"""Some columns x of a packed half volume: what remains of it in memory where it is worked on piece by piece.

A slab takes what samples between its columns add: with trilinear interpolation these touch the column after the last, too, which
the next slab has as its first. Friedel partners, on x = 0, are all in the first slab, and the padded transform back goes by
columns, so each slab is divided and transformed at once (`maximization/by_columns.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from verglas.core.rows import RowTable

VOXELS_AT_ONCE = 2**22  # of temporaries


@dataclass(frozen=True)
class ColumnSlab:
    """Columns first <= x <= last of `whole`; samples with first <= floor(p_x) < last belong to it.

    rows: where its voxels lie, voxel (z, y, x) at start[z, y] + x as ever, but for x from `first` on alone: what walks along rows
    from x = 0 must not be given this table.
    """

    whole: RowTable
    first: int
    last: int
    rows: RowTable

    @classmethod
    def of(cls, whole: RowTable, first: int, last: int) -> ColumnSlab:
        """Of the table of a sphere."""
        end_ZY = torch.where(whole.length_ZY > first, whole.length_ZY.clamp_max(last + 1), 0)
        here_ZY = (end_ZY - first).clamp_min(0).long()
        ends = here_ZY.flatten().cumsum(0)
        count = int(ends[-1])
        start_ZY = ends.view_as(here_ZY) - here_ZY - first
        narrow_ZY = start_ZY.int() if count + first < 2**31 else start_ZY
        return cls(whole, first, last, RowTable(whole.radius, whole.half, narrow_ZY, end_ZY, count))

    @cached_property
    def _plane_ends(self) -> list[int]:
        per_plane = (self.rows.length_ZY - self.first).clamp_min(0).long().sum(1)
        ends: list[int] = torch.cat([per_plane.new_zeros(1), per_plane.cumsum(0)]).tolist()
        return ends

    def parts(self, voxels: int = VOXELS_AT_ONCE) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Runs of its voxels: where they lie in the slab, where in the whole (int64 [n]), and their (x, y, z), int32 [3, n]."""
        ends, low, edge = self._plane_ends, 0, self.rows.edge
        voxels = min(voxels, max(2**18, self.whole.count // 64))
        while low < edge:
            high = low + 1
            while high < edge and ends[high + 1] - ends[low] <= voxels:
                high += 1
            count = ends[high] - ends[low]
            if count:
                here = (self.rows.length_ZY[low:high].flatten() - self.first).clamp_min(0)
                row = torch.repeat_interleave(torch.arange(len(here), device=here.device), here, output_size=count)
                place = torch.arange(ends[low], ends[high], device=here.device)
                x = place - self.rows.start_ZY[low:high].flatten()[row]
                whole = self.whole.start_ZY[low:high].flatten()[row] + x
                xyz = torch.stack([x, row % edge - self.rows.half, row // edge + (low - self.rows.half)]).int()
                yield slice(ends[low], ends[high]), whole, xyz
            low = high

    def first_column(self) -> Tensor:
        """Where the voxels with x = `first` lie, int64, row after row."""
        inside = self.rows.length_ZY > self.first
        return self.rows.start_ZY[inside].long() + self.first

    def last_column(self) -> Tensor:
        """Where those with x = `last` lie, in the order in which the next slab has them as its first column."""
        inside = self.rows.length_ZY > self.last
        return self.rows.start_ZY[inside].long() + self.last
