"""A packed sphere cut into layers about its centre: parts of which each serves some pixels of every slice, however it is turned.

A pixel of image frequency k lies at distance q |k| of the centre of the padded volume in every orientation (q: padding). So
whoever has the voxels between two radii can make, and add, those pixels of all slices that lie between them, and needs no others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.rows import RowTable, packed_sphere

WITHIN, BEYOND = 1.25, 1.75  # voxels by which interpolation makes a layer thicker on its sides, on average


@dataclass(frozen=True)
class LayerTable(RowTable):
    """Rows that do not begin at x = 0: `start_ZY` is still what x is added to, and first_ZY (int32) says where they begin. inner,
    outer: samples at inner <= |p| < outer are served."""

    first_ZY: Tensor
    inner: float
    outer: float

    def to(self, device: torch.device | str) -> LayerTable:
        """The same in the memory of a device."""
        start_ZY, length_ZY, first_ZY = (one.to(device) for one in (self.start_ZY, self.length_ZY, self.first_ZY))
        return LayerTable(self.radius, self.half, start_ZY, length_ZY, self.count, first_ZY, self.inner, self.outer)

    def places(self, planes: slice, other: RowTable) -> Tensor:
        """Where the voxels of some planes (counted from 0) lie in a table that has these planes whole, int64."""
        length_R = self.length_ZY[planes].flatten().long()
        ends_R = length_R.cumsum(0)
        first_R = other.start_ZY[planes].flatten().long() + self.first_ZY[planes].flatten() - (ends_R - length_R)
        count = self.slab_starts[planes.stop] - self.slab_starts[planes.start]
        place_V = torch.repeat_interleave(first_R, length_R, output_size=count)
        return place_V.add_(torch.arange(count, device=place_V.device))


@dataclass(frozen=True)
class Layers:
    """whole: table of the sphere; cuts: part i has the samples at cuts[i] <= |p| < cuts[i + 1], voxels, and what these touch."""

    whole: RowTable
    cuts: tuple[float, ...]

    @classmethod
    def of(cls, radius: float, parts: int, device: torch.device | str = "cpu") -> Layers:
        """Layers that have about as many voxels each."""
        return cls(packed_sphere(radius, device), (*_cuts(_each(radius, parts), parts)[:-1], float("inf")))

    @property
    def parts(self) -> int:
        return len(self.cuts) - 1

    def part_of(self, radius_K: Tensor) -> Tensor:
        """Which part has the samples at such distances, voxels."""
        inner = torch.tensor(self.cuts[1:-1], dtype=torch.float64, device=radius_K.device)
        return torch.bucketize(radius_K.double(), inner, right=True)

    def table(self, part: int) -> LayerTable:
        """Of a part, made anew."""
        return packed_layer(self.whole, self.cuts[part], self.cuts[part + 1])


def share_of_layer(radius: float, parts: int) -> float:
    """Of the voxels of a sphere, those that each of so many layers has: a little more than 1 / parts."""
    return _each(radius, parts) / (radius + BEYOND) ** 3


def _each(radius: float, parts: int) -> float:
    """Voxels of each of so many layers that are alike (but for a factor)."""
    low, high = 0.0, (radius + BEYOND) ** 3
    for _ in range(60):
        each = (low + high) / 2
        low, high = (each, high) if _cuts(each, parts)[-1] < radius else (low, each)
    return high


def _cuts(each: float, parts: int) -> list[float]:
    """Radii of layers of so many voxels (but for a factor)."""
    cuts = [0.0]
    for _ in range(parts):
        inner = max(0.0, cuts[-1] - WITHIN) ** 3
        cuts.append((inner + each) ** (1 / 3) - BEYOND)
    return cuts


def packed_layer(whole: RowTable, inner: float, outer: float) -> LayerTable:
    """Table of what samples at inner <= |p| < outer touch of a packed sphere."""
    axis = torch.arange(-whole.half, whole.half + 1, dtype=torch.float64, device=whole.device).abs()
    # A sample touches what is up to one voxel from it along each axis; a little more, so that rounding does not decide.
    last_ZY = whole.length_ZY.long()
    if outer < whole.radius:
        nearer2 = (axis - 1).clamp_min(0) ** 2
        x2 = (outer + 0.02) ** 2 - nearer2[:, None] - nearer2
        last_ZY = torch.minimum(last_ZY, torch.where(x2 >= 0, x2.clamp_min(0).sqrt().floor().long() + 2, 0))
    farther2 = (axis + 1) ** 2
    x2 = max(0.0, inner - 0.02) ** 2 - farther2[:, None] - farther2
    first_ZY = torch.minimum(x2.clamp_min(0).sqrt().floor().long(), last_ZY)
    length_ZY = last_ZY - first_ZY
    ends = length_ZY.flatten().cumsum(0)
    start_ZY, count = (ends - length_ZY.flatten()).view_as(length_ZY) - first_ZY, int(ends[-1])
    assert int(start_ZY[length_ZY > 0].min()) >= 0  # rows near the poles come first, and begin at 0
    start_ZY = torch.where(length_ZY > 0, start_ZY, start_ZY.clamp(0, max(0, count - whole.half - 3)))
    narrow = start_ZY.int() if count < 2**31 else start_ZY
    return LayerTable(whole.radius, whole.half, narrow, length_ZY.int(), count, first_ZY.int(), inner, min(outer, whole.radius))
