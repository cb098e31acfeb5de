"""Transforms on one device by spreading and FFTs of its own, whose points are sorted once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verglas.kernels.spread import Places, interpolate, located, spread, tabled
from verglas.nufft.fine import FineGrid

if TYPE_CHECKING:
    from verglas.kernels.spread.tiles import Tiled


class Own:
    """fine: the grid; point_MD: in radians; implementation: of kernels/spread; tables: keep weights as 16-bit numbers."""

    def __init__(self, fine: FineGrid, point_MD: Tensor, implementation: str, tables: bool = False) -> None:
        self.fine, self.points, self.implementation, self.tables = fine, point_MD, implementation, tables
        self._places: Places | Tiled | None = None

    @property
    def kernel(self) -> str:
        """What computes, for a run record."""
        tables = ", 16-bit tables" if self.tables else ""
        return f"{self.implementation}, window of {self.fine.window.width} cells, grid {self.fine.sizes}{tables}"

    @property
    def places(self) -> Places | Tiled:
        """The points on the fine grid, sorted when first needed."""
        if self._places is None:
            self._places = located(
                self.points, self.fine.cells, self.fine.taps(), self.implementation, self.fine.cells_per_radian
            )
            if self.tables:
                self._places = tabled(self._places)
        return self._places

    def forget(self) -> None:
        """Free what is kept."""
        self._places = None

    def run(self, kind: int, sign: int, given: Tensor) -> Tensor:
        """Type 1 or 2; given [..., M] or [..., *shape]."""
        if kind == 1:
            grid = self.fine.zeros(math.prod(given.shape[:-1]))
            values_BM2 = torch.view_as_real(given.contiguous()).view(len(grid), len(self.points), 2)
            spread(grid, self.places, values_BM2, self.implementation)
            return self.fine.modes(grid, sign).view(*given.shape[:-1], *self.fine.shape)
        lead = given.shape[: given.ndim - len(self.fine.shape)]
        grid = self.fine.grid(given.reshape(-1, *self.fine.shape), sign)
        values = torch.view_as_complex(interpolate(grid, self.places, self.implementation))
        return values.view(*lead, len(self.points))
