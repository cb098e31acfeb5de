"""The expectation of one batch: coarse search, significant samples, their children, posterior (RELION facts 3.3-3.6).

Scores are natural logarithms. The samples of a particle are pairs of an orientation and a shift; the coarse pass is one
matrix product of all shifted images with all orientations (or, in local searches, with each particle's own), the fine pass
compares only the children of coarse samples that hold `fraction` of the posterior mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.expectation.images import ImagePreparer, Prepared
from verglas.expectation.ragged import Samples, children, factorise, owner
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.expectation.slices import FineSlices, Slicer
from verglas.kernels.admit import admit
from verglas.kernels.blocks import Blocks
from verglas.kernels.compare import compare
from verglas.kernels.shift import shift
from verglas.kernels.significant import Significance, chosen, significant


@dataclass(frozen=True)
class Local:
    """Each particle's own orientations (CSR) with their log prior: local searches."""

    ptr_B1: Tensor
    orientation_N: Tensor
    log_prior_N: Tensor


@dataclass(frozen=True)
class SearchSpace:
    """Grids and priors. log_prior_O: log of the prior of every coarse orientation, relative to its mean.

    offset_sigma: Å; fraction: of the posterior mass that significant samples hold; operand: dtype of the factors of
    matrix products (float16 on a GPU, else the precision of the images). correlate: score by the correlation coefficient and
    keep the best sample alone, for a reference whose grey scale is not the data's (facts 3.4, CC mode).
    relion_offset_prior: count offsets in the prior as RELION does, px and Å mixed (facts 3.5); for comparisons only.
    """

    grid: OrientationGrid
    offsets: OffsetGrid
    log_prior_O: Tensor
    offset_sigma: float
    fraction: float
    operand: torch.dtype
    correlate: bool = False
    relion_offset_prior: bool = False


@dataclass(frozen=True)
class Posterior:
    """Fine posterior of a batch. blocks: per particle its kept children x shifts; slice_N points into orientation_U.

    orientation_U: fine orientations in use [U]; table_rows_U: their rows in `table`; weight_N: posterior weight of each
    sample of the blocks, 0 for those not kept. best_orientation_B, best_shift_B: fine indices of the largest weight;
    log_evidence_B: log sum of prior x likelihood, without the constant of the image; pmax_B, entropy_B (nats);
    significant_B: number of coarse samples.
    """

    blocks: Blocks
    orientation_U: Tensor
    table: Tensor
    table_rows_U: Tensor
    weight_N: Tensor
    best_orientation_B: Tensor
    best_shift_B: Tensor
    log_evidence_B: Tensor
    pmax_B: Tensor
    entropy_B: Tensor
    significant_B: Tensor


class Searcher:
    """Searches batches of one optics group against one reference; slices of the coarse grid are made once."""

    def __init__(self, preparer: ImagePreparer, space: SearchSpace, coarse: Slicer, full: Slicer, fine: FineSlices) -> None:
        self.preparer, self.space, self.coarse_slicer, self.full, self.fine = preparer, space, coarse, full, fine
        self.coarse_OK: Tensor | None = None
        self.coarse_power_OK: Tensor | None = None

    def __call__(
        self, prepared: Prepared, old_offset_B2: Tensor, local: Local | None = None, sigma2_S: Tensor | None = None
    ) -> Posterior:
        """Posterior of a batch; old_offset_B2: whole-pixel offsets already applied to the images, Å.

        sigma2_S: noise of the batch's group, needed to take it out again when scoring by correlation.
        """
        if self.space.correlate:
            assert sigma2_S is not None
            return self._by_correlation(prepared, sigma2_S)
        log_offset_BT = self._offset_prior(old_offset_B2).to(prepared.weight_BK)
        if local is None:
            samples, bias_N = self._coarse(prepared, log_offset_BT)
        else:
            samples, bias_N = self._coarse_local(prepared, log_offset_BT, local)
        return self._fine(prepared, samples, bias_N)

    def _offset_prior(self, old_offset_B2: Tensor) -> Tensor:
        """Log of the Gaussian prior of each coarse offset, relative to the mean over the offsets, [B, T]."""
        offset_T2, pixel_size = self.space.offsets.coarse_T2.to(old_offset_B2), self.preparer.group.pixel_size
        offset_BT2 = old_offset_B2[:, None] + offset_T2 * (pixel_size if self.space.relion_offset_prior else 1.0)
        distance2 = offset_BT2.square().sum(-1)
        log_BT = -0.5 * distance2 / self.space.offset_sigma**2
        return log_BT - (torch.logsumexp(log_BT, 1, keepdim=True) - math.log(log_BT.shape[1]))

    def origin_of_reference(self) -> float:
        """Value of the reference's transform at the origin, the same in all slices."""
        at = self.preparer.coordinates_K3[self.preparer.origin][None]
        return float(self.full.volume.slices(torch.eye(3, dtype=torch.float64)[None], at)[0, 0, 0])

    def shifted(self, image_B2K: Tensor, offset_T2: Tensor, count: int | None = None) -> Tensor:
        """Copies [B, T, 2, K] of images shifted by offsets in Å, in the precision of operands; the first `count` K only."""
        pixels, group = self.preparer.pixels, self.preparer.group
        part = slice(0, count)
        shift_T2 = (offset_T2 / group.pixel_size).to(image_B2K)
        return shift(image_B2K[..., part], shift_T2, pixels.x_K[part], pixels.y_K[part], pixels.box, self.space.operand)

    def _coarse(self, prepared: Prepared, log_offset_BT: Tensor) -> tuple[Samples, Tensor]:
        """Significant samples over the whole grid, and their log priors."""
        grid = self.space.grid
        score_BTO, power_BO = self._cross_and_power(prepared.scored_B2K, prepared.weight_BK)
        n, shifts = score_BTO.shape[:2]
        score_BTO += (self.space.log_prior_O.to(power_BO) - 0.5 * power_BO)[:, None]
        score_BTO += log_offset_BT[:, :, None]
        ptr_B1 = torch.arange(n + 1, device=score_BTO.device) * (shifts * grid.count)
        ptr, index_N = self._choose(score_BTO.flatten(), ptr_B1)[1:]
        within_N = index_N % (shifts * grid.count)
        samples = Samples(ptr, within_N % grid.count, torch.div(within_N, grid.count, rounding_mode="floor"))
        bias_N = self.space.log_prior_O.to(log_offset_BT)[samples.orientation_N]
        return samples, bias_N + log_offset_BT[samples.particle_N, samples.shift_N]

    def _cross_and_power(self, scored_B2K: Tensor, weight_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Cross terms [B, T, O] and norms sum W |P|^2 [B, O] of the whole coarse grid."""
        count = self.preparer.coarse_count
        if self.coarse_OK is None:
            slices_O2K = self.coarse_slicer(self.space.grid.rotations())
            self.coarse_OK = slices_O2K.flatten(1)
            self.coarse_power_OK = slices_O2K.to(weight_BK).square().sum(1)
        assert self.coarse_power_OK is not None
        images = self.shifted(scored_B2K, self.space.offsets.coarse_T2, count)
        cross_BTO = product(images.flatten(2).flatten(0, 1), self.coarse_OK).unflatten(0, images.shape[:2])
        return cross_BTO, weight_BK[:, :count] @ self.coarse_power_OK.T

    def _by_correlation(self, prepared: Prepared, sigma2_S: Tensor) -> Posterior:
        """The best child of the best coarse sample by Re sum P* X / sqrt(sum |P|^2), without noise weights and priors."""
        grid, offsets = self.space.grid, self.space.offsets
        sigma2_K = sigma2_S[self.preparer.shell_K].to(prepared.weight_BK)
        scored_B2K, weight_BK = prepared.scored_B2K * sigma2_K, prepared.weight_BK * sigma2_K
        largest = scored_B2K.abs().amax().clamp_min(1e-30)  # half-precision operands want numbers of order one
        scored_B2K = scored_B2K / largest
        cross_BTO, power_BO = self._cross_and_power(scored_B2K, weight_BK)
        best_B = (cross_BTO * power_BO.clamp_min(1e-30).rsqrt()[:, None]).flatten(1).argmax(1)
        n = len(best_B)
        ptr_B1 = torch.arange(n + 1, device=best_B.device)
        samples = Samples(ptr_B1, best_B % grid.count, torch.div(best_B, grid.count, rounding_mode="floor"))
        parents, orientation_U, _ = factorise(samples, len(offsets.coarse_T2))
        table, base_U = self.fine.of(orientation_U)
        blocks = children(parents, grid.children_per_orientation, offsets.children_per_offset)
        in_table = rows_in_table(blocks, base_U, grid.children_per_orientation)
        images = self.shifted(scored_B2K, offsets.fine_F2)
        cross_N = compare(images, torch.zeros_like(weight_BK), table, in_table)
        power_N = compare(torch.zeros_like(images), weight_BK, table, in_table) * -2
        score_N = cross_N * power_N.clamp_min(1e-30).rsqrt()
        found = significant(score_N, blocks.value_ptr_B1, 0.5)
        certain = replace(found, log_sum_B=found.max_B)
        return self._posterior(blocks, orientation_U, table, base_U, score_N, certain, ptr_B1, found.best_B, samples)

    def _coarse_local(self, prepared: Prepared, log_offset_BT: Tensor, local: Local) -> tuple[Samples, Tensor]:
        """The same over each particle's own orientations."""
        count, shifts = self.preparer.coarse_count, log_offset_BT.shape[1]
        orientation_U, row_N = torch.unique(local.orientation_N, return_inverse=True)
        slices_U2K = self.coarse_slicer(self.space.grid.rotations(orientation_U))
        n = len(log_offset_BT)
        every = torch.arange(shifts, device=row_N.device)
        blocks = Blocks.build(local.ptr_B1, row_N, torch.arange(n + 1, device=row_N.device) * shifts, every.repeat(n))
        images = self.shifted(prepared.scored_B2K, self.space.offsets.coarse_T2, count)
        score_N = compare(images, prepared.weight_BK[:, :count].contiguous(), slices_U2K, blocks)
        bias_NT = local.log_prior_N.to(log_offset_BT)[:, None] + log_offset_BT[owner(local.ptr_B1)]
        score_N += bias_NT.flatten()
        ptr, index_N = self._choose(score_N, blocks.value_ptr_B1)[1:]
        samples = Samples(ptr, local.orientation_N[torch.div(index_N, shifts, rounding_mode="floor")], index_N % shifts)
        return samples, bias_NT.flatten()[index_N]

    def _choose(self, score_N: Tensor, ptr_B1: Tensor) -> tuple[Significance, Tensor, Tensor]:
        """Significance of each particle and its accepted samples: (significance, CSR pointers, positions)."""
        found = significant(score_N, ptr_B1, self.space.fraction)
        return found, *chosen(score_N, ptr_B1, found.threshold_B)

    def _fine(self, prepared: Prepared, samples: Samples, bias_N: Tensor) -> Posterior:
        """Compare the children of significant coarse samples, keep those that hold `fraction` of the mass."""
        grid, offsets = self.space.grid, self.space.offsets
        slices_each, shifts_each = grid.children_per_orientation, offsets.children_per_offset
        parents, orientation_U, place_N = factorise(samples, len(offsets.coarse_T2))
        bias_P = bias_N.new_full((parents.samples,), -math.inf)
        bias_P[place_N] = bias_N
        table, base_U = self.fine.of(orientation_U)
        blocks = children(parents, slices_each, shifts_each)
        images = self.shifted(prepared.scored_B2K, offsets.fine_F2)
        score_N = compare(images, prepared.weight_BK, table, rows_in_table(blocks, base_U, slices_each))
        del images
        admit(score_N, blocks, bias_P, parents, slices_each, shifts_each)
        found, ptr, index_N = self._choose(score_N, blocks.value_ptr_B1)
        return self._posterior(blocks, orientation_U, table, base_U, score_N, found, ptr, index_N, samples)

    def _posterior(
        self, blocks: Blocks, orientation_U: Tensor, table: Tensor, base_U: Tensor, score_N: Tensor, found: Significance,
        ptr: Tensor, index_N: Tensor, samples: Samples,
    ) -> Posterior:  # fmt: skip
        each, fine_shifts = self.space.grid.children_per_orientation, len(self.space.offsets.fine_F2)
        child_N, shift_N = locate_samples(blocks, ptr, index_N)
        best_child_B, best_shift_B = locate_samples(
            blocks, torch.arange(blocks.particles + 1, device=ptr.device), found.best_B
        )  # fmt: skip
        kept = Samples(ptr, child_N, shift_N)
        compact, child_V, place_N = factorise(kept, fine_shifts)
        particle_N = kept.particle_N
        log_weight_N = score_N[index_N].double() - found.log_sum_B[particle_N]
        weight = torch.zeros(compact.samples, dtype=score_N.dtype, device=score_N.device)
        weight[place_N] = torch.exp(log_weight_N).to(weight)
        entropy_B = torch.zeros_like(found.max_B).index_add_(0, particle_N, -torch.exp(log_weight_N) * log_weight_N)

        def fine_index(child: Tensor) -> Tensor:
            return orientation_U[torch.div(child, each, rounding_mode="floor")] * each + child % each

        rows_V = base_U[torch.div(child_V, each, rounding_mode="floor")] + child_V % each
        return Posterior(
            compact, fine_index(child_V), table, rows_V, weight, fine_index(best_child_B), best_shift_B, found.log_sum_B,
            torch.exp(found.max_B - found.log_sum_B), entropy_B, samples.ptr_B1[1:] - samples.ptr_B1[:-1],
        )  # fmt: skip


def rows_in_table(blocks: Blocks, base_U: Tensor, slices_each: int) -> Blocks:
    """The same blocks with slices numbered by their row in the table; base_U: row of the first child of each parent."""
    child_N = blocks.slice_N.long()
    rows_N = base_U[torch.div(child_N, slices_each, rounding_mode="floor")] + child_N % slices_each
    return replace(blocks, slice_N=rows_N.int())


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T [M, N] with sums and result in single precision at least, whatever the operands' precision."""
    if a_MK.dtype == torch.float16:
        return torch.mm(a_MK, b_NK.T, out_dtype=torch.float32)
    return a_MK @ b_NK.T


def locate_samples(blocks: Blocks, ptr_B1: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """(slice_N entry, shift_M entry) of samples given by position; ptr_B1: how many belong to each particle."""
    particle_N = owner(ptr_B1)
    within_N = index_N - blocks.value_ptr_B1[particle_N]
    shifts_N = (blocks.shift_ptr_B1[1:] - blocks.shift_ptr_B1[:-1])[particle_N]
    a_N = torch.div(within_N, shifts_N, rounding_mode="floor")
    slice_N = blocks.slice_N[blocks.slice_ptr_B1[particle_N] + a_N].long()
    return slice_N, blocks.shift_M[blocks.shift_ptr_B1[particle_N] + within_N - a_N * shifts_N].long()
