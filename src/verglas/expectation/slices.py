"""Slices of the references in the form the comparison wants: divided by the common noise, in its precision, origin zero.

The origin never counts; where a reference's mean is far from zero it would overflow half precision, and 0 * inf is no number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.expectation.classes import ClassGrid, runs_of
from verglas.projection.volume import FourierVolume

LARGEST_HALF = 65504.0  # of float16
# Numbers of the float32 slices before they are scaled and rounded: near the cache on a CPU, few launches on a GPU.
NUMBERS_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}


class Slicer:
    """Slices P / sigma_c of references (one per class) at fixed coordinates. dtype: what the slices are rounded to."""

    def __init__(self, volumes: list[FourierVolume], coordinates_K3: Tensor, common_K: Tensor, dtype: torch.dtype) -> None:
        self.volumes, self.coordinates_K3, self.common_K, self.dtype = volumes, coordinates_K3, common_K, dtype
        self.inverse_K = (coordinates_K3.ne(0).any(1) / common_K).to(volumes[0].work_dtype)

    def at(self, index_K: Tensor, dtype: torch.dtype) -> Slicer:
        """A slicer of some of the coefficients in another precision."""
        return Slicer(self.volumes, self.coordinates_K3[index_K], self.common_K[index_K], dtype)

    def of_class(self, number: int) -> Slicer:
        """A slicer of one reference alone."""
        return Slicer([self.volumes[number]], self.coordinates_K3, self.common_K, self.dtype)

    def coarse(self, grid: ClassGrid, orientation_R: Tensor) -> Tensor:
        """[R, 2, K] of coarse orientations of all classes, ascending."""
        return self._of_classes(grid.rotations(orientation_R), grid.class_of(orientation_R))

    def children(self, grid: ClassGrid, fine_index_R: Tensor) -> Tensor:
        """[R, 2, K] of children (fine indices of all classes, ascending)."""
        return self._of_classes(grid.child_rotations(fine_index_R), grid.class_of_child(fine_index_R))

    def __call__(self, rotation_R33: Tensor) -> Tensor:
        """[R, 2, K] of the first class at poses A."""
        return self._into(self._empty(len(rotation_R33)), self.volumes[0], rotation_R33)

    def _of_classes(self, rotation_R33: Tensor, class_R: Tensor) -> Tensor:
        if len(self.volumes) == 1:
            return self(rotation_R33)
        out, starts = self._empty(len(rotation_R33)), runs_of(class_R, len(self.volumes))
        for volume, first, last in zip(self.volumes, starts, starts[1:]):
            self._into(out[first:last], volume, rotation_R33[first:last])
        return out

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, 2, len(self.coordinates_K3), dtype=self.dtype, device=self.coordinates_K3.device)

    def _into(self, out: Tensor, volume: FourierVolume, rotation_R33: Tensor) -> Tensor:
        """Fill `out` a part at a time and return it. Coefficients too strong for half precision count in single precision."""
        step = max(1, NUMBERS_AT_ONCE.get(self.coordinates_K3.device.type, 2**27) // (2 * len(self.coordinates_K3)))
        for first in range(0, len(rotation_R33), step):
            part = slice(first, first + step)
            volume.slices(rotation_R33[part], self.coordinates_K3, self.inverse_K, out[part])
        return out


class FineSlices:
    """Slices of the children of coarse orientations: of the whole grid once (`whole`, if that fits), else of those asked for.

    `of(orientations)` returns (table [*, 2, K], row of the first child of each orientation); the children of an
    orientation are consecutive rows.
    """

    def __init__(self, slicer: Slicer, grid: ClassGrid, whole: bool) -> None:
        self.slicer, self.grid, self.whole = slicer, grid, whole
        self.table: Tensor | None = None  # made when first asked for: who only wants the slicer pays nothing

    def of(self, orientation_U: Tensor) -> tuple[Tensor, Tensor]:
        """See the class. orientation_U: int64, coarse orientations."""
        each = self.grid.children_per_orientation
        if self.whole:
            if self.table is None:
                every = torch.arange(self.grid.count * each, device=orientation_U.device)
                self.table = self.slicer.children(self.grid, every)
            return self.table, orientation_U * each
        own = self.slicer.children(self.grid, child_indices(orientation_U, each))
        return own, each * torch.arange(len(orientation_U), device=orientation_U.device)


def child_indices(orientation_U: Tensor, each: int) -> Tensor:
    """Fine indices of all children, [U * each] int64: o * each + c."""
    return (orientation_U[:, None] * each + torch.arange(each, device=orientation_U.device)).flatten()
