"""Maps whose padded sums memory does not hold, on a CPU: sums are made slab after slab, each anew from the images.

A slab is the planes z0 <= |z| < z1 of the padded half volume. To make its sums all images are gone through, and of each slice is
kept what falls into these planes. What the solution needs per voxel is in the slab (`slabs`); what it needs of a shell, the mean
weight above all, is found in a first round over all slabs, so that every quotient is the one that `solve.SolvedSums` finds. Each
plane is transformed back along y and x at once and cropped to the box, which leaves 1 / 4 of it, in a file; then rows of all
planes are read again and transformed along z (`on_disk`). No more than one slab and a few planes are ever in memory.

Work that is done again is cheap beside disks that hold all sums: 36 GB at 1,024 px, read and written in random order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from verglas.core.masks import soft_sphere
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc_header import HEADER_BYTES
from verglas.kernels import voxels
from verglas.maximization.accumulate import ADDITIONS_PER_VOXEL, Accumulator
from verglas.maximization.on_disk import MaskPart, PlanesOnDisk, fsc_of_files, plane_pairs, write_map
from verglas.maximization.point_group import apply_point_group, turns_of_planes
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.reconstruction import MASK_EDGE, Reconstruction, solve_halves, within
from verglas.maximization.solve import SolvedSums, add_friedel_partners, mean_gain, regularising, weight_floor
from verglas.projection.volume import padded_size

T = TypeVar("T")
PAIRS_AT_ONCE = 2  # of planes that are transformed back together


class Bar(Protocol):
    """Progress of a stage."""

    def advance(self, n: int = 1) -> None:
        """n more are done."""


@dataclass(frozen=True)
class OutOfCore:
    """How maps are made. ends: slab i has the planes ends[i] <= |z| < ends[i + 1]; folder: where maps and a file for what is
    between the transforms go; memory: bytes that arrays may take; progress: (stage, how many, of what) -> a bar."""

    geometry: Geometry
    symmetry: str
    ends: Sequence[int]
    folder: Path
    memory: float
    progress: Callable[[str, int, str], AbstractContextManager[Bar]]


class SlabAccumulator(Accumulator):
    """Sums of some planes alone. Slices are added at all poses of the point group that lead from planes to others."""

    def __init__(self, geometry: Geometry, symmetry: str, planes: tuple[int, int]) -> None:
        super().__init__(geometry.box, geometry.radius, geometry.padding, planes=planes)
        self.symmetry, self.turn_C33 = symmetry, turns_of_planes(symmetry)

    def add(self, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """As `Accumulator.add`."""
        before = self.slices
        for turn in self.turn_C33:
            super().add(data_R2K, weight_RK, rotation_R33 @ turn.to(rotation_R33), coordinates_K3)
        self.slices = before + len(data_R2K)

    def solved(self) -> SolvedSums:
        """As `solve.gather_sums`; the accumulator is used up."""
        sums_V = self.total()
        add_friedel_partners(sums_V, self.rows)
        sums_V = apply_point_group(sums_V, self.rows, self.symmetry, in_planes=True)
        return SolvedSums(sums_V[:, :2], sums_V[:, 2], self.rows, self.box, self.radius, self.padding)


class SumsBySlabs:
    """Sums of one set of particles, made as they are needed; asked as `SolvedSums`, but that maps are files.

    add_to: (accumulator, stage) -> adds all slices of the set; names: of the files of a map without and with a prior.
    """

    def __init__(self, how: OutOfCore, add_to: Callable[[Accumulator, str], None], names: tuple[str, str]) -> None:
        self.how, self.names, self.slices = how, names, 0
        self._add_to = add_to

    def each_slab(self, stage: str, work: Callable[[int, int, SolvedSums], T]) -> list[T]:
        """work(z0, z1, sums of the planes z0 <= |z| < z1) of all slabs, one of which is in memory at a time."""
        runs, found = list(pairwise(self.how.ends)), []
        for number, (low, high) in enumerate(runs, start=1):
            sums = SlabAccumulator(self.how.geometry, self.how.symmetry, (low, high))
            self._add_to(sums, f"{stage}, slab {number} of {len(runs)}")
            self.slices = sums.slices
            found.append(work(low, high, sums.solved()))
            del sums  # before the next one is made
        return found

    @cached_property
    def shell_sums(self) -> tuple[Tensor, Tensor]:
        """(weight, voxels) of each shell, [2, S]: of shells floor(r / padding), then of shells round(r / padding)."""

        def measured(low: int, high: int, sums: SolvedSums) -> Tensor:
            return torch.stack([torch.stack(sums.shell_sums(rounding)[:2]) for rounding in (0.0, 0.5)], 1)

        total_2S, count_2S = torch.stack(self.each_slab(f"Weights for {self.names[0]}", measured)).sum(0)
        return total_2S, count_2S

    def shell_weight(self) -> Tensor:
        """As `SolvedSums.shell_weight`."""
        total_2S, count_2S = self.shell_sums
        return total_2S[1] / count_2S[1].clamp_min(1)

    def coverage(self, inverse_tau2_S: Tensor) -> Tensor:
        """As `SolvedSums.coverage`."""
        found = self.each_slab("Coverage", lambda low, high, sums: sums.shell_sums(prior_S=inverse_tau2_S)[2])
        return torch.stack(found).sum(0) / self.shell_sums[1][1].clamp_min(1)

    def map(self, inverse_tau2_S: Tensor | None = None, keep_scale: bool = False) -> Path:
        """The file of the map that `SolvedSums.map` gives; one of that name is replaced."""
        how, path = self.how, self.how.folder / self.names[inverse_tau2_S is not None]
        geometry, size = how.geometry, padded_size(how.geometry.box, how.geometry.padding)
        curves_S = self._curves(inverse_tau2_S, keep_scale)
        with PlanesOnDisk(how.folder, (how.ends[-1], geometry.box, geometry.box)) as planes:

            def back(low: int, high: int, sums: SolvedSums) -> None:
                with how.progress(f"Planes {low} to {high - 1} of {how.ends[-1]}", high - low, "planes") as bar:
                    for first in range(low, high, PAIRS_AT_ONCE):
                        last = min(first + PAIRS_AT_ONCE, high)
                        planes.put(first, _planes_back(sums, curves_S, first, last))
                        bar.advance(last - first)

            self.each_slab(f"Sums for {path.name}", back)
            with how.progress(f"Transforming {path.name} along z", geometry.box, "rows") as bar:
                scale = size / geometry.box, geometry.pixel_size
                write_map(planes, path, scale, how.memory, bar.advance)
        return path

    def _curves(self, inverse_tau2_S: Tensor | None, keep_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(prior, floor, gain) per shell, as in `SolvedSums.map`."""
        total_2S, count_2S = self.shell_sums
        floor_S = weight_floor(total_2S[0], count_2S[0])
        prior_S = regularising(inverse_tau2_S, floor_S)
        gain_S = torch.ones_like(floor_S)
        if keep_scale:
            found = self.each_slab(f"Gain of {self.names[1]}", lambda low, high, sums: torch.stack(sums.gains(prior_S)))
            gain_S = mean_gain(*torch.stack(found).sum(0))
        return prior_S, floor_S, gain_S

    def __add__(self, other: SumsBySlabs) -> SumsBySlabs:
        """Of both sets together."""

        def both(sums: Accumulator, stage: str) -> None:
            self._add_to(sums, f"{stage}, first half-set")
            other._add_to(sums, f"{stage}, second half-set")

        joined = SumsBySlabs(self.how, both, ("map.mrc", "map_wiener.mrc"))
        mine, its = self.shell_sums, other.shell_sums
        joined.shell_sums = mine[0] + its[0], mine[1]  # Friedel partners and symmetry commute with the sum
        joined.slices = self.slices + other.slices
        return joined


def _planes_back(sums: SolvedSums, curves_S: tuple[Tensor, Tensor, Tensor], first: int, last: int) -> Tensor:
    """Planes first .. last - 1 of a slab, divided and transformed back along y and x, complex [z, N, N]."""
    rows, count, size = sums.rows, last - first, padded_size(sums.box, sums.padding)
    columns = min(int(math.sqrt(rows.radius**2 - first**2)) + 1, int(rows.radius))
    fourier = torch.zeros(2 * count, size, columns, 2, dtype=sums.weight_V.dtype)
    place_E, above = torch.zeros(rows.edge, dtype=torch.int64), torch.arange(first, last)
    place_E[rows.half - above] = count + above - first
    place_E[rows.half + above] = above - first
    shown = rows.shown(rows.between(first, last))
    voxels.divide_cpu(sums.data_V2, sums.weight_V, shown, sums.padding, curves_S, fourier, place_E)
    return plane_pairs(torch.view_as_complex(fourier), sums.box, first == 0).to(torch.complex64)


def solve_out_of_core(
    sets: Sequence[SumsBySlabs], mask_ZYX: Tensor | None = None, mask_radius: float | None = None
) -> Reconstruction:
    """As `reconstruction.solve`; the maps are files of the run, here mapped into memory."""
    how = sets[0].how
    geometry, box = how.geometry, how.geometry.box

    def in_mask(part: slice) -> Tensor:
        if mask_ZYX is not None:
            return mask_ZYX[part]
        return soft_sphere(box, mask_radius or box / 2 - MASK_EDGE, MASK_EDGE, part=part)

    def correlate(first: Path, second: Path, masked: bool) -> Tensor:
        mask: MaskPart | None = in_mask if masked else None
        return within(fsc_of_files((first, second), box, mask, how.folder), geometry.radius)

    def opened(path: Path) -> Tensor:
        return torch.from_numpy(np.memmap(path, "<f4", "c", HEADER_BYTES, (box, box, box)))  # changes are not written

    if len(sets) == 1:
        return Reconstruction(opened(sets[0].map()), geometry.pixel_size, geometry.radius)
    first, second = sets
    return solve_halves((first, second), first + second, (geometry.pixel_size, geometry.radius), correlate, opened)


# What the ways take


@dataclass(frozen=True)
class Needs:
    """Bytes. in_memory: of sums and maps, all in memory; fixed, each_voxel: of the way by slabs, beside the voxels of a slab and
    for each of them; on_disk: of the folder."""

    in_memory: float
    fixed: float
    each_voxel: float
    on_disk: float

    @classmethod
    def of(cls, geometry: Geometry, sets: int, slices: int, symmetry: str, batch: int) -> Needs:
        """For so many half-sets and slices in all; batch: images at a time."""
        box, size = geometry.box, padded_size(geometry.box, geometry.padding)
        rows = geometry.rows()
        flushed = slices * len(turns_of_planes(symmetry)) / sets > ADDITIONS_PER_VOXEL / (2 * box / size + 1) ** 2
        # Sums (re, im, weight, one unused), a copy in double precision, results of the point group and of a step of it.
        each_voxel = 16.0 + (24 if flushed else 0) + (24 if len(symmetry_matrices(symmetry)) > 1 else 0)
        a_map, images = 4.0 * box**3, 40.0 * batch * box**2
        transforms = 8.0 * box**2 * (int(rows.radius) + 1) + 4 * a_map
        between = 2 * a_map * int(rows.radius) / box
        joined = 12.0 * rows.count + 4 * a_map if sets > 1 else 0.0
        in_memory = sets * each_voxel * rows.count + joined + transforms + images
        fixed = (32.0 * PAIRS_AT_ONCE + 48) * size**2 + images  # transforms of planes and rows, tables of rows
        return cls(in_memory, fixed, each_voxel, (4 if sets > 1 else 1) * a_map + between)


def slab_ends(geometry: Geometry, voxels_at_once: float) -> list[int] | None:
    """Planes at which to cut, so that slabs have about as many voxels, none more than that; None if a pair of planes has more."""
    pair_Z, pair = _pairs(geometry), largest_pair(geometry)
    if pair > voxels_at_once:
        return None
    upto_Z = pair_Z.cumsum(0)
    fewest = _cut(upto_Z, voxels_at_once)
    even = _cut(upto_Z, min(voxels_at_once, float(upto_Z[-1]) / (len(fewest) - 1) + pair))
    return even if len(even) == len(fewest) else fewest


def largest_pair(geometry: Geometry) -> int:
    """Voxels of the smallest slab there can be."""
    return int(_pairs(geometry).max())


def _pairs(geometry: Geometry) -> Tensor:
    """Voxels of the planes +z and -z together, for |z| below the radius."""
    rows = geometry.rows()
    plane_Z = rows.length_ZY.long().sum(1)[rows.half :][: int(rows.radius)]
    return plane_Z * torch.where(torch.arange(len(plane_Z)) > 0, 2, 1)


def _cut(upto_Z: Tensor, voxels_at_once: float) -> list[int]:
    """Ends of slabs as large as that allows. upto_Z: voxels of all planes up to |z|."""
    ends = [0]
    while ends[-1] < len(upto_Z):
        before = int(upto_Z[ends[-1] - 1]) if ends[-1] else 0
        ends.append(int(torch.searchsorted(upto_Z, before + int(voxels_at_once), right=True)))
    return ends

