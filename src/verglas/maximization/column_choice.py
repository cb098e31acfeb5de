"""Which columns are worked on at a time where memory is short (`by_columns`): counted before the start, in single precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from verglas.core.columns import VOXELS_AT_ONCE
from verglas.core.rows import RowTable
from verglas.maximization.accumulate import ADDITIONS_PER_VOXEL
from verglas.maximization.gridding import grid_for
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.stride import beside, residue_bytes, strides_for
from verglas.projection.pruned import BYTES_OF_NUMBER
from verglas.projection.volume import padded_size

SUMS, FLUSHED, EVEN = 16, 24, 4  # bytes a voxel: sums, their copy in double precision, u = v w
OF_PIXEL = 40  # bytes a pixel of the images of a batch, while they become slices
OF_PART = 100  # bytes a voxel of passes over parts of a slab
LEAST_COLUMNS = 8  # slabs end at multiples of this: bricks of `kernels.backproject`
MOST_SLABS_FOR_KEEPING = 16  # images stay on the device if that leaves room for slabs no smaller than this


@dataclass(frozen=True)
class ColumnChoice:
    """ends: of slabs; batch: images at a time; kept: bytes of images that stay on the device, 0: they are read again and again;
    transforms: bytes granted to those of exact gridding; at_once: columns transformed back together; peak: expected, bytes."""

    ends: tuple[int, ...]
    batch: int
    kept: float
    transforms: float
    at_once: int
    peak: float

    @classmethod
    def of(cls, geometry: Geometry, exact: bool, images: float, slices: int, batch: int, given: float) -> ColumnChoice | None:
        """The fewest slabs that fit into `given` bytes; None if none does. images: bytes of all; slices: added to a slab; batch:
        the largest."""
        with_images = _fitting(geometry, exact, images, slices, batch, given)
        if with_images is not None and len(with_images.ends) <= MOST_SLABS_FOR_KEEPING + 1:
            return with_images
        return _fitting(geometry, exact, 0.0, slices, batch, given) or with_images

    @property
    def slabs(self) -> int:
        return len(self.ends) - 1


def least(geometry: Geometry, exact: bool, slices: int) -> float:
    """About the fewest bytes for which there is a choice."""
    low, high = 0.0, 1e13
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _fitting(geometry, exact, 0.0, slices, 1, middle) else (middle, high)
    return high


def _fitting(geometry: Geometry, exact: bool, kept: float, slices: int, batch: int, given: float) -> ColumnChoice | None:
    box, size, rows = geometry.box, padded_size(geometry.box, geometry.padding), geometry.rows()
    batch = max(1, min(batch, int(given / 16 / (OF_PIXEL * box**2))))
    columns = min(int(rows.radius), size // 2) + 1
    of_column = float(BYTES_OF_NUMBER["cuda"] * size * (2 * columns - 1))
    at_once = max(1, min(64, int(given / 12 / of_column)))
    parts = min(VOXELS_AT_ONCE, max(2**18, rows.count // 64))
    working = max(OF_PIXEL * batch * float(box) ** 2, at_once * of_column, float(OF_PART * parts)) + 24.0 * rows.edge**2
    even = float(EVEN * rows.count) if exact else 0.0
    half, a_map = 8.0 * box**2 * columns, 4.0 * box**3
    grid = grid_for(rows.radius)
    transforms = given - 2 * even - kept - 24.0 * rows.edge**2
    if exact and residue_bytes(grid, _most_strides(grid), 4, fused=True) > transforms:
        return None
    fixed = even + half + kept + working
    flushed = slices > ADDITIONS_PER_VOXEL / (2 * box / size + 1) ** 2
    each = SUMS + (FLUSHED if flushed else 0)
    ends = column_ends(rows, (given - fixed) / each)
    if ends is None or half + a_map + kept + working > given:
        return None
    largest = max(voxels for _, _, voxels in _slabs(_per_column(rows), ends))
    strides = strides_for(grid, 4, 1, transforms, fused=True, result=even)
    iterated = even + kept + beside(rows.count, grid, strides, 4) if exact else 0.0
    peak = max(fixed + each * largest, iterated, half + a_map + kept + working)
    return ColumnChoice(ends, batch, kept, transforms, at_once, peak)


def column_ends(rows: RowTable, voxels: float) -> tuple[int, ...] | None:
    """Columns at which to cut so that no slab holds more voxels than that, as few and as alike as can be; None if 8 columns
    do."""
    per_X = _per_column(rows)
    fewest = _cut(per_X, voxels)
    if fewest is None:
        return None
    even = _cut(per_X, min(voxels, 1.02 * float(per_X.sum()) / (len(fewest) - 1) + LEAST_COLUMNS * float(per_X[0])))
    return even if even is not None and len(even) == len(fewest) else fewest


def _cut(per_X: Tensor, voxels: float) -> tuple[int, ...] | None:
    ends, upto = [0], torch.cat([per_X.new_zeros(1), per_X.cumsum(0)]).tolist()
    while ends[-1] < len(per_X):
        first = last = ends[-1]
        while last < len(per_X) and upto[min(last + LEAST_COLUMNS + 1, len(per_X))] - upto[first] <= voxels:
            last += LEAST_COLUMNS
        if last == first:
            return None
        ends.append(last)
    return tuple(ends)


def _slabs(per_X: Tensor, ends: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(first, last, voxels) of each slab, the shared column counted with both."""
    for first, last in pairwise(ends):
        yield first, last, int(per_X[first : last + 1].sum())


def _per_column(rows: RowTable) -> Tensor:
    """Voxels of each column x."""
    length = rows.length_ZY.flatten().long()
    longer_L = torch.bincount(length).flip(0).cumsum(0).flip(0)  # rows with at least so many
    return longer_L[1:].cpu()


def _most_strides(size: int) -> int:
    return max(s for s in range(1, size // 2 + 1) if size % s == 0)
