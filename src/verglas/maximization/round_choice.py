"""What one map at a time takes of a GPU (`in_rounds`), stage by stage: counted before the start, in single precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verglas.core.rows import RowTable
from verglas.maximization.accumulate import ADDITIONS_PER_VOXEL
from verglas.maximization.apart import slice_bytes
from verglas.maximization.gridding import ITERATIONS, grid_for
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.stride import beside, moved_bytes, residue_bytes, strides_for
from verglas.projection import axes
from verglas.projection.volume import padded_size

DATA, WEIGHT = 8, 4  # bytes a voxel
ROOMY, LEAST = 14.2, 0.2e9  # bytes a voxel that are taken if nothing is said, and bytes that always may be
OF_PIXEL = 28  # bytes a pixel of the images of a batch, while they become slices
OF_SAMPLE = 700  # bytes that could be moved in the time in which a sample of a slice is made and its weight added (6e9/s, H200)
OF_GROUP = 60  # bytes a pixel of an image, of the tables of an optics group
OF_ROW = 24  # bytes a row of voxels, of tables of rows
OF_BRICK = 0.1  # bytes a voxel, of the list of bricks
SHARE_OF_BATCH = 0.4  # of what is left beside sums: images that become slices; the rest is for slices that wait
MOST_BATCH = 2**25  # pixels of images that become slices at a time


@dataclass(frozen=True)
class RoundChoice:
    """batch: images at a time; waiting, waiting_weights, transforms, remade, numbers: as `InRounds`; kept: bytes of images that
    stay on the device, 0: they are read again and again; peak: expected, bytes."""

    batch: int
    waiting: int
    waiting_weights: int
    kept: float
    transforms: float
    remade: bool
    numbers: int
    peak: float

    @classmethod
    def of(cls, geometry: Geometry, exact: bool, images: float, slices: int, given: float) -> RoundChoice | None:
        """What fits into `given` bytes; None if nothing does. images: bytes to be kept if they can; slices: of a round, without
        poses of the point group."""
        found = _fitting(geometry, exact, images, slices, given) if images else None
        return found or _fitting(geometry, exact, 0.0, slices, given)


def served(geometry: Geometry, device: torch.device, slices: int) -> bool:
    """Whether maps can be made so: by the kernels of a GPU, of no more slices (at all poses) than single precision holds."""
    size = padded_size(geometry.box, geometry.padding)
    few = slices <= ADDITIONS_PER_VOXEL / (2 * geometry.box / size + 1) ** 2
    return few and axes.serves(geometry.box, size, device, torch.float32)


def roomy(geometry: Geometry) -> float:
    """Bytes that are taken if nothing is said: little more than the sums, so that slices can wait."""
    return max(LEAST, ROOMY * geometry.rows().count)


def _fitting(geometry: Geometry, exact: bool, kept: float, slices: int, given: float) -> RoundChoice | None:
    box, rows = geometry.box, geometry.rows()
    of_data = slice_bytes(_samples(geometry), True, not exact)
    sums = float((DATA + WEIGHT) * rows.count)  # while data are added
    tables = OF_ROW * float(rows.edge) ** 2 + OF_BRICK * rows.count + OF_GROUP * float(box) ** 2
    left = given - sums - tables - kept
    batch = min(int(SHARE_OF_BATCH * left / (OF_PIXEL * box**2)), MOST_BATCH // box**2 or 1, slices)
    working = OF_PIXEL * batch * float(box) ** 2
    waiting = _alike(int((left - working) / of_data), slices)
    half, fewest = 8.0 * box**2 * _columns(geometry, rows), 8.0 * box * rows.edge * axes.TOGETHER
    held = DATA * rows.count + half + tables + kept  # while data are transformed back, beside some columns, and then the map
    numbers = int(min(given - held, max(fewest, 4.0 * box**3)) / 8)
    back = held + max(8.0 * numbers, 4.0 * box**3)
    if batch < 1 or waiting < 1 or back > given or numbers < fewest / 8:
        return None
    adding = sums + tables + kept + working + waiting * of_data
    if not exact:
        return RoundChoice(batch, waiting, waiting, kept, 0.0, False, numbers, max(adding, back))
    of_weights, weights = slice_bytes(_samples(geometry), False, True), float(WEIGHT * rows.count)
    beside_weights = 2 * weights + tables + kept + working  # u, once weights are made anew
    waiting_weights = _alike(int((given - beside_weights) / of_weights), slices)
    chosen = _evening(rows, given - tables - kept, slices * _samples(geometry))
    if chosen is None:
        return None
    transforms, remade, evening = chosen
    peak = max(beside_weights + waiting_weights * of_weights, evening + tables + kept, adding, back)
    return RoundChoice(batch, waiting, waiting_weights, kept, transforms, remade, numbers, peak)


def _evening(rows: RowTable, given: float, samples: int) -> tuple[float, bool, float] | None:
    """(bytes granted to transforms, whether weights are remade, bytes taken) while weights are made even: what moves fewest
    bytes. samples: of all slices of a round."""
    grid, of_all = grid_for(rows.radius), float(WEIGHT * rows.count)
    least = max(s for s in range(1, grid // 2 + 1) if grid % s == 0)
    found = []
    for remade in (False, True):
        held = of_all * (1 if remade else 2)
        granted = given - held - of_all  # beside what was convolved
        if residue_bytes(grid, least, 4, fused=True) <= granted:
            strides = strides_for(grid, 4, 1, granted, fused=True, result=of_all)
            moved = ITERATIONS * float(grid) ** 3 * moved_bytes(strides, 1, fused=True) + (OF_SAMPLE * samples if remade else 0)
            found.append((moved, granted, remade, held + beside(rows.count, grid, strides, 4)))
    return min(found)[1:] if found else None


def _alike(most: int, slices: int) -> int:
    """How many slices wait, if no more than `most` can: so that none are added few at a time in the end."""
    return -(-slices // -(-slices // most)) if most > 0 else 0


def _samples(geometry: Geometry) -> int:
    """About how many frequencies of an image are kept; not fewer."""
    return int(1.6 * geometry.radius * (geometry.radius + 2)) + 4 * geometry.radius


def _columns(geometry: Geometry, rows: RowTable) -> int:
    """Of what lies between the transforms along z and x (`Axes.half`)."""
    columns = min(int(rows.radius), padded_size(geometry.box, geometry.padding) // 2) + 1
    return -(-columns // 16) * 16
