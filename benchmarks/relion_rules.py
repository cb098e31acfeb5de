"""Three rules of RELION that verglas does not follow, so that everything else can be compared: drop-in replacements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from verglas.core.rotations import euler_from_matrix
from verglas.core.symmetry import symmetry_matrices
from verglas.expectation.images import Prepared
from verglas.expectation.sampling import OrientationGrid
from verglas.expectation.search import Posterior, Searcher
from verglas.kernels.admit import Parents
from verglas.kernels.compare import compare
from verglas.kernels.significant import significant


def select_local(grid: OrientationGrid, prior_B33: Tensor, sigma_degrees: float, symmetry: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `verglas.expectation.local.select_local`, with RELION's prior: distance of the views of the nearest mate times the
    difference of psi, of the pose as it is given, each cut at 3 sigma (facts 3.7)."""
    mates_G33 = symmetry_matrices(symmetry).double()
    view_BG3 = (prior_B33.double()[:, None] @ mates_G33)[:, :, 2]
    cosine_BD = (view_BG3 @ grid.views_D33[:, 2].double().T).amax(1).clamp(-1, 1)
    away_BD = torch.rad2deg(torch.acos(cosine_BD))
    psi_B = euler_from_matrix(prior_B33.double())[:, 2]
    turn_BP = (torch.arange(grid.n_psi) * grid.psi_step - psi_B[:, None] + 180) % 360 - 180
    log_BD, log_BP = (log_prior(away, sigma_degrees) for away in (away_BD, turn_BP))
    log_BO = (log_BD[:, :, None] + log_BP[:, None]).flatten(1)
    found = log_BO > -torch.inf
    ptr_B1 = torch.cat([torch.zeros(1, dtype=torch.int64), found.sum(1).cumsum(0)])
    return ptr_B1, found.nonzero()[:, 1], log_BO[found]


def log_prior(away_BN: Tensor, sigma: float) -> Tensor:
    """Log of a Gaussian cut at 3 sigma that sums to 1; the nearest alone if nothing is within."""
    log_BN = torch.where(away_BN.abs() < 3 * sigma, -0.5 * (away_BN / sigma).square(), -torch.inf)
    nearest_B = away_BN.abs().argmin(1)
    log_BN[torch.arange(len(log_BN)), nearest_B] = log_BN[torch.arange(len(log_BN)), nearest_B].clamp_min(-0.5 * 180**2)
    return log_BN - torch.logsumexp(log_BN, 1, keepdim=True)


class RelionSearcher(Searcher):
    """Correlates over RELION's half transform: the column x = 0 counts twice, the origin once (facts 3.4)."""

    origin_cross_BC: Tensor
    origin_power_BC: Tensor

    def _without_noise(self, prepared: Prepared, sigma2_S: Tensor) -> tuple[Tensor, Tensor]:
        scored_B2K, weight_BK = super()._without_noise(prepared, sigma2_S)
        before_B2K = prepared.scored_B2K * sigma2_S[self.preparer.shell_K].to(prepared.scored_B2K)
        largest_B = before_B2K.abs().amax((1, 2)).clamp_min(1e-30)
        of_reference_BC = prepared.seen_B[:, None] * self.origin_C
        self.origin_cross_BC = (of_reference_BC * (prepared.origin_B / largest_B)[:, None]).to(weight_BK)
        self.origin_power_BC = of_reference_BC.square().to(weight_BK)
        times_K = self._times(self.preparer.pixels.radius).to(weight_BK)
        return scored_B2K * times_K, weight_BK * times_K

    def _times(self, radius: int) -> Tensor:
        """How often RELION counts each coefficient [K] in transforms up to `radius`: they have no row -radius."""
        x, y = self.preparer.pixels.x_K, self.preparer.pixels.y_K
        return torch.where((x == 0) & (y != 0) & (y.abs() < radius), 2.0, 1.0)

    def _cross_and_power(self, scored_B2K: Tensor, weight_BK: Tensor) -> tuple[Tensor, Tensor]:
        again_K = (self._times(self.preparer.grid.coarse_radius) / self._times(self.preparer.pixels.radius)).to(weight_BK)
        cross_BTO, power_BO = super()._cross_and_power(scored_B2K * again_K, weight_BK * again_K)
        each = self.space.grid.grid.count
        at_origin_BO, its_power_BO = (one.repeat_interleave(each, 1) for one in (self.origin_cross_BC, self.origin_power_BC))
        return cross_BTO + at_origin_BO[:, None], power_BO + its_power_BO

    def _fine_by_correlation(self, prepared: Prepared, parents: Parents, significant_B: Tensor, sigma2_S: Tensor) -> Posterior:
        scored_B2K, weight_BK = self._without_noise(prepared, sigma2_S)
        found_in = self._children(parents.blocks)
        images = self.shifted(scored_B2K, self.space.offsets.fine_F2)
        cross_N = compare(images, torch.zeros_like(weight_BK), found_in.table, found_in.in_table)
        power_N = compare(torch.zeros_like(images), weight_BK, found_in.table, found_in.in_table) * -2
        particle_N, slice_N, _ = found_in.blocks.sample_indices()
        parent_N = found_in.blocks.slice_N[slice_N].long() // self.space.grid.children_per_orientation
        class_N = self.space.grid.class_of(found_in.orientation_U[parent_N])
        cross_N = cross_N + self.origin_cross_BC[particle_N, class_N]
        power_N = power_N + self.origin_power_BC[particle_N, class_N]
        score_N = cross_N * power_N.clamp_min(1e-30).rsqrt()
        found = significant(score_N, found_in.blocks.value_ptr_B1, 0.5)
        best = score_N[found.best_B].double()
        return self._posterior(found_in, score_N, replace(found, threshold_B=best, log_sum_B=best, max_B=best), significant_B)


@contextmanager
def relion_rules() -> Iterator[None]:
    """Within, local searches (their prior, and the shells of their coarse pass) and correlations follow RELION."""
    with ExitStack() as stack:
        stack.enter_context(patch("verglas.refinement.expect.select_local", select_local))
        stack.enter_context(patch("verglas.refinement.expect.Searcher", RelionSearcher))
        stack.enter_context(patch("verglas.refinement.schedule.local_coarse_size", lambda state, largest: largest))
        yield
