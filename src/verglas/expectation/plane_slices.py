"""Slices of 2-D references in the form the comparison wants; see `slices`."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.expectation.classes import ClassGrid
from verglas.expectation.slices import NUMBERS_AT_ONCE, Slicer
from verglas.projection.planes import FourierPlanes


class PlaneSlicer(Slicer):
    """Turned references of all classes at once: a slice is a class at an in-plane angle."""

    def __init__(self, planes: FourierPlanes, coordinates_K3: Tensor, common_K: Tensor, dtype: torch.dtype) -> None:
        super().__init__([planes.volume], coordinates_K3, common_K, dtype)
        self.planes = planes

    def at(self, index_K: Tensor, dtype: torch.dtype) -> PlaneSlicer:
        """A slicer of some of the coefficients in another precision."""
        return PlaneSlicer(self.planes, self.coordinates_K3[index_K], self.common_K[index_K], dtype)

    def coarse(self, grid: ClassGrid, orientation_R: Tensor) -> Tensor:
        """[R, 2, K] of coarse orientations of all classes."""
        out = self.empty(len(orientation_R))
        return self._turned(out, grid.rotations(orientation_R), grid.class_of(orientation_R))

    def children(self, grid: ClassGrid, fine_index_R: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, 2, K] of children (fine indices of all classes); out: to be filled and returned."""
        out = self.empty(len(fine_index_R)) if out is None else out
        return self._turned(out, grid.child_rotations(fine_index_R), grid.class_of_child(fine_index_R))

    def __call__(self, rotation_R33: Tensor) -> Tensor:
        """[R, 2, K] of the first class at poses A."""
        return self._turned(self.empty(len(rotation_R33)), rotation_R33, torch.zeros(len(rotation_R33)))

    def at_origin(self, origin_13: Tensor) -> Tensor:
        """Value of each reference's transform at the origin, float64 [C]."""
        class_C = torch.arange(self.planes.classes, device=origin_13.device)
        turn_C33 = torch.eye(3, dtype=torch.float64, device=origin_13.device).expand(len(class_C), 3, 3)
        return self.planes.slices(turn_C33, class_C, origin_13)[:, 0, 0].double()

    def _turned(self, out: Tensor, rotation_R33: Tensor, class_R: Tensor) -> Tensor:
        """Fill `out` a part at a time and return it."""
        where = "cells" if self.planes.volume.cells_serve(out) else self.coordinates_K3.device.type
        step = max(1, NUMBERS_AT_ONCE.get(where, 2**27) // (2 * len(self.coordinates_K3)))
        for first in range(0, len(rotation_R33), step):
            part = slice(first, first + step)
            self.planes.slices(rotation_R33[part], class_R[part], self.coordinates_K3, self.inverse_K, out[part])
        return out
