"""From weighted sums to a map: Friedel partners, point group, weight floor, optional Wiener term, transform back.

The order and the constants are RELION's default ("skip gridding") path (facts 4.2, 4.3, 4.6), or with `exact` those of its other
one, that iterates the weights (`gridding`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.distributed.ranks import ALONE
from verglas.kernels import voxels
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.gridding import LARGEST, even_out
from verglas.maximization.point_group import apply_in_planes, apply_point_group
from verglas.maximization.shells import serves, shell_sums_cuda
from verglas.maximization.slabs import Slabs, stays_in_planes
from verglas.maximization.transform_probes import form_for
from verglas.maximization.transforms import MapPart, SharedTransform, beyond_sphere, extent_along_y
from verglas.projection.axes import Sums
from verglas.projection.pruned import Fill, PaddedGrid, map_of
from verglas.projection.volume import coordinate_chunks, padded_size, radius2

WEIGHT_FLOOR = 1e-3  # of the mean weight of the shell: below this a voxel was hardly seen
FIRST_REGULARISED_SHELL = 5


@dataclass(frozen=True)
class SolvedSums:
    """Symmetrised sums of one set of particles. data [V, 2], weight [V] on `rows`; shells in image frequencies.

    slabs: where ranks share them, `rows` are this one's; curves and maps are then of all, and asked for by all.
    exact: data are multiplied by weights that make the sampling even (`gridding.even_out`), not divided by the sums'.
    """

    data_V2: Tensor
    weight_V: Tensor
    rows: RowTable
    box: int
    radius: int
    padding: float
    slabs: Slabs | None = None
    exact: bool = False

    @property
    def compiled(self) -> bool:
        """Whether passes over voxels are those of `kernels.voxels`."""
        return voxels.compiled(self.weight_V)

    @property
    def device(self) -> torch.device:
        return self.weight_V.device

    def some(self, part: slice | Tensor) -> Tensor:
        """(re, im, weight) of a run of voxels, or of those of these numbers, [n, 3]."""
        return torch.cat([self.data_V2[part], self.weight_V[part][:, None]], 1)

    def set(self, part: slice | Tensor, values_V3: Tensor) -> None:
        """Replace a run of voxels, or those of these numbers."""
        self.data_V2[part], self.weight_V[part] = values_V3[:, :2], values_V3[:, 2]

    def shell_weight(self) -> Tensor:
        """Mean weight over the voxels of each shell round(r / padding), float64 [radius + 1]."""
        total_S, count_S, _ = self.shell_sums()
        return total_S / count_S.clamp_min(1)

    def coverage(self, inverse_tau2_S: Tensor) -> Tensor:
        """Share of voxels of each shell where the data weigh at least as much as the prior, float64 [radius + 1]."""
        _, count_S, covered_S = self.shell_sums(prior_S=inverse_tau2_S)
        return covered_S / count_S.clamp_min(1)

    def map(
        self, inverse_tau2_S: Tensor | None = None, keep_scale: bool = False, support_ZYX: Tensor | None = None
    ) -> Tensor:
        """Map [N, N, N]: data / (weight + 1/tau2), the weight never under a thousandth of its shell's mean.

        inverse_tau2_S: in units of the weight, per shell (from `wiener_term`), added from shell 5 on; None for none.
        Voxels at the very radius are left out; RELION divides them without a prior, which puts noise into the last shells.
        keep_scale: divide each shell by its mean weight / (weight + 1/tau2): voxels are then weighted by how well they
        were seen, but the fall-off of the map with resolution is that of the unregularised one (for half maps).
        support_ZYX: bool, the voxels that are wanted, if ranks share the map: the others are 0 then.
        """
        curves_S = self._curves(inverse_tau2_S, keep_scale)
        prior_S, floor_S, gain_S = curves_S
        if self.slabs is not None:
            return self._map_of_all(self.slabs, curves_S, support_ZYX)
        size = padded_size(self.box, self.padding)
        sums, curves_S = (self._evened(prior_S, size), (0 * prior_S, 0 * floor_S, gain_S)) if self.exact else (self, curves_S)
        grid = PaddedGrid.of(self.rows, self.box, size)
        return _finished(sums._fill(curves_S, grid), grid, self.weight_V.dtype)

    def quotients(self, inverse_tau2_S: Tensor) -> Tensor:
        """What `map` transforms: packed voxels [V, 2] of data / (weight + 1/tau2). Of sums that are whole."""
        grid = PaddedGrid.of(self.rows, self.box, padded_size(self.box, self.padding))
        fill, out_V2 = self._fill(self._curves(inverse_tau2_S), grid), torch.zeros_like(self.data_V2)
        for part in grid.column_runs():
            grid.take(grid.filled(fill, part, self.weight_V.dtype), part.start, self.rows, out_V2)
        return out_V2

    def _curves(self, inverse_tau2_S: Tensor | None, keep_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(prior, least weight, gain) of each shell: what data are divided by."""
        floor_S = weight_floor(*self.shell_sums(rounding=0.0)[:2])
        prior_S = regularising(inverse_tau2_S, floor_S)
        gain_S = torch.ones_like(floor_S)
        if keep_scale:
            gain_S = mean_gain(*self.gains(prior_S))
        return prior_S, floor_S, gain_S

    def _evened(self, prior_S: Tensor, size: int) -> SolvedSums:
        """The same data over weights whose inverse makes the sampling even: of the sums' weight and the prior."""
        found_V = torch.empty_like(self.weight_V, memory_format=torch.contiguous_format)
        for part, weight in self._with_prior(prior_S):
            found_V[part] = weight
        even_out(found_V, self.rows, size, self.padding)
        for part, weight in self._with_prior(prior_S):
            found_V[part] = torch.where(found_V[part] > 0, (weight / found_V[part]).clamp_min_(1 / LARGEST), 0)
        return replace(self, weight_V=found_V)

    def _with_prior(self, prior_S: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Runs of voxels: where they lie, and weight + prior, 0 at and beyond the radius."""
        prior = prior_S.to(self.weight_V)
        for part, _, r, inside in self._radii():
            yield part, torch.where(inside, self.weight_V[part] + prior[(r + 0.5).long()], 0)

    def _map_of_all(self, slabs: Slabs, curves_S: tuple[Tensor, Tensor, Tensor], support_ZYX: Tensor | None) -> Tensor:
        """The map that all ranks work on, of the rows y that are wanted. Corners are filled if any of them is."""
        filled = support_ZYX is None or beyond_sphere(support_ZYX)
        wanted = range(self.box) if support_ZYX is None or filled else extent_along_y(support_ZYX)
        size = padded_size(self.box, self.padding)
        form = form_for(slabs, self.box, size, len(wanted), self.weight_V.element_size())
        shared = SharedTransform(slabs, self.box, size, form)
        part = shared.to_map(self._fill(curves_S, shared.grid()), self.weight_V.dtype, wanted)
        part = replace(part, values_ZYX=part.values_ZYX.float())
        part.finish(size, filled, ALONE if form == "replicated" else slabs.ranks)
        return shared.whole(part, wanted, support_ZYX)

    def _fill(self, curves_S: tuple[Tensor, Tensor, Tensor], grid: PaddedGrid) -> Fill:
        """What writes data / (max(weight + prior, floor) gain) into a transform of zeros; curves: (prior, floor, gain)."""
        place_E = torch.full((self.rows.edge,), -1)
        place_E[grid.on_host + self.rows.half] = torch.arange(len(grid.plane_Z))

        def fill(fourier_ZYX2: Tensor, first: int) -> None:
            if self.compiled:
                sums = self.data_V2, self.weight_V, self.rows, self.padding
                voxels.divide_cpu(*sums, curves_S, fourier_ZYX2, place_E, first)
                return
            y_Y, address, r2 = grid.addresses(self.rows, range(first, first + fourier_ZYX2.shape[2]))
            inside = r2 < self.rows.radius**2
            address = torch.where(inside, address, 0)
            prior_S, floor_S, gain_S = (curve.to(self.weight_V) for curve in curves_S)
            r = (r2.float().sqrt_() / self.padding).clamp_max_(self.radius)
            shell = (r + 0.5).long()
            weight = torch.maximum(self.weight_V[address] + prior_S[shell], floor_S[r.long()])
            scale = torch.where(inside & (weight > 0), 1 / (weight * gain_S[shell]).clamp_min(1e-30), 0)
            fourier_ZYX2[:, y_Y % grid.size] = self.data_V2[address] * scale[..., None]

        return Fill(fill, Sums(self.data_V2, self.rows, self.weight_V, curves_S, self.padding))

    def shell_sums(self, rounding: float = 0.5, prior_S: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the weight, voxels, and voxels with weight >= prior of each shell floor(r / padding + rounding)."""
        shells = self.radius + 1
        if self.compiled:
            return self.of_all(voxels.shell_sums_cpu(self.weight_V, self.rows, self.padding, shells, rounding, prior_S))
        if serves(self.weight_V):
            return self.of_all(shell_sums_cuda(self.weight_V, self.rows, self.padding, shells, rounding, prior_S))
        total, count, covered = torch.zeros(3, shells, dtype=torch.float64, device=self.weight_V.device)
        prior = torch.zeros_like(total) if prior_S is None else prior_S.to(total)
        for part, _, r, inside in self._radii():
            shell = (r + rounding).long()
            weight = self.weight_V[part].double()
            total += torch.bincount(shell, torch.where(inside, weight, 0), shells)
            count += torch.bincount(shell, inside.double(), shells)
            covered += torch.bincount(shell, (inside & (weight >= prior[shell])).double(), shells)
        return self.of_all((total, count, covered))

    def of_all(self, curves: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Sums per shell of all ranks' planes."""
        if self.slabs is None:
            return curves
        first, second, third = self.slabs.ranks.add_up(torch.stack(curves), "curves")
        return first, second, third

    def gains(self, prior_S: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of weight / (weight + prior), and voxels, of each shell round(r / padding), float64 [radius + 1]."""
        if serves(self.weight_V):
            found = shell_sums_cuda(self.weight_V, self.rows, self.padding, self.radius + 1, 0.5, prior_S, gains=True)
            return self.of_all(found)[:2]
        total = torch.zeros(self.radius + 1, dtype=torch.float64, device=self.weight_V.device)
        count = torch.zeros_like(total)
        for part, _, r, inside in self._radii():
            shell, weight = (r + 0.5).long(), self.weight_V[part]
            gain = weight / (weight + prior_S.to(weight)[shell]).clamp_min(1e-30)
            total += torch.bincount(shell, torch.where(inside, gain, 0).double(), len(total))
            count += torch.bincount(shell, inside.double(), len(total))
        total, count, _ = self.of_all((total, count, count))
        return total, count

    def _radii(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Runs of voxels: where they lie, (x, y, z), r / padding (no more than the radius), whether within the radius."""
        for part, coordinates in coordinate_chunks(self.rows):
            r2 = radius2(coordinates)
            yield part, coordinates, (r2.sqrt() / self.padding).clamp_max(self.radius), r2 < self.rows.radius**2


def map_of_quotients(values_V2: Tensor, rows: RowTable, box: int, padding: float) -> Tensor:
    """The map of `SolvedSums.quotients`."""
    grid = PaddedGrid.of(rows, box, padded_size(box, padding))
    return _finished(grid.filler(values_V2, rows), grid, values_V2.dtype)


def _finished(fill: Fill, grid: PaddedGrid, dtype: torch.dtype) -> Tensor:
    """The map [N, N, N], float32, of what `fill` writes."""
    real = map_of(fill, grid, dtype).float()
    MapPart(real, torch.arange(grid.box, device=real.device), range(grid.box)).finish(grid.size, True, ALONE)
    return real


def weight_floor(total_S: Tensor, count_S: Tensor) -> Tensor:
    """A thousandth of the mean weight of the voxels with floor(r / padding) = shell; the last repeats its neighbour."""
    floor_S = WEIGHT_FLOOR * total_S / count_S.clamp_min(1)
    floor_S[-1] = floor_S[-2]
    return floor_S


def regularising(inverse_tau2_S: Tensor | None, like_S: Tensor) -> Tensor:
    """What is added to the weights: 1/tau2 from shell 5 on, 0 before and without a prior."""
    prior_S = torch.zeros_like(like_S) if inverse_tau2_S is None else inverse_tau2_S.to(like_S)
    return torch.where(torch.arange(len(prior_S), device=prior_S.device) >= FIRST_REGULARISED_SHELL, prior_S, 0)


def mean_gain(total_S: Tensor, count_S: Tensor) -> Tensor:
    """Of each shell; never 0, as maps are divided by it."""
    return (total_S / count_S.clamp_min(1)).clamp_min(1e-12)


def gather_sums(accumulators: list[Accumulator], symmetry: str = "C1", consume: bool = False) -> SolvedSums:
    """Sum of accumulators of one geometry, with Friedel partners added on x = 0 and the point group applied.

    Both are sums, not averages, in data and weight alike, so quotients keep their scale. consume: in the first accumulator's own
    memory, which is used up (`Accumulator.used_up`); C and D groups then take no other.
    """
    first = accumulators[0]
    if any(a.settled_V3 is not None for a in accumulators):
        first.flush()  # one that was flushed is in float64: the sum must be, too, until it is used up
    sums = first.used_up() if consume else first.total().clone()
    for other in accumulators[1:]:
        sums[:, :3] += other.total()[:, :3]
    add_friedel_partners(sums, first.rows)
    slabs = first.slabs
    if stays_in_planes(symmetry):
        apply_in_planes(sums, first.rows, symmetry)
    elif slabs is None:
        sums = apply_point_group(sums, first.rows, symmetry)
    else:
        sums = slabs.cut(apply_point_group(slabs.joined(sums[:, :3]), slabs.whole, symmetry))
    return SolvedSums(sums[:, :2], sums[:, 2], first.rows, first.box, first.radius, first.padding, slabs)


def add_friedel_partners(sums_V: Tensor, rows: RowTable) -> None:
    """On the plane x = 0, kept whole, give (0, y, z) and (0, -y, -z) their common sum (data conjugated), in place.

    The origin, its own partner, counts once.
    """
    start = rows.start_ZY[rows.length_ZY > 0].long()
    partner = rows.start_ZY.flip(0, 1)[rows.length_ZY > 0].long()
    conjugate = sums_V.new_tensor([1.0, -1.0, 1.0])
    sums_V[start, :3] = sums_V[start, :3] + sums_V[partner, :3] * conjugate
    if int(rows.length_ZY[rows.half, rows.half]) > 0:
        sums_V[rows.start_ZY[rows.half, rows.half], :3] /= 2


def wiener_term(fsc_S: Tensor, shell_weight_S: Tensor, joined: bool) -> Tensor:
    """1 / tau^2 per shell in units of the weight, from the correlation of half maps (facts 4.3).

    SSNR = F / (1 - F) of one half, or with F = 2 FSC / (1 + FSC) of both joined (sqrt of it is the correlation of the
    full map with the truth, Rosenthal & Henderson 2003, eq. 15, whose SSNR is 2 FSC / (1 - FSC)).
    """
    f = fsc_S[: len(shell_weight_S)].to(shell_weight_S).clamp(1e-3, 0.999)
    ssnr = (2.0 if joined else 1.0) * f / (1 - f)
    return shell_weight_S / ssnr
