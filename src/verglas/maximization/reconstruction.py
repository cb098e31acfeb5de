"""The result of a reconstruction: maps, half maps and how far they can be trusted."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from verglas.core.masks import soft_sphere
from verglas.core.shells import fsc, last_shell_above, resolution_angstrom
from verglas.io.atomic import atomic_path
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.least_squares import NormalEquations, NormalSums
from verglas.maximization.solve import SolvedSums, gather_sums, wiener_term

M = TypeVar("M")  # a map: a tensor or a file
Made = TypeVar("Made", covariant=True)
MASK_EDGE = 3  # px, raised cosine outside the sphere


@dataclass(frozen=True)
class Reconstruction:
    """Maps [N, N, N] in the grey values of the particles; half maps and curves only if the halves were kept apart.

    map_ZYX: data / weight of all particles (weighted least squares, no prior). wiener_ZYX: the same with the prior that
    the half maps imply. half_maps: weighted voxel by voxel by how well it was seen, fall-off as in map_ZYX.
    fsc_S, fsc_masked_S: correlation of the half maps, whole and within a soft sphere; ssnr_S: of all the particles,
    inside the sphere; coverage_S: share of each shell's voxels where the data outweigh the prior. radius: the last shell
    that was reconstructed; the curves are 0 beyond it.
    """

    map_ZYX: Tensor
    pixel_size: float
    radius: int
    wiener_ZYX: Tensor | None = None
    half_maps: tuple[Tensor, Tensor] | None = None
    fsc_S: Tensor | None = None
    fsc_masked_S: Tensor | None = None
    ssnr_S: Tensor | None = None
    coverage_S: Tensor | None = None

    @property
    def box(self) -> int:
        return self.map_ZYX.shape[0]

    def resolution(self, threshold: float = 0.143, masked: bool = False) -> float:
        """Å, of the last shell before the FSC falls below `threshold`."""
        curve = self.fsc_masked_S if masked else self.fsc_S
        assert curve is not None, "there are no half maps"
        return resolution_angstrom(curve, self.box, self.pixel_size, threshold)

    def reaches_last_shell(self, masked: bool = False) -> bool:
        """True if the FSC stays above 0.143 as far as was reconstructed: not the data but the limit sets the resolution."""
        curve = self.fsc_masked_S if masked else self.fsc_S
        return curve is not None and last_shell_above(curve, 0.143) >= self.radius

    def save_curves(self, path: Path) -> None:
        """fsc.csv: one row a shell; resolution in Å (empty for shell 0), no other units."""
        curves = (self.fsc_S, self.fsc_masked_S, self.ssnr_S, self.coverage_S)
        assert all(curve is not None for curve in curves)
        with atomic_path(path, overwrite=True) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["shell", "resolution_angstrom", "fsc_unmasked", "fsc_masked", "ssnr", "coverage"])
            for shell in range(self.box // 2 + 1):
                resolution = f"{self.box * self.pixel_size / shell:.4f}" if shell else ""
                values = [f"{float(c[shell]):.6g}" if shell < len(c) else "" for c in curves if c is not None]
                writer.writerow([shell, resolution, *values])


class Solvable(Protocol[Made]):
    """What maps are made of: `SolvedSums`, `NormalEquations`, or sums that are never in memory whole (`out_of_core`)."""

    def map(self, inverse_tau2_S: Tensor | None = None, keep_scale: bool = False) -> Made:
        """As `SolvedSums.map`."""

    def shell_weight(self) -> Tensor:
        """As `SolvedSums.shell_weight`."""

    def coverage(self, inverse_tau2_S: Tensor) -> Tensor:
        """As `SolvedSums.coverage`."""


def solve(sums: Sequence[Accumulator | NormalSums], symmetry: str, pixel_size: float, mask_ZYX: Tensor | None = None,
          mask_radius: float | None = None, exact: bool = False) -> Reconstruction:  # fmt: skip
    """Maps from one accumulator, or from two of independent halves (then with half maps, FSC, SSNR and Wiener map).

    mask_ZYX: where the FSC inside is taken, else a soft sphere of `mask_radius` px (default: N/2 - edge).
    The accumulators are used up. exact: gridding weights are iterated (`gridding`).
    The prior comes from the FSC inside the mask: the empty corners of the box would make the signal look weaker.
    """
    box, radius = sums[0].box, sums[0].radius
    if len(sums) == 1:
        return Reconstruction(gathered(sums[0], symmetry, exact).map(), pixel_size, radius)
    first, second = (gathered(half, symmetry, exact) for half in sums)
    mask = mask_ZYX
    if mask is None:
        mask = soft_sphere(box, mask_radius or box / 2 - MASK_EDGE, MASK_EDGE)

    def correlate(one_ZYX: Tensor, other_ZYX: Tensor, masked: bool) -> Tensor:
        inside = mask.to(one_ZYX.device) if masked else 1
        return within(fsc(one_ZYX * inside, other_ZYX * inside), radius)

    return solve_halves((first, second), joined([first, second]), (pixel_size, radius), correlate, lambda found_ZYX: found_ZYX)


def solve_halves(
    halves: tuple[Solvable[M], Solvable[M]], whole: Solvable[M], scale: tuple[float, int],
    correlate: Callable[[M, M, bool], Tensor], opened: Callable[[M], Tensor],
) -> Reconstruction:  # fmt: skip
    """Maps and curves from the sums of two halves and of both together.

    scale: (pixel size in Å, radius); correlate: (map, map, in the mask) -> FSC; opened: the grey values of a map.
    """
    first, second = halves
    inside_S = correlate(first.map(), second.map(), True)
    half_maps = (
        first.map(wiener_term(inside_S, first.shell_weight(), joined=False), keep_scale=True),
        second.map(wiener_term(inside_S, second.shell_weight(), joined=False), keep_scale=True),
    )
    masked_S = correlate(*half_maps, True)
    prior_S = wiener_term(masked_S, whole.shell_weight(), joined=True)
    return Reconstruction(
        opened(whole.map()), *scale, opened(whole.map(prior_S)), (opened(half_maps[0]), opened(half_maps[1])),
        correlate(*half_maps, False), masked_S, whole.shell_weight() / prior_S, whole.coverage(prior_S),
    )  # fmt: skip


def gathered(sums: Accumulator | NormalSums, symmetry: str, exact: bool) -> SolvedSums | NormalEquations:
    """What maps are made of; `sums` are used up."""
    if isinstance(sums, NormalSums):
        return sums.normal()
    return replace(gather_sums([sums], symmetry, consume=True), exact=exact)


def joined(halves: list[SolvedSums | NormalEquations]) -> SolvedSums | NormalEquations:
    """Both halves together."""
    first, second = halves
    if isinstance(first, NormalEquations) and isinstance(second, NormalEquations):
        return first + second
    return add([half for half in halves if isinstance(half, SolvedSums)])


def within(curve_S: Tensor, radius: int) -> Tensor:
    """The curve with 0 beyond `radius`: what maps hold there is leakage of masks and corrections in real space."""
    return torch.where(torch.arange(len(curve_S), device=curve_S.device) <= radius, curve_S, 0)


def add(halves: list[SolvedSums]) -> SolvedSums:
    """Sums of all halves together; Friedel partners and symmetry commute with the sum."""
    first, *others = halves
    data_V2, weight_V = first.data_V2.clone(), first.weight_V.clone()
    for other in others:
        data_V2 += other.data_V2
        weight_V += other.weight_V
    return replace(first, data_V2=data_V2, weight_V=weight_V)


def frequency_S(reconstruction: Reconstruction) -> Tensor:
    """Spatial frequency of each shell in 1/Å, [N/2 + 1]."""
    return torch.arange(reconstruction.box // 2 + 1) / (reconstruction.box * reconstruction.pixel_size)
