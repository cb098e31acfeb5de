"""The expectation of one batch: coarse search, significant samples, their children, posterior (RELION facts 3.3-3.6).

Scores are natural logarithms. The samples of a particle are pairs of an orientation (of a class) and a shift; the coarse pass
is one matrix product of all shifted images with all orientations (or, in local searches, with each particle's own), the fine
pass compares only the children of coarse samples that hold `fraction` of the posterior mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from verglas.expectation.classes import ClassGrid
from verglas.expectation.images import ImagePreparer, Prepared
from verglas.expectation.ragged import at_all_shifts, children, distinct, every
from verglas.expectation.samples import at_most, correlations, locate_samples, product
from verglas.expectation.sampling import OffsetGrid
from verglas.expectation.slices import FineSlices, Slicer
from verglas.expectation.strong import Strong, find_strong
from verglas.kernels.admit import Parents, admit
from verglas.kernels.blocks import Blocks, Wanted, owner
from verglas.kernels.coarse import Orientations, Power, coarse, split_columns
from verglas.kernels.compare import compare
from verglas.kernels.keep import keep, posterior
from verglas.kernels.shift import shift
from verglas.kernels.significant import Significance, significant


@dataclass(frozen=True)
class Local:
    """Each particle's own orientations (CSR) with their log prior: local searches."""

    ptr_B1: Tensor
    orientation_N: Tensor
    log_prior_N: Tensor


@dataclass(frozen=True)
class SearchSpace:
    """Grids and priors, on the device. log_prior_O: log of the prior of every coarse orientation, relative to its mean.

    offset_sigma: Å; fraction: of the posterior mass that significant samples hold; operand: dtype of the factors of
    matrix products (float16 on a GPU, else the precision of the images). correlate: score by the correlation coefficient and
    keep the best sample alone, for a reference whose grey scale is not the data's (facts 3.4, CC mode).
    relion_offset_prior: count offsets in the prior as RELION does, px and Å mixed (facts 3.5); for comparisons only.
    most: significant samples that a particle may have in a global coarse search, 0: any number.
    """

    grid: ClassGrid
    offsets: OffsetGrid
    log_prior_O: Tensor
    offset_sigma: float
    fraction: float
    operand: torch.dtype
    correlate: bool = False
    relion_offset_prior: bool = False
    most: int = 0


@dataclass(frozen=True)
class Posterior:
    """Fine posterior of a batch. blocks: per particle its kept children x shifts; slice_N points into orientation_U.

    orientation_U: fine orientations in use [U]; table_rows_U: their rows in `table`; weight_N: posterior weight of each
    sample of the blocks, 0 for those not kept; slice_weight_N, shift_weight_M: its sums per entry of the lists.
    best_orientation_B, best_shift_B: fine indices of the largest weight; log_evidence_B: log sum of prior x likelihood,
    without the constant of the image; pmax_B, entropy_B (nats); significant_B: number of coarse samples.
    """

    blocks: Blocks
    orientation_U: Tensor
    table: Tensor
    table_rows_U: Tensor
    weight_N: Tensor
    slice_weight_N: Tensor
    shift_weight_M: Tensor
    best_orientation_B: Tensor
    best_shift_B: Tensor
    log_evidence_B: Tensor
    pmax_B: Tensor
    entropy_B: Tensor
    significant_B: Tensor


class Searcher:
    """Searches batches of one optics group against the references of all classes; slices of the coarse grid are made once."""

    def __init__(
        self, preparer: ImagePreparer, space: SearchSpace, coarse: Slicer, full: Slicer, fine: FineSlices,
        some_weights: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        """some_weights: `Prepared.weight_BK` of a few particles, the same ones whatever is searched first and by whom: what is
        found for a particle then does not depend on the others of its batch."""
        self.preparer, self.space, self.coarse_slicer, self.full, self.fine_slices = preparer, space, coarse, full, fine
        self.some_weights = some_weights
        self.coarse_OK: Tensor | None = None
        self.coarse_power_OK: Tensor | None = None
        self.orientations: Orientations | None = None  # of half operands, instead of these two
        self.strong: Strong | None = None
        self.measured = space.operand != torch.float16  # strong coefficients are found when first needed

    def coarse(
        self, prepared: Prepared, old_offset_B2: Tensor, local: Local | None = None, sigma2_S: Tensor | None = None
    ) -> tuple[Parents, Tensor]:
        """Significant coarse samples of a batch with their priors, and how many each particle has.

        old_offset_B2: whole-pixel offsets already applied to the images, Å; sigma2_S: noise of the batch's group, needed to
        take it out again when scoring by correlation.
        """
        if self.space.correlate:
            assert sigma2_S is not None
            return self._coarse_by_correlation(prepared, sigma2_S, local)
        self._take_strong()
        log_offset_BT = self._offset_prior(old_offset_B2).to(prepared.weight_BK)
        if local is not None:
            return self._coarse_local(prepared, log_offset_BT, local)
        if self.space.operand == torch.float16 and not self.space.most:
            return self._coarse_in_half(prepared, log_offset_BT)
        return self._coarse(prepared, log_offset_BT)

    def given(self, prepared: Prepared, own: Local) -> tuple[Parents, Tensor]:
        """Instead of a coarse search, where nothing is searched: each particle's own orientations at its own offset."""
        if not self.space.correlate:
            self._take_strong()
        one = every(len(prepared.weight_BK), 0, 1, prepared.weight_BK.device)
        blocks = Blocks.build(own.ptr_B1, own.orientation_N, one.shift_ptr_B1, one.shift_M, len(own.orientation_N))
        log_prior_N = own.log_prior_N.to(prepared.weight_BK)
        zero_N = torch.zeros_like(log_prior_N)
        return Parents(blocks, zero_N, log_prior_N, zero_N[: blocks.particles]), own.ptr_B1.diff()

    def fine(self, prepared: Prepared, parents: Parents, significant_B: Tensor, sigma2_S: Tensor | None = None) -> Posterior:
        """Compare the children of coarse samples and keep those that hold `fraction` of the mass."""
        if self.space.correlate:
            assert sigma2_S is not None
            return self._fine_by_correlation(prepared, parents, significant_B, sigma2_S)
        found_in = self._children(parents.blocks)
        each = self.space.grid.children_per_orientation, self.space.offsets.children_per_offset
        wanted = Wanted(parents.blocks, parents.kept_N, *each)
        scored_B2K, weight_BK = self._weak(prepared)
        images = self.shifted(scored_B2K, self.space.offsets.fine_F2, lists=found_in.blocks)
        score_N = compare(images, weight_BK, found_in.table, found_in.in_table, wanted)
        del images
        if self.strong is not None:
            offsets = self._pixels(self.space.offsets.fine_F2)
            strong_images = self.strong.shifted(prepared.scored_B2K, offsets, lists=found_in.blocks)
            table, _ = self.strong.fine.of(found_in.orientation_U)  # rows as in the other table
            strong_weight = prepared.weight_BK[:, self.strong.index_K].contiguous()
            score_N += compare(strong_images, strong_weight, table, found_in.in_table, wanted)
        admit(score_N, found_in.blocks, parents, *each)
        found = significant(score_N, found_in.blocks.value_ptr_B1, self.space.fraction)
        return self._posterior(found_in, score_N, found, significant_B)

    def _take_strong(self) -> None:
        """Find which coefficients are compared in single precision."""
        if self.measured:
            return
        count, whole = self.preparer.coarse_count, self.fine_slices.whole
        self.strong = find_strong(self.some_weights(), self.full, self.preparer.pixels, count, self.space.grid, whole)
        self.measured = True

    def _offset_prior(self, old_offset_B2: Tensor) -> Tensor:
        """Log of the Gaussian prior of each coarse offset, relative to the mean over the offsets, [B, T]."""
        offset_T2, pixel_size = self.space.offsets.coarse_T2.to(old_offset_B2), self.preparer.group.pixel_size
        offset_BT2 = old_offset_B2[:, None] + offset_T2 * (pixel_size if self.space.relion_offset_prior else 1.0)
        log_BT = -0.5 * offset_BT2.square().sum(-1) / self.space.offset_sigma**2
        return log_BT - (torch.logsumexp(log_BT, 1, keepdim=True) - math.log(log_BT.shape[1]))

    @cached_property
    def origin_C(self) -> Tensor:
        """Value of each reference's transform at the origin, the same in all its slices; float64."""
        return self.full.at_origin(self.preparer.coordinates_K3[self.preparer.origin][None])

    @cached_property
    def scored_S(self) -> Tensor:
        """Coefficients of the half plane that are scored, per shell."""
        shell_YX, shells = self.preparer.shell_YX, self.preparer.grid.shells
        inside = (shell_YX > 0) & (shell_YX <= self.preparer.grid.last_scored)
        return torch.bincount(shell_YX[inside], minlength=shells)[:shells]

    def _all_orientations(self) -> Tensor:
        return torch.arange(self.space.grid.count, device=self.preparer.device)

    def _pixels(self, offset_T2: Tensor) -> Tensor:
        return (offset_T2 / self.preparer.group.pixel_size).to(self.preparer.dtype)

    def _weak(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Images and weights without the coefficients that are compared in single precision."""
        if self.strong is None:
            return prepared.scored_B2K, prepared.weight_BK
        return prepared.scored_B2K * self.strong.weak_K, prepared.weight_BK * self.strong.weak_K

    def shifted(
        self, image_B2K: Tensor, offset_T2: Tensor, count: int | None = None, lists: Blocks | None = None
    ) -> Tensor:
        """Copies [B, T, 2, K] of images shifted by offsets in Å, in the precision of operands; the first `count` K only.

        lists: only the offsets `shift_M` of each particle, [M, 2, K].
        """
        pixels, part = self.preparer.pixels, slice(0, count)
        return shift(
            image_B2K[..., part], self._pixels(offset_T2), pixels.x_K[part], pixels.y_K[part], pixels.box, self.space.operand,
            lists=lists,
        )  # fmt: skip

    def _coarse(self, prepared: Prepared, log_offset_BT: Tensor) -> tuple[Parents, Tensor]:
        """Significant samples over the whole grid with their priors, and how many each particle has."""
        grid = self.space.grid
        score_BTO, power_BO = self._cross_and_power(*self._weak(prepared))
        if self.strong is not None:
            self._add_strong(self.strong, prepared, score_BTO, power_BO)
        n, shifts = score_BTO.shape[:2]
        log_prior_O = self.space.log_prior_O.to(power_BO)
        score_BTO += (log_prior_O - 0.5 * power_BO)[:, None]
        score_BTO += log_offset_BT[:, :, None]
        blocks = every(n, grid.count, shifts, score_BTO.device)
        found = significant(score_BTO.flatten(), blocks.value_ptr_B1, self.space.fraction)
        if self.space.most:
            found = at_most(self.space.most, score_BTO.flatten(1), found)
        kept = keep(score_BTO.flatten(), blocks, found.threshold_B, by_shift=True)
        slice_prior_N = log_prior_O[kept.blocks.slice_N.long()]
        return Parents(kept.blocks, kept.value_N, slice_prior_N, log_offset_BT.flatten()[kept.shift_at_M]), found.count_B

    def _cross_and_power(self, scored_B2K: Tensor, weight_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Cross terms [B, T, O] and norms sum W |P|^2 [B, O] of the whole coarse grid."""
        count = self.preparer.coarse_count
        if self.coarse_OK is None:
            slices_O2K = self.coarse_slicer.coarse(self.space.grid, self._all_orientations())
            self.coarse_OK = slices_O2K.flatten(1)
            self.coarse_power_OK = slices_O2K.to(weight_BK).square().sum(1)
        assert self.coarse_power_OK is not None
        images = self.shifted(scored_B2K, self.space.offsets.coarse_T2, count)
        cross_BTO = product(images.flatten(2).flatten(0, 1), self.coarse_OK).unflatten(0, images.shape[:2])
        return cross_BTO, weight_BK[:, :count] @ self.coarse_power_OK.T

    def _add_strong(self, strong: Strong, prepared: Prepared, cross_BTO: Tensor, power_BO: Tensor) -> None:
        """Add what the strong coefficients of the coarse disc give, in single precision."""
        strong_OK = self._strong_slices(strong)
        images = strong.shifted(prepared.scored_B2K, self._pixels(self.space.offsets.coarse_T2), strong.coarse_count)
        cross_BTO.flatten(0, 1).addmm_(images.flatten(2).flatten(0, 1), strong_OK.T)
        power_OK = strong_OK.unflatten(1, (2, -1)).square().sum(1)
        power_BO.addmm_(prepared.weight_BK[:, strong.index_K[: strong.coarse_count]], power_OK.T)

    def _strong_slices(self, strong: Strong) -> Tensor:
        """Strong coefficients of the coarse grid's slices, single precision [O, 2 K']; made once."""
        if strong.coarse_OK is None:
            strong.coarse_OK = strong.coarse_slicer.coarse(self.space.grid, self._all_orientations()).flatten(1)
        return strong.coarse_OK

    def _coarse_in_half(self, prepared: Prepared, log_offset_BT: Tensor) -> tuple[Parents, Tensor]:
        """As `_coarse` with half-precision operands: scores are reduced as they are made (kernels/coarse)."""
        count, offset_T2 = self.preparer.coarse_count, self.space.offsets.coarse_T2
        images_BTL = self.shifted(self._weak(prepared)[0], offset_T2, count).flatten(2)
        strong, strong_OL = self.strong, None
        if strong is not None and strong.coarse_count:
            strong_BTL = strong.shifted(prepared.scored_B2K, self._pixels(offset_T2), strong.coarse_count).flatten(2)
            columns_BTL, strong_OL = split_columns(strong_BTL, self._strong_slices(strong))
            images_BTL = torch.cat([images_BTL, columns_BTL], 2)
        if self.orientations is None:
            self.orientations = self._orientations(strong_OL)
        weight_BK, log_prior_O = prepared.weight_BK[:, :count].contiguous(), self.orientations.log_prior_O
        kept, found = coarse(images_BTL, weight_BK, log_offset_BT, self.orientations, self.space.fraction)
        slice_prior_N = log_prior_O[kept.blocks.slice_N.long()]
        return Parents(kept.blocks, kept.value_N, slice_prior_N, log_offset_BT.flatten()[kept.shift_at_M]), found.count_B

    def _orientations(self, strong_OL: Tensor | None) -> Orientations:
        """The coarse grid's slices with the columns of the strong coefficients, their power and prior."""
        slices_O2K = self.coarse_slicer.coarse(self.space.grid, self._all_orientations())
        power_OK, slices_OL = slices_O2K.float().square().sum(1), slices_O2K.flatten(1)
        if strong_OL is not None:
            assert self.strong is not None
            strong_O2S = self._strong_slices(self.strong).unflatten(1, (2, -1))
            power_OK[:, self.strong.index_K[: self.strong.coarse_count]] = strong_O2S.square().sum(1)
            slices_OL = torch.cat([slices_OL, strong_OL], 1)
        return Orientations(slices_OL, Power.split(power_OK), self.space.log_prior_O.to(power_OK))

    def _coarse_local(self, prepared: Prepared, log_offset_BT: Tensor, local: Local) -> tuple[Parents, Tensor]:
        """The same over each particle's own orientations."""
        count, shifts = self.preparer.coarse_count, log_offset_BT.shape[1]
        orientation_U, row_N = distinct(local.orientation_N, self.space.grid.count)
        slices_U2K = self.coarse_slicer.coarse(self.space.grid, orientation_U)
        blocks = at_all_shifts(local.ptr_B1, row_N, shifts)
        scored_B2K, weight_BK = self._weak(prepared)
        images = self.shifted(scored_B2K, self.space.offsets.coarse_T2, count)
        score_N = compare(images, weight_BK[:, :count].contiguous(), slices_U2K, blocks)
        strong = self.strong
        if strong is not None and strong.coarse_count:
            strong_U2K = strong.coarse_slicer.coarse(self.space.grid, orientation_U)
            images = strong.shifted(prepared.scored_B2K, self._pixels(self.space.offsets.coarse_T2), strong.coarse_count)
            inside_K = strong.index_K[: strong.coarse_count]
            score_N += compare(images, prepared.weight_BK[:, inside_K].contiguous(), strong_U2K, blocks)
        log_prior_N = local.log_prior_N.to(log_offset_BT)
        score_N += (log_prior_N[:, None] + log_offset_BT[owner(local.ptr_B1, len(log_prior_N))]).flatten()
        found = significant(score_N, blocks.value_ptr_B1, self.space.fraction)
        kept = keep(score_N, blocks, found.threshold_B)
        # 64 bits: from HEALPix order 9 on there are more orientations than 32 bits can number.
        parents = replace(kept.blocks, slice_N=orientation_U[kept.blocks.slice_N.long()])
        shift_prior_M = log_offset_BT.flatten()[kept.shift_at_M]
        return Parents(parents, kept.value_N, log_prior_N[kept.slice_at_N], shift_prior_M), found.count_B

    def _without_noise(self, prepared: Prepared, sigma2_S: Tensor) -> tuple[Tensor, Tensor]:
        """C X and C^2 as correlation wants them, not weighted by the noise; numbers of order one for half precision."""
        sigma2_K = sigma2_S[self.preparer.shell_K].to(prepared.weight_BK)
        scored_B2K = prepared.scored_B2K * sigma2_K
        largest_B = scored_B2K.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
        return scored_B2K / largest_B, prepared.weight_BK * sigma2_K

    def _coarse_by_correlation(self, prepared: Prepared, sigma2_S: Tensor, local: Local | None) -> tuple[Parents, Tensor]:
        """The best coarse sample of each particle by Re sum P* X / sqrt(sum |P|^2), without priors."""
        scored_B2K, weight_BK = self._without_noise(prepared, sigma2_S)
        if local is not None:
            orientation_B, shift_B = self._best_of_own(scored_B2K, weight_BK, local)
        else:
            cross_BTO, power_BO = self._cross_and_power(scored_B2K, weight_BK)
            best_B = cross_BTO.mul_(power_BO.clamp_min(1e-30).rsqrt()[:, None]).flatten(1).argmax(1)
            count = self.space.grid.count
            orientation_B, shift_B = best_B % count, torch.div(best_B, count, rounding_mode="floor")
        ptr_B1 = torch.arange(len(shift_B) + 1, device=shift_B.device)
        blocks = replace(Blocks.build(ptr_B1, orientation_B, ptr_B1, shift_B, len(shift_B)), slice_N=orientation_B)
        zero_B = torch.zeros_like(weight_BK[:, 0])
        return Parents(blocks, zero_B, zero_B, zero_B), torch.ones_like(shift_B)

    def _best_of_own(self, scored_B2K: Tensor, weight_BK: Tensor, local: Local) -> tuple[Tensor, Tensor]:
        """(coarse orientation, coarse shift) of the best correlation among each particle's own orientations."""
        count = self.preparer.coarse_count
        orientation_U, row_N = distinct(local.orientation_N, self.space.grid.count)
        blocks = at_all_shifts(local.ptr_B1, row_N, len(self.space.offsets.coarse_T2))
        images = self.shifted(scored_B2K, self.space.offsets.coarse_T2, count)
        slices_U2K = self.coarse_slicer.coarse(self.space.grid, orientation_U)
        score_N = correlations(images, weight_BK[:, :count].contiguous(), slices_U2K, blocks)
        row_B, shift_B = locate_samples(blocks, significant(score_N, blocks.value_ptr_B1, 0.5).best_B)
        return orientation_U[row_B], shift_B

    def _fine_by_correlation(self, prepared: Prepared, parents: Parents, significant_B: Tensor, sigma2_S: Tensor) -> Posterior:
        """The best child alone, with weight 1."""
        scored_B2K, weight_BK = self._without_noise(prepared, sigma2_S)
        found_in = self._children(parents.blocks)
        images = self.shifted(scored_B2K, self.space.offsets.fine_F2, lists=found_in.blocks)
        score_N = correlations(images, weight_BK, found_in.table, found_in.in_table)
        found = significant(score_N, found_in.blocks.value_ptr_B1, 0.5)
        best = score_N[found.best_B].double()
        return self._posterior(found_in, score_N, replace(found, threshold_B=best, log_sum_B=best, max_B=best), significant_B)

    def _children(self, parents: Blocks) -> Children:
        """Children of coarse samples, and where their slices are. parents.slice_N: coarse orientations."""
        grid, offsets = self.space.grid, self.space.offsets
        orientation_U, place_N = distinct(parents.slice_N.long(), grid.count)
        table, base_U = self.fine_slices.of(orientation_U)
        each = grid.children_per_orientation
        blocks = children(replace(parents, slice_N=place_N.int()), each, offsets.children_per_offset)
        child_N = blocks.slice_N.long()
        rows_N = base_U[torch.div(child_N, each, rounding_mode="floor")] + child_N % each
        return Children(blocks, replace(blocks, slice_N=rows_N.int()), orientation_U, table, base_U)

    def _posterior(self, found_in: Children, score_N: Tensor, found: Significance, significant_B: Tensor) -> Posterior:
        each = self.space.grid.children_per_orientation
        best_child_B, best_shift_B = locate_samples(found_in.blocks, found.best_B)
        kept = keep(score_N, found_in.blocks, found.threshold_B)
        child_V, place_N = distinct(kept.blocks.slice_N.long(), len(found_in.orientation_U) * each)
        weight_N, slice_weight_N, shift_weight_M, entropy_B = posterior(kept.value_N, kept.blocks, found.log_sum_B)

        def parent(child: Tensor) -> Tensor:
            return torch.div(child, each, rounding_mode="floor")

        return Posterior(
            replace(kept.blocks, slice_N=place_N.int()), found_in.orientation_U[parent(child_V)] * each + child_V % each,
            found_in.table, found_in.base_U[parent(child_V)] + child_V % each, weight_N, slice_weight_N, shift_weight_M,
            found_in.orientation_U[parent(best_child_B)] * each + best_child_B % each, best_shift_B, found.log_sum_B,
            torch.exp(found.max_B - found.log_sum_B), entropy_B, significant_B,
        )  # fmt: skip


@dataclass(frozen=True)
class Children:
    """Children of the coarse samples of a batch. blocks.slice_N: position in orientation_U, times children, plus child;
    in_table: the same with rows of `table`; base_U: row of the first child of each coarse orientation_U.
    """

    blocks: Blocks
    in_table: Blocks
    orientation_U: Tensor
    table: Tensor
    base_U: Tensor
