"""Maps in a fraction of the memory that sums and transforms take: columns of the padded half volume, some at a time.

Where images are few beside voxels, going through them again costs less than room for all sums. The columns x0 <= x <= x1 of the
sums (`core.columns`) are made from the images, divided, and transformed back along y and z, which leaves N x N of each; a last
pass transforms along x. What the next columns share with these, one column, is carried over. In memory are one slab of sums (16
bytes a voxel) and N x N x columns complex numbers, and with exact gridding u = v w of all voxels (4 bytes; while it is iterated,
twice that and the transforms of a residue, `gridding`): the weights that it starts from come from a round of their own, and
those that it is divided by from the round that makes the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from verglas.core.columns import ColumnSlab
from verglas.core.symmetry import symmetry_matrices
from verglas.distributed.ranks import ALONE
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.gridding import LARGEST, even_out
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.solve import SolvedSums, add_friedel_partners, mean_gain, regularising, weight_floor
from verglas.maximization.transforms import MapPart
from verglas.projection.pruned import PaddedGrid
from verglas.projection.volume import padded_size, radius2

T = TypeVar("T")


@dataclass(frozen=True)
class ByColumns:
    """How maps are made. ends: slab i has the columns ends[i] <= x < ends[i + 1]; transforms: bytes granted to the transforms of
    exact gridding; at_once: columns that are transformed back together; on_host: maps go to the host's memory."""

    geometry: Geometry
    symmetry: str
    device: torch.device
    exact: bool
    ends: Sequence[int]
    transforms: float
    at_once: int
    on_host: bool


class ColumnAccumulator(Accumulator):
    """Sums of some columns alone. Slices are added at all poses of the point group."""

    def __init__(self, how: ByColumns, columns: tuple[int, int]) -> None:
        geometry = how.geometry
        super().__init__(geometry.box, geometry.radius, geometry.padding, how.device, columns=columns)
        self.turn_G33 = symmetry_matrices(how.symmetry)

    def add(self, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """As `Accumulator.add`."""
        before = self.slices
        for turn in self.turn_G33:
            super().add(data_R2K, weight_RK, rotation_R33 @ turn.to(rotation_R33), coordinates_K3)
        self.slices = before + len(data_R2K)

    def solved(self, carried_V3: Tensor | None) -> tuple[ColumnSums, Tensor]:
        """(The slab's sums; those of its last column, for the next slab). carried: of the slab before. The accumulator is used
        up."""
        assert self.slab is not None
        sums_V = self.total()
        if carried_V3 is not None:
            first_U = self.slab.first_column()
            sums_V[first_U, :3] = sums_V[first_U, :3] + carried_V3
        shared_V3 = sums_V[self.slab.last_column(), :3]
        if self.slab.first == 0:
            add_friedel_partners(sums_V, self.rows)
        found = ColumnSums(
            sums_V[:, :2], sums_V[:, 2], self.rows, self.box, self.radius, self.padding, slab=self.slab, slices=self.slices
        )
        return found, shared_V3


@dataclass(frozen=True)
class ColumnSums(SolvedSums):
    """`SolvedSums` of a slab of columns; its last column is left out of curves."""

    slab: ColumnSlab | None = None
    slices: int = 0

    @property
    def compiled(self) -> bool:
        """Those passes walk along whole rows."""
        return False

    def _radii(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        for part, _, coordinates, r2 in self._parts():
            yield part, coordinates, (r2.sqrt() / self.padding).clamp_max(self.radius), self._counts(coordinates, r2)

    def put(self, whole_V: Tensor, prior_S: Tensor) -> None:
        """Write weight + prior into the whole volume's voxels, 0 at and beyond the radius."""
        prior = prior_S.to(self.weight_V)
        for part, address, coordinates, r2 in self._parts():
            shell = ((r2.sqrt() / self.padding).clamp_max_(self.radius) + 0.5).long()
            whole_V[address] = torch.where(self._counts(coordinates, r2), self.weight_V[part] + prior[shell], 0).to(whole_V)

    def over(self, even_V: Tensor, prior_S: Tensor) -> SolvedSums:
        """The same data over (weight + prior) / u, in place: what they are divided by if u = v w makes the sampling even."""
        prior = prior_S.to(self.weight_V)
        for part, address, _, r2 in self._parts():
            shell = ((r2.sqrt() / self.padding).clamp_max_(self.radius) + 0.5).long()
            even = even_V[address].to(self.weight_V)
            weight = (self.weight_V[part] + prior[shell]) / even
            self.weight_V[part] = torch.where(even > 0, weight.clamp_min_(1 / LARGEST), 0)
        return self

    def _counts(self, coordinates: Tensor, r2: Tensor) -> Tensor:
        assert self.slab is not None
        return (r2 < self.rows.radius**2) & (coordinates[0] < self.slab.last)

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        assert self.slab is not None
        for part, address, coordinates in self.slab.parts():
            yield part, address, coordinates, radius2(coordinates)


class SumsByColumns:
    """Sums of one set of particles, made as they are needed; asked as `SolvedSums`.

    add_to: (accumulator, stage) -> adds all slices of the set; name: of the set.
    """

    def __init__(self, how: ByColumns, add_to: Callable[[Accumulator, str], None], name: str) -> None:
        self.how, self.name, self.slices, self._add_to = how, name, 0, add_to

    def each_slab(self, stage: str, work: Callable[[ColumnSums], T]) -> list[T]:
        """work(sums of a slab) of all slabs, one of which is in memory at a time."""
        found: list[T] = []
        carried_V3: Tensor | None = None
        ends = self.how.ends
        for number in range(1, len(ends)):
            sums = ColumnAccumulator(self.how, (ends[number - 1], ends[number]))
            self._add_to(sums, f"{stage} of {self.name}, slab {number} of {len(ends) - 1}")
            self.slices = sums.slices
            solved, carried_V3 = sums.solved(carried_V3)
            found.append(work(solved))
            del sums, solved  # before the next one is made
        return found

    @cached_property
    def shell_sums(self) -> tuple[Tensor, Tensor]:
        """(weight, voxels) of each shell, [2, S]: of shells floor(r / padding), then of shells round(r / padding)."""

        def measured(sums: ColumnSums) -> Tensor:
            return torch.stack([torch.stack(sums.shell_sums(rounding)[:2]) for rounding in (0.0, 0.5)], 1)

        total_2S, count_2S = torch.stack(self.each_slab("Weights", measured)).sum(0)
        return total_2S, count_2S

    def shell_weight(self) -> Tensor:
        """As `SolvedSums.shell_weight`."""
        total_2S, count_2S = self.shell_sums
        return total_2S[1] / count_2S[1].clamp_min(1)

    def coverage(self, inverse_tau2_S: Tensor) -> Tensor:
        """As `SolvedSums.coverage`."""
        found = self.each_slab("Coverage", lambda sums: sums.shell_sums(prior_S=inverse_tau2_S)[2])
        return torch.stack(found).sum(0) / self.shell_sums[1][1].clamp_min(1)

    def map(self, inverse_tau2_S: Tensor | None = None, keep_scale: bool = False) -> Tensor:
        """As `SolvedSums.map`."""
        how, geometry = self.how, self.how.geometry
        size, wanted = padded_size(geometry.box, geometry.padding), range(geometry.box)
        grid = PaddedGrid.of(geometry.rows(how.device), geometry.box, size)
        real_ZYX = grid.along_x(self._columns_back(grid, self._curves(inverse_tau2_S, keep_scale)))
        MapPart(real_ZYX, torch.arange(geometry.box, device=how.device), wanted).finish(size, True, ALONE)
        return real_ZYX.cpu() if how.on_host else real_ZYX

    def _columns_back(self, grid: PaddedGrid, curves_S: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """All columns divided and transformed back along y and z, complex [N, N, columns]; curves: (prior, floor, gain)."""
        how, (prior_S, floor_S, gain_S) = self.how, curves_S
        even_V = self._even(prior_S) if how.exact else None
        left_S = curves_S if even_V is None else (0 * prior_S, 0 * floor_S, gain_S)
        half_ZYX = torch.empty(grid.box, grid.box, grid.columns, dtype=torch.complex64, device=how.device)

        def back(sums: ColumnSums) -> None:
            assert sums.slab is not None
            fill = (sums if even_V is None else sums.over(even_V, prior_S))._fill(left_S, grid)
            end = min(sums.slab.last, grid.columns)
            for first in range(sums.slab.first, end, how.at_once):
                part = slice(first, min(first + how.at_once, end))
                filled_ZYX = grid.filled(fill, part, torch.float32)
                half_ZYX[:, :, part] = grid.along_z(grid.along_y(filled_ZYX, range(grid.box)))

        self.each_slab("Sums", back)
        return half_ZYX

    def _even(self, prior_S: Tensor) -> Tensor:
        """u = v w of all voxels, float32 [V]."""
        geometry = self.how.geometry
        whole = geometry.rows(self.how.device)
        even_V = torch.zeros(whole.count, device=self.how.device)
        self.each_slab("Weights", lambda sums: sums.put(even_V, prior_S))
        size = padded_size(geometry.box, geometry.padding)
        even_out(even_V, whole, size, size / geometry.box, granted=self.how.transforms)
        return even_V

    def _curves(self, inverse_tau2_S: Tensor | None, keep_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(prior, floor, gain), as `SolvedSums.map` has them."""
        if self.how.exact and inverse_tau2_S is None:
            nothing_S = torch.zeros(self.how.geometry.radius + 1, dtype=torch.float64, device=self.how.device)
            return nothing_S, nothing_S, nothing_S + 1
        floor_S = weight_floor(self.shell_sums[0][0], self.shell_sums[1][0])
        prior_S = regularising(inverse_tau2_S, floor_S)
        gain_S = torch.ones_like(floor_S)
        if keep_scale:
            gain_S = mean_gain(*torch.stack(self.each_slab("Gain", lambda sums: torch.stack(sums.gains(prior_S)))).sum(0))
        return prior_S, floor_S, gain_S

    def __add__(self, other: SumsByColumns) -> SumsByColumns:
        """Of both sets together."""

        def both(sums: Accumulator, stage: str) -> None:
            self._add_to(sums, f"{stage}, first half-set")
            other._add_to(sums, f"{stage}, second half-set")

        joined = SumsByColumns(self.how, both, "both half-sets")
        mine, its = self.shell_sums, other.shell_sums
        joined.shell_sums = mine[0] + its[0], mine[1]  # Friedel partners and symmetry commute with the sum
        joined.slices = self.slices + other.slices
        return joined
