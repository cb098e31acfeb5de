"""Slices of the references in the form the comparison wants: divided by the common noise, in its precision, origin zero.

The origin never counts; where a reference's mean is far from zero it would overflow half precision, and 0 * inf is no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.expectation.classes import ClassGrid, runs_of
from verglas.expectation.images import ModelGrid
from verglas.projection.volume import FourierVolume

ALL_AT_ONCE = 0.7  # share of the orientations from which on all are made together: that spares a copy
ROWS_COPIED = 4096  # slices made before they are copied to their places in a table; on a GPU, whose host they cost time, more
# Numbers of slices made in one go: bounds what is made beside them. From cells (half precision on a GPU) that is little.
NUMBERS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27, "cells": 2**31}


@dataclass(frozen=True)
class Reference:
    """A map that was made ready to be sliced up to a radius."""

    map_ZYX: Tensor
    grid: ModelGrid
    volume: FourierVolume

    def serves(self, map_ZYX: Tensor, grid: ModelGrid) -> bool:
        """Whether it is what another expectation needs."""
        return self.map_ZYX is map_ZYX and (self.grid.radius, self.grid.padding) == (grid.radius, grid.padding)


def volume_of(
    map_ZYX: Tensor, grid: ModelGrid, device: torch.device, dtype: torch.dtype, ready: Sequence[Reference] = ()
) -> FourierVolume:
    """A map ready to be sliced, made unless one of those that are `ready` serves."""
    found = next((one.volume for one in ready if one.serves(map_ZYX, grid)), None)
    return found or FourierVolume.from_map(map_ZYX, grid.radius, grid.padding, device, dtype)


class Slicer:
    """Slices P / sigma_c of references (one per class) at fixed coordinates. dtype: what the slices are rounded to."""

    def __init__(self, volumes: list[FourierVolume], coordinates_K3: Tensor, common_K: Tensor, dtype: torch.dtype) -> None:
        self.volumes, self.coordinates_K3, self.common_K, self.dtype = volumes, coordinates_K3, common_K, dtype
        self.inverse_K = (coordinates_K3.ne(0).any(1) / common_K).to(volumes[0].values.dtype)

    def at(self, index_K: Tensor, dtype: torch.dtype) -> Slicer:
        """A slicer of some of the coefficients in another precision."""
        return Slicer(self.volumes, self.coordinates_K3[index_K], self.common_K[index_K], dtype)

    def coarse(self, grid: ClassGrid, orientation_R: Tensor) -> Tensor:
        """[R, 2, K] of coarse orientations of all classes, ascending."""
        return self._of_classes(grid.rotations(orientation_R), grid.class_of(orientation_R))

    def children(self, grid: ClassGrid, fine_index_R: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, 2, K] of children (fine indices of all classes, ascending); out: to be filled and returned."""
        return self._of_classes(grid.child_rotations(fine_index_R), grid.class_of_child(fine_index_R), out)

    def __call__(self, rotation_R33: Tensor) -> Tensor:
        """[R, 2, K] of the first class at poses A."""
        return self._into(self.empty(len(rotation_R33)), self.volumes[0], rotation_R33)

    def at_origin(self, origin_13: Tensor) -> Tensor:
        """Value of each reference's transform at the origin (coordinates of it given), the same in all slices; float64 [C]."""
        turn = torch.eye(3, dtype=torch.float64)[None]
        return torch.stack([volume.slices(turn, origin_13)[0, 0, 0].double() for volume in self.volumes])

    def _of_classes(self, rotation_R33: Tensor, class_R: Tensor, out: Tensor | None = None) -> Tensor:
        out = self.empty(len(rotation_R33)) if out is None else out
        if len(self.volumes) == 1:
            return self._into(out, self.volumes[0], rotation_R33)
        starts = runs_of(class_R, len(self.volumes))
        for volume, first, last in zip(self.volumes, starts, starts[1:]):
            self._into(out[first:last], volume, rotation_R33[first:last])
        return out

    def empty(self, count: int) -> Tensor:
        """Memory for slices, [count, 2, K]."""
        return torch.empty(count, 2, len(self.coordinates_K3), dtype=self.dtype, device=self.coordinates_K3.device)

    def _into(self, out: Tensor, volume: FourierVolume, rotation_R33: Tensor) -> Tensor:
        """Fill `out` a part at a time and return it. Coefficients too strong for half precision count in single precision."""
        where = "cells" if volume.cells_serve(out) else self.coordinates_K3.device.type
        step = max(1, NUMBERS_AT_ONCE.get(where, 2**27) // (2 * len(self.coordinates_K3)))
        for first in range(0, len(rotation_R33), step):
            part = slice(first, first + step)
            volume.slices(rotation_R33[part], self.coordinates_K3, self.inverse_K, out[part])
        return out


class FineSlices:
    """Slices of the children of coarse orientations: in a table of the whole grid (`whole`, if that fits), each made when first
    asked for and kept; else those asked for alone.

    `of(orientations)` returns (table [*, 2, K], row of the first child of each orientation); the children of an
    orientation are consecutive rows. Rows that were not asked for mean nothing.
    """

    def __init__(self, slicer: Slicer, grid: ClassGrid, whole: bool) -> None:
        self.slicer, self.grid, self.whole = slicer, grid, whole
        self.table: Tensor | None = None
        self.made_O: Tensor | None = None  # coarse orientations whose children are in the table
        self.made = 0  # how many these are: once it is all of them, nobody waits to hear which

    def of(self, orientation_U: Tensor) -> tuple[Tensor, Tensor]:
        """See the class. orientation_U: int64, coarse orientations, ascending."""
        each = self.grid.children_per_orientation
        if self.whole:
            return self._with(orientation_U), orientation_U * each
        own = self.slicer.children(self.grid, child_indices(orientation_U, each))
        return own, each * torch.arange(len(orientation_U), device=orientation_U.device)

    def _with(self, orientation_U: Tensor) -> Tensor:
        """The table of the whole grid, the children of these orientations in it."""
        each, count = self.grid.children_per_orientation, self.grid.count
        if self.table is None or self.made_O is None:
            self.table = self.slicer.empty(count * each)
            self.made_O = torch.zeros(count, dtype=torch.bool, device=orientation_U.device)
        if self.made == count:
            return self.table
        missing_U = orientation_U[~self.made_O[orientation_U]] if self.made else orientation_U
        if len(missing_U) > ALL_AT_ONCE * count and not self.made:
            missing_U = torch.arange(count, device=orientation_U.device)
            self.slicer.children(self.grid, torch.arange(count * each, device=orientation_U.device), self.table)
        else:
            for part_U in missing_U.split(max(1, self._rows_copied() // each)):
                rows_R = child_indices(part_U, each)
                self.table[rows_R] = self.slicer.children(self.grid, rows_R)
        self.made_O.index_fill_(0, missing_U, True)  # not before they are made: the device may run out of memory meanwhile
        self.made += len(missing_U)
        return self.table

    def _rows_copied(self) -> int:
        pixels, device = len(self.slicer.coordinates_K3), self.slicer.coordinates_K3.device.type
        return ROWS_COPIED if device == "cpu" else max(ROWS_COPIED, NUMBERS_AT_ONCE["cuda"] // (2 * pixels))


def child_indices(orientation_U: Tensor, each: int) -> Tensor:
    """Fine indices of all children, [U * each] int64: o * each + c."""
    return (orientation_U[:, None] * each + torch.arange(each, device=orientation_U.device)).flatten()
