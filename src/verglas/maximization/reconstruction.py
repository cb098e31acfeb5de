"""The result of a reconstruction: maps, half maps and how far they can be trusted."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from verglas.core.masks import soft_sphere
from verglas.core.shells import fsc, last_shell_above, resolution_angstrom
from verglas.io.atomic import atomic_path
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.solve import SolvedSums, gather_sums, wiener_term

MASK_EDGE = 3  # px, raised cosine outside the sphere


@dataclass(frozen=True)
class Reconstruction:
    """Maps [N, N, N] in the grey values of the particles; half maps and curves only if the halves were kept apart.

    map_ZYX: data / weight of all particles (weighted least squares, no prior). wiener_ZYX: the same with the prior that
    the half maps imply. half_maps: weighted voxel by voxel by how well it was seen, fall-off as in map_ZYX.
    fsc_S, fsc_masked_S: correlation of the half maps, whole and within a soft sphere; ssnr_S: of all the particles,
    inside the sphere; coverage_S: share of each shell's voxels where the data outweigh the prior.
    """

    map_ZYX: Tensor
    pixel_size: float
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
        """True if the FSC never falls below 0.143: the pixel size, not the data, sets the resolution."""
        curve = self.fsc_masked_S if masked else self.fsc_S
        return curve is not None and last_shell_above(curve, 0.143) == len(curve) - 1

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


def solve(sums: list[Accumulator], symmetry: str, pixel_size: float, mask_ZYX: Tensor | None = None,
          mask_radius: float | None = None) -> Reconstruction:  # fmt: skip
    """Maps from one accumulator, or from two of independent halves (then with half maps, FSC, SSNR and Wiener map).

    mask_ZYX: where the FSC inside is taken, else a soft sphere of `mask_radius` px (default: N/2 - edge).
    The accumulators are used up.
    The prior comes from the FSC inside the mask: the empty corners of the box would make the signal look weaker.
    """
    box = sums[0].box
    if len(sums) == 1:
        return Reconstruction(gather_sums(sums, symmetry, consume=True).map(), pixel_size)
    halves = [gather_sums([half], symmetry, consume=True) for half in sums]
    whole = add(halves)
    radius = mask_radius or box / 2 - MASK_EDGE
    mask = soft_sphere(box, radius, MASK_EDGE, sums[0].rows.device) if mask_ZYX is None else mask_ZYX
    first = [half.map() for half in halves]
    inside_S = fsc(first[0] * mask, first[1] * mask)
    half_maps = tuple(half.map(wiener_term(inside_S, half.shell_weight(), joined=False), keep_scale=True) for half in halves)
    masked_S = fsc(half_maps[0] * mask, half_maps[1] * mask)
    prior_S = wiener_term(masked_S, whole.shell_weight(), joined=True)
    return Reconstruction(
        whole.map(), pixel_size, whole.map(prior_S), (half_maps[0], half_maps[1]), fsc(*half_maps), masked_S,
        whole.shell_weight() / prior_S, whole.coverage(prior_S),
    )  # fmt: skip


def add(halves: list[SolvedSums]) -> SolvedSums:
    """Sums of all halves together; Friedel partners and symmetry commute with the sum."""
    first, *others = halves
    data_V2, weight_V = first.data_V2.clone(), first.weight_V.clone()
    for other in others:
        data_V2 += other.data_V2
        weight_V += other.weight_V
    return SolvedSums(data_V2, weight_V, first.rows, first.box, first.radius, first.padding)


def frequency_S(reconstruction: Reconstruction) -> Tensor:
    """Spatial frequency of each shell in 1/Å, [N/2 + 1]."""
    return torch.arange(reconstruction.box // 2 + 1) / (reconstruction.box * reconstruction.pixel_size)
