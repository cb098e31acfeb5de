"""One map at a time in little more memory than its packed voxels: data and weights apart, one after the other where they can be.

Of V voxels of the packed half volume are kept

    plain   12 V: data and weights; data are divided in place, weights given up, and 8 V transformed back
    exact   4 V of weights w, from a first round over all slices; u = v w and the transforms of a residue while they are made even
            (`gridding`), 4 V or, with what was convolved, 8 V, and 4 V more if w is not made anew afterwards; 4 V of w / u, what
            data are to be divided by; then 8 V of data more, from a last round

and beside them N x N x columns complex numbers while they are transformed, and slices that wait to be added (`round_choice`).
Weights need no images: they depend on poses and CTFs alone. Maps of two half-sets are made one after the other, all of them anew,
and lie in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from verglas.distributed.ranks import ALONE
from verglas.maximization.apart import ApartSums, Curves, add_prior, divide
from verglas.maximization.gridding import LARGEST, even_out
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.solve import SolvedSums, mean_gain, regularising, weight_floor
from verglas.maximization.transforms import MapPart
from verglas.projection.pruned import PaddedGrid, map_of
from verglas.projection.volume import padded_size

QUOTIENTS_AT_ONCE = 2**22  # voxels


@dataclass(frozen=True)
class InRounds:
    """How maps are made. waiting, waiting_weights: slices that wait, of data (and weights), and of weights alone; transforms:
    bytes granted to those of exact gridding; remade: weights are given up meanwhile, and made anew; numbers: between the axes of
    a transform back; on_host: maps go to the host's memory."""

    geometry: Geometry
    symmetry: str
    device: torch.device
    exact: bool
    waiting: int
    waiting_weights: int
    transforms: float
    remade: bool
    numbers: int
    on_host: bool


class SumsInRounds:
    """Sums of one set of particles, made as they are needed; asked as `SolvedSums`.

    add_to: (sums, stage, whether weights alone are wanted) -> adds all slices of the set; name: of the set.
    """

    def __init__(self, how: InRounds, add_to: Callable[[ApartSums, str, bool], None], name: str) -> None:
        self.how, self.name, self.slices, self._add_to = how, name, 0, add_to

    @cached_property
    def shell_sums(self) -> tuple[Tensor, Tensor]:
        """(weight, voxels) of each shell, [2, S]: of shells floor(r / padding), then of shells round(r / padding)."""
        return measured(self._round("Weights", data=False))

    def shell_weight(self) -> Tensor:
        """As `SolvedSums.shell_weight`."""
        total_2S, count_2S = self.shell_sums
        return total_2S[1] / count_2S[1].clamp_min(1)

    def coverage(self, inverse_tau2_S: Tensor) -> Tensor:
        """As `SolvedSums.coverage`."""
        return self._round("Coverage", data=False).coverage(inverse_tau2_S)

    def map(self, inverse_tau2_S: Tensor | None = None, keep_scale: bool = False) -> Tensor:
        """As `SolvedSums.map`."""
        geometry, device = self.how.geometry, self.how.device
        sums = (self._evened if self.how.exact else self._both)(inverse_tau2_S, keep_scale)
        rows, data_V2, dtype = sums.rows, sums.data_V2, sums.data_V2.dtype
        del sums  # the weights
        size = padded_size(geometry.box, geometry.padding)
        grid = PaddedGrid.of(rows, geometry.box, size)
        real_ZYX = map_of(grid.filler(data_V2, rows), grid, dtype, numbers=self.how.numbers)
        del data_V2
        MapPart(real_ZYX, torch.arange(geometry.box, device=device), range(geometry.box)).finish(size, True, ALONE)
        return real_ZYX.cpu() if self.how.on_host else real_ZYX

    def _both(self, inverse_tau2_S: Tensor | None, keep_scale: bool) -> SolvedSums:
        """Data over weights."""
        sums = self._round("Sums", data=True)
        if "shell_sums" not in self.__dict__:
            self.shell_sums = measured(sums)
        divide(sums, self._curves(sums, inverse_tau2_S, keep_scale))
        return sums

    def _evened(self, inverse_tau2_S: Tensor | None, keep_scale: bool) -> SolvedSums:
        """Data times weights that make the sampling even."""
        sums = self._round("Weights", data=False)
        if inverse_tau2_S is not None and "shell_sums" not in self.__dict__:
            self.shell_sums = measured(sums)
        prior_S, floor_S, gain_S = self._curves(sums, inverse_tau2_S, keep_scale)
        add_prior(sums, prior_S)
        even_V = sums.weight_V if self.how.remade else sums.weight_V.clone()
        size = padded_size(self.how.geometry.box, self.how.geometry.padding)
        even_out(even_V, sums.rows, size, sums.padding, granted=self.how.transforms)
        if self.how.remade:
            del sums
            sums = self._round("Weights again", data=False)
            add_prior(sums, prior_S)
        weight_V = divisor(sums.weight_V, even_V)
        del sums, even_V
        data = self._round("Data", data=True, weight_V=weight_V)
        divide(data, (0 * prior_S, 0 * floor_S, gain_S))
        return data

    def _curves(self, sums: SolvedSums, inverse_tau2_S: Tensor | None, keep_scale: bool) -> Curves:
        if self.how.exact and inverse_tau2_S is None:
            nothing_S = torch.zeros(self.how.geometry.radius + 1, dtype=torch.float64, device=self.how.device)
            return nothing_S, nothing_S, nothing_S + 1
        floor_S = weight_floor(self.shell_sums[0][0], self.shell_sums[1][0])
        prior_S = regularising(inverse_tau2_S, floor_S)
        gain_S = mean_gain(*sums.gains(prior_S)) if keep_scale else torch.ones_like(floor_S)
        return prior_S, floor_S, gain_S

    def _round(self, stage: str, data: bool, weight_V: Tensor | None = None) -> SolvedSums:
        """All slices added: weights alone, data alone (the weights being given), or both."""
        how, both = self.how, data and weight_V is None
        most = how.waiting if data else how.waiting_weights
        sums = ApartSums(how.geometry, how.symmetry, how.device, data, both or not data, most)
        self._add_to(sums, f"{stage} of {self.name}", not data)
        self.slices = sums.slices
        return sums.solved(weight_V)

    def __add__(self, other: SumsInRounds) -> SumsInRounds:
        """Of both sets together."""

        def both(sums: ApartSums, stage: str, blank: bool) -> None:
            self._add_to(sums, f"{stage}, first half-set", blank)
            other._add_to(sums, f"{stage}, second half-set", blank)

        joined = SumsInRounds(self.how, both, "both half-sets")
        mine, its = self.shell_sums, other.shell_sums
        joined.shell_sums = mine[0] + its[0], mine[1]  # Friedel partners and symmetry commute with the sum
        joined.slices = self.slices + other.slices
        return joined


def divisor(weight_V: Tensor, even_V: Tensor) -> Tensor:
    """Weights w, 0 at and beyond the radius, made w / u in place: what data are divided by, u = v w as in `gridding`."""
    for weight, even in zip(weight_V.split(QUOTIENTS_AT_ONCE), even_V.split(QUOTIENTS_AT_ONCE), strict=True):
        quotient = (weight / even).clamp_min_(1 / LARGEST)
        weight.copy_(torch.where(even > 0, quotient, 0))
    return weight_V


def measured(sums: SolvedSums) -> tuple[Tensor, Tensor]:
    """As `SumsInRounds.shell_sums`."""
    both = [torch.stack(sums.shell_sums(rounding)[:2]) for rounding in (0.0, 0.5)]
    total_2S, count_2S = torch.stack(both, 1)
    return total_2S, count_2S
