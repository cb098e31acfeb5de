"""Correction of scan positions.

Every position is moved by a Gauss-Newton step of its own, of the square roots of its pattern:

    J = d sqrt(I) / d(row, column) = scale Re(sum conj(F) dF) / sqrt(I);      step = (J^T J)^-1 J^T (sqrt(n) - sqrt(I))

with F the wave at the detector and dF its derivative with respect to the position: two more transforms per wave. Object and
positions of a whole region go slowly together: so a share of the last move is repeated. Positions that are far off are looked
for every few passes (positions_search.py).

Errors of positions hardly have a mean over many neighbours; a region that has moved as a whole, its object with it, shows none in
its patterns, but tears the object where it ends (a star gets a spoke too many there). So at first a share of the neighbours'
mean is taken back after each move. Regions that are wrong all the same are grown anew (positions_regions.py). A correction of
less than five of its standard errors is none.
"""

from __future__ import annotations

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from verglas.ptychography.noise import Amplitude
from verglas.ptychography.positions_regions import Regions
from verglas.ptychography.positions_search import expected_loss, inside, searched_positions
from verglas.ptychography.problem import Problem
from verglas.ptychography.unknowns import Line, Unknowns

LONGEST = 2.0  # px of one step: beyond it the derivative says nothing
SHARE = 1.0  # of the Gauss-Newton step
MOMENTUM = 0.7  # of the last move, repeated
SEARCH_EVERY = 4  # passes
FIRST = 25  # passes that look for nearly all positions, and take back what neighbours have in common
FIRST_FAR_OFF, FAR_OFF = 0.8, 1.3  # times the median loss of a position: such a one is looked for
NEIGHBOURS, TAKEN_BACK = 24, 0.5  # and the share of their mean that is taken back in the first pass, less and less in later ones
CHANCE = 25.0  # squared correction over its variance: five standard errors
MOVE = "positions.move"


class Corrections:
    """Positions after each pass. memory: "positions.move", the last move of all positions, of all ranks, [B, 2] px; moved: how
    far positions went at last, px rms."""

    def __init__(self, problem: Problem, memory: dict[str, Tensor]) -> None:
        """memory: of a pass to go on after; what is of positions is taken out of it."""
        self.problem, self.moved = problem, 0.0
        self.recorded_B2 = problem.share.everyones(problem.scan.positions_B2.double().to(problem.like.device))
        self.move_B2 = memory.pop(MOVE, torch.zeros_like(self.recorded_B2))
        self.regions = Regions(problem, self.recorded_B2, memory)
        position_B2 = self.recorded_B2.cpu()
        nearest_BN = cKDTree(position_B2).query(position_B2, range(1, min(NEIGHBOURS, len(position_B2)) + 1))[1]
        self.nearest_BN = torch.from_numpy(nearest_BN).to(problem.like.device)

    def after_pass(self, x: Unknowns, number: int) -> Unknowns:
        """Positions after pass `number` (1 is the first); their mean stays, and they stay inside the object."""
        problem, share, options = self.problem, self.problem.share, self.problem.options
        passes, corner_2 = number - options.positions_from, share.corner_2.to(self.recorded_B2)
        before_B2 = share.everyones(x["positions_B2"] + corner_2)
        if passes % SEARCH_EVERY == SEARCH_EVERY - 1:
            x = searched_positions(problem, x, FIRST_FAR_OFF if passes < FIRST or self.regions.under_trial else FAR_OFF)
        position_B2 = share.everyones(x["positions_B2"] + corner_2)
        move_B2 = torch.where(position_B2 == before_B2, self.move_B2, 0.0)
        step_B2, information_B22 = (share.everyones(one) for one in steps(problem, x))
        length_B1 = step_B2.norm(dim=1, keepdim=True)
        move_B2 = MOMENTUM * move_B2 + SHARE * step_B2 * (LONGEST / length_B1.clamp_min(LONGEST))
        self.move_B2 = move_B2 - move_B2.mean(0)
        position_B2 = position_B2 + self.move_B2
        position_B2 = position_B2 - self.taken_back(position_B2, passes)
        position_B2 = self.significant(position_B2, information_B22)
        self.moved = float((position_B2 - before_B2).square().sum(1).mean().sqrt())
        x = x.changed(positions_B2=inside(problem, x, share.cut_field("positions_B2", position_B2)))
        moved = self.regions.after_pass(x, passes, options.passes - number)
        stays_B = (moved["positions_B2"] == x["positions_B2"]).all(1)
        self.move_B2 = torch.where(share.everyones(stays_B)[:, None], self.move_B2, 0.0)
        return moved

    @property
    def memory(self) -> dict[str, Tensor]:
        """What the next pass depends on."""
        return {MOVE: self.move_B2} | self.regions.memory

    def taken_back(self, position_B2: Tensor, passes: int) -> Tensor:
        """[B, 2] share of the mean correction of each position's neighbours, `passes` after the first correction; px."""
        correction_B2 = position_B2 - self.recorded_B2
        common_B2 = (correction_B2 - correction_B2.mean(0))[self.nearest_BN].mean(1)
        return max(0.0, TAKEN_BACK * (1 - passes / FIRST)) * (common_B2 - common_B2.mean(0))


    def significant(self, position_B2: Tensor, information_B22: Tensor) -> Tensor:
        """[B, 2] positions, those as recorded (but for the mean correction) whose correction noise may have made."""
        correction_B2 = position_B2 - self.recorded_B2
        correction_B2 = correction_B2 - correction_B2.mean(0)
        square_B = torch.einsum("bi,bij,bj->b", correction_B2, information_B22, correction_B2)
        return torch.where((square_B < CHANCE)[:, None], position_B2 - correction_B2, position_B2)


def steps(problem: Problem, x: Unknowns) -> tuple[Tensor, Tensor]:
    """([B, 2] Gauss-Newton steps of this rank's positions, px, [B, 2, 2] inverse of their covariance), float64; 0 and no number
    for those that rest."""
    step_B2 = torch.zeros_like(x["positions_B2"])
    information_B22 = torch.full((*step_B2.shape, 2), torch.nan, dtype=step_B2.dtype, device=step_B2.device)
    for rows_B in problem.chunks(problem.at_work()):
        step_B2[rows_B], information_B22[rows_B] = _steps(problem, x, rows_B)
    return step_B2, information_B22


def _steps(problem: Problem, x: Unknowns, rows_B: Tensor) -> tuple[Tensor, Tensor]:
    model = problem.model
    waves = model.waves(Line(x), rows_B)
    root_BYX = waves.intensity[0].clamp_min(1e-6).sqrt()
    missing_BYX = (problem.counts.rows(rows_B).clamp_min(0).sqrt() - root_BYX) * problem.counts.weight_YX
    slopes = []
    for derivative in model.derivatives_of_position(waves):
        product = (waves.detector[0].conj() * derivative).real.sum((1, 2))
        slopes.append(problem.model.binned(product) * x["scale_B"][rows_B, None, None] / root_BYX * problem.counts.weight_YX)
    j_B2N = torch.stack(slopes, 1).flatten(2)
    normal_B22 = (j_B2N @ j_B2N.transpose(1, 2)).double()
    right_B2 = (j_B2N @ missing_BYX.flatten(1)[:, :, None])[:, :, 0].double()
    ridge_B = 1e-3 * normal_B22.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye_22 = torch.eye(2, dtype=torch.float64, device=rows_B.device)
    step_B2 = torch.linalg.solve(normal_B22 + ridge_B[:, None, None] * eye_22, right_B2)
    counts_BYX = problem.counts.rows(rows_B)
    loss_BYX = Amplitude(problem.offset).loss(waves.intensity[0], counts_BYX) * problem.counts.weight_YX
    noise_B = loss_BYX.sum((1, 2)).double() / expected_loss(problem, waves)
    return step_B2, normal_B22 / (0.25 * noise_B.clamp_min(1.0))[:, None, None]
