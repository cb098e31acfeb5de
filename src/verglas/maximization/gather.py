"""From the posterior of a batch to sums: weighted slices into the volume, residuals, likelihoods (facts 3.6, 3.8, 3.10, 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.expectation.classes import runs_of
from verglas.expectation.images import NoiseSpectra, Prepared
from verglas.expectation.search import Posterior, Searcher, SearchSpace
from verglas.kernels.blocks import owner
from verglas.kernels.collect import collect
from verglas.kernels.spectra import spectra
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.sums import SSNR_FOR_SCALE, Sums


@dataclass(frozen=True)
class BatchFacts:
    """What a batch's particles bring along [B], on the device: old_offset_B2 (Å, whole pixels, applied), norm_B (as a multiple
    of the half-set's mean), scale_B and micrograph_B of their groups; group: number of the optics group."""

    old_offset_B2: Tensor
    norm_B: Tensor
    scale_B: Tensor
    micrograph_B: Tensor
    group: int

    def __getitem__(self, part: slice) -> BatchFacts:
        return BatchFacts(
            self.old_offset_B2[part], self.norm_B[part], self.scale_B[part], self.micrograph_B[part], self.group
        )  # fmt: skip


@dataclass(frozen=True)
class BatchResult:
    """New values of the particles of a batch, float64 on the device; see `verglas.refinement.state.Poses`."""

    rotation_B33: Tensor
    origin_B2: Tensor
    norm_B: Tensor
    log_likelihood_B: Tensor
    pmax_B: Tensor
    significant_B: Tensor
    entropy_B: Tensor
    class_B: Tensor
    gain_B: Tensor
    alignability_B: Tensor
    misfit_B: Tensor

    def to(self, device: torch.device | str) -> BatchResult:
        """The same in the memory of a device."""
        return BatchResult(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class WeightedSlices:
    """Weighted images summed slice by slice, ready for the volumes: data [U, 2, K], weight [U, K], poses [U, 3, 3]; class_U:
    class of each, ascending; index_U: fine index of each in the grid of all classes."""

    data_U2K: Tensor
    weight_UK: Tensor
    rotation_U33: Tensor
    coordinates_K3: Tensor
    class_U: Tensor
    index_U: Tensor

    def add_to(self, accumulators: list[Accumulator]) -> None:
        """Put the slices into the volumes of their classes."""
        starts = runs_of(self.class_U, len(accumulators)) if len(accumulators) > 1 else [0, len(self.data_U2K)]
        for accumulator, first, last in zip(accumulators, starts, starts[1:]):
            part = slice(first, last)
            accumulator.add(self.data_U2K[part], self.weight_UK[part], self.rotation_U33[part], self.coordinates_K3)


def weighted_slices(searcher: Searcher, prepared: Prepared, posterior: Posterior, common_S: Tensor) -> WeightedSlices:
    """The unmasked images, weighted by the posterior; in units of C X / sigma^2 and C^2 / sigma^2."""
    count, pixels = len(posterior.orientation_U), prepared.weight_BK.shape[1]
    dtype = prepared.weight_BK.dtype
    data_U2K = torch.zeros(count, 2, pixels, dtype=dtype, device=prepared.weight_BK.device)
    total_UK = torch.zeros(count, pixels, dtype=dtype, device=prepared.weight_BK.device)
    if count:
        images = searcher.shifted(prepared.mapped_B2K, searcher.space.offsets.fine_F2, lists=posterior.blocks)
        collect(posterior.weight_N, images, prepared.mapped_weight_BK, posterior.blocks, data_U2K, total_UK)
    inverse_K = (1 / common_S)[searcher.preparer.shell_K].to(dtype)
    grid = searcher.space.grid
    rotation_U33, class_U = grid.child_rotations(posterior.orientation_U), grid.class_of_child(posterior.orientation_U)
    data_U2K.mul_(inverse_K)
    return WeightedSlices(
        data_U2K, total_UK.mul_(inverse_K.square()), rotation_U33, searcher.preparer.coordinates_K3, class_U,
        posterior.orientation_U,
    )  # fmt: skip


def residual_spectra(searcher: Searcher, prepared: Prepared, posterior: Posterior, radius: int) -> tuple[Tensor, Tensor]:
    """(cross, power) [B, S] up to shell `radius`, float64, in units of sigma^2 (see kernels/spectra)."""
    blocks, shells = posterior.blocks, prepared.power_BS.shape[1]
    rows = posterior.table_rows_U[blocks.slice_N.long()].int()
    in_table = replace(blocks, slice_N=rows)
    images = searcher.shifted(prepared.scored_B2K, searcher.space.offsets.fine_F2, lists=blocks)
    sums = spectra(posterior.weight_N, images, prepared.weight_BK, posterior.table, in_table, searcher.preparer.shell_K, shells)
    inside_S = torch.arange(shells, device=prepared.power_BS.device) <= radius
    return sums[0].double() * inside_S, sums[1].double() * inside_S


def update_sums(
    sums: Sums, searcher: Searcher, prepared: Prepared, posterior: Posterior, facts: BatchFacts, spectra_of: NoiseSpectra,
    ssnr_CS: Tensor, update_norm: bool = True,
) -> BatchResult:  # fmt: skip
    """Add a batch to the sums of its half-set; returns the particles' new values. ssnr_CS: of the references.

    Nothing of it waits for the device.
    """
    radius, grid = searcher.preparer.grid.radius, searcher.space.grid
    cross_BS, power_BS = residual_spectra(searcher, prepared, posterior, radius)
    sigma2_S = spectra_of.sigma2_S.to(cross_BS)
    mass_B, mass_BC, offset2 = _add_hidden_variables(sums, searcher, posterior, facts)
    inside_S = torch.arange(len(sigma2_S), device=sigma2_S.device) <= radius
    seen_BS = prepared.power_BS * torch.where(inside_S, mass_B[:, None], 1.0)
    residual_BS = seen_BS - sigma2_S * (2 * cross_BS - power_BS)
    at_origin_BC = prepared.seen_B[:, None] * searcher.origin_C - prepared.origin_B[:, None]
    residual_BS[:, 0] = (mass_BC * at_origin_BC.square()).sum(1)
    sums.noise_GS[facts.group] += residual_BS.sum(0)
    sums.particles_G[facts.group] += mass_B.sum()
    misfit_B = misfit(residual_BS / sigma2_S, searcher)
    norm_B = facts.norm_B.to(residual_BS)
    if update_norm:
        own_B = residual_BS.sum(1) / searcher.preparer.field**2 + prepared.finer_B  # the image's own units and shells
        norm_B = norm_B * (2 * own_B.clamp_min(0)).sqrt()
    class_B = grid.class_of_child(posterior.best_orientation_B)
    _add_to_scales(sums, facts, cross_BS, power_BS, (ssnr_CS.to(sigma2_S) > SSNR_FOR_SCALE) * sigma2_S, class_B)
    log_likelihood_B = posterior.log_evidence_B - prepared.constant_B.double() - outside_power(prepared, radius)
    result = BatchResult(
        grid.child_rotations(posterior.best_orientation_B),
        facts.old_offset_B2.to(sigma2_S) + searcher.space.offsets.fine_F2.to(sigma2_S)[posterior.best_shift_B],
        norm_B, log_likelihood_B - log_normalisation(searcher, sigma2_S), posterior.pmax_B.double(),
        posterior.significant_B, posterior.entropy_B.double(), class_B, *quality(searcher.space, posterior), misfit_B,
    )  # fmt: skip
    totals = (offset2, mass_B.sum(), result.norm_B.sum(), result.log_likelihood_B.sum(), result.pmax_B.sum())
    sums.totals_5 += torch.stack(totals)
    sums.particles += len(result.norm_B)
    return result


def quality(space: SearchSpace, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """(gain_B, alignability_B), float64.

    gain: ln p(image | map) - ln p(image | noise alone), the likelihood averaged over all samples with their priors. Scores are
    log-likelihoods less that of noise alone. Priors are relative to their mean over the grid, except those of particles with
    orientations of their own, whose sum is 1.
    alignability: 1 - entropy / ln(number of samples of the whole grid): 0 if all poses are alike, 1 if one has all the weight.
    """
    grid, offsets = space.grid, len(space.offsets.fine_F2)
    orientations = grid.count * grid.children_per_orientation
    shared = orientations if len(space.log_prior_O) else grid.children_per_orientation
    gain_B = posterior.log_evidence_B.double() - math.log(shared * offsets)
    return gain_B, 1 - posterior.entropy_B.double() / max(math.log(orientations * offsets), 1e-9)


def misfit(residual_BS: Tensor, searcher: Searcher) -> Tensor:
    """Power of what the map leaves of the image, in units of the noise's, over the shells up to a tenth of the diameter [B].

    1 for a particle like the map, more for junk. residual_BS: in units of the variance sigma^2 of a component.
    """
    last = searcher.preparer.detail
    return residual_BS[:, 1 : last + 1].sum(1) / (2 * searcher.scored_S[1 : last + 1].sum()).clamp_min(1)


def _add_to_scales(
    sums: Sums, facts: BatchFacts, cross_BS: Tensor, power_BS: Tensor, strong_CS: Tensor, class_B: Tensor
) -> None:
    """Cross terms and powers to the sums of their micrograph groups: over the strong shells of each particle's best class.
    strong_CS: sigma^2 in strong shells, else 0."""
    scale_B = facts.scale_B.to(cross_BS)
    if len(strong_CS) == 1:
        cross_B, power_B = cross_BS @ strong_CS[0], power_BS @ strong_CS[0]
    else:
        strong_BS = strong_CS[class_B]
        cross_B, power_B = (cross_BS * strong_BS).sum(1), (power_BS * strong_BS).sum(1)
    sums.cross_M.index_add_(0, facts.micrograph_B, cross_B / scale_B)
    sums.power_M.index_add_(0, facts.micrograph_B, power_B / scale_B**2)


def _add_hidden_variables(
    sums: Sums, searcher: Searcher, posterior: Posterior, facts: BatchFacts
) -> tuple[Tensor, Tensor, Tensor]:
    """Add directions, weighted by the posterior; returns each particle's weight [B], a little below 1, the same by class [B, C],
    and the sum of w |d|^2."""
    space, blocks = searcher.space, posterior.blocks
    slice_weight_N, shift_weight_M = posterior.slice_weight_N, posterior.shift_weight_M
    owner_M = owner(blocks.shift_ptr_B1, len(blocks.shift_M))
    mass_B = torch.zeros(blocks.particles, dtype=torch.float64, device=owner_M.device).index_add_(0, owner_M, shift_weight_M)
    parent_U = torch.div(posterior.orientation_U, space.grid.children_per_orientation, rounding_mode="floor")
    slice_N = blocks.slice_N.long()
    direction_N = space.grid.direction_of(parent_U)[slice_N]
    sums.direction_D.index_add_(0, direction_N, slice_weight_N)
    offset_M2 = facts.old_offset_B2.to(shift_weight_M)[owner_M] + space.offsets.fine_F2.to(shift_weight_M)[blocks.shift_M.long()]
    offset2 = (shift_weight_M * offset_M2.square().sum(1)).sum()
    if space.grid.classes == 1:
        return mass_B, mass_B[:, None], offset2
    mass_BC = mass_B.new_zeros(blocks.particles * space.grid.classes)
    place_N = owner(blocks.slice_ptr_B1, len(slice_N)) * space.grid.classes + space.grid.class_of(parent_U)[slice_N]
    mass_BC.index_add_(0, place_N, slice_weight_N)
    return mass_B, mass_BC.view(blocks.particles, -1), offset2


def outside_power(prepared: Prepared, radius: int) -> Tensor:
    """Half the power beyond the current size [B]; added to the log-likelihood as RELION does, though without its sigma^2."""
    return 0.5 * prepared.power_BS[:, radius + 1 :].sum(1)


def log_normalisation(searcher: Searcher, sigma2_S: Tensor) -> Tensor:
    """sum of ln(2 pi sigma^2) over the scored coefficients of the half plane, the origin left out."""
    return (searcher.scored_S * torch.log(2 * torch.pi * sigma2_S)).sum()
