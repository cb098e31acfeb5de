"""Correction of scan positions.

Every position is moved by a Gauss-Newton step of its own, of the square roots of its pattern:

    J = d sqrt(I) / d(row, column) = scale Re(sum conj(F) dF) / sqrt(I);      step = (J^T J)^-1 J^T (sqrt(n) - sqrt(I))

with F the wave at the detector and dF its derivative with respect to the position: two more transforms per wave. Positions that
are far off have no slope that leads home; they stand out by their error, and every few passes they are looked for on a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.ptychography.problem import Problem
from verglas.ptychography.unknowns import PER_POSITION, Line, Unknowns

LONGEST = 0.5  # px of one step: beyond it the derivative says little
SHARE = 0.7  # of the Gauss-Newton step: object and probe have yet to follow
SEARCH_EVERY = 5  # passes
FAR_OFF = 1.3  # times the median error of a position: such a one is looked for
REACH, GRID = 8, 2  # px to each side, and between two places where it is looked for


def corrected_positions(problem: Problem, x: Unknowns, number: int) -> Unknowns:
    """Positions after pass `number` (1 is the first); their mean stays, and they stay inside the object."""
    if (number - problem.options.positions_from) % SEARCH_EVERY == SEARCH_EVERY - 1:
        x = searched_positions(problem, x)
    step_B2 = torch.cat([steps(problem, x, rows_B) for rows_B in problem.chunks()])
    length_B1 = step_B2.norm(dim=1, keepdim=True)
    step_B2 = SHARE * step_B2 * (LONGEST / length_B1.clamp_min(LONGEST))
    mean_2 = problem.share.total(step_B2.sum(0))[0] / problem.positions
    return x.changed(positions_B2=inside(problem, x, x["positions_B2"] + step_B2 - mean_2))


def inside(problem: Problem, x: Unknowns, position_B2: Tensor) -> Tensor:
    """Positions whose windows, and a pixel more, lie inside the object."""
    height, width = x["object_OLYX"].shape[-2:]
    low_2, high_2 = (one.to(position_B2) for one in problem.share.limits((height, width)))
    return torch.minimum(torch.maximum(position_B2, low_2), high_2)


def steps(problem: Problem, x: Unknowns, rows_B: Tensor) -> Tensor:
    """[B, 2] Gauss-Newton steps, px, float64."""
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
    return torch.linalg.solve(normal_B22 + ridge_B[:, None, None] * eye_22, right_B2)


def errors(problem: Problem, x: Unknowns, position_N2: Tensor, rows_N: Tensor) -> Tensor:
    """[N] error of the patterns rows_N, each predicted at a position of its own: sum (sqrt(I) - sqrt(n))^2 / sum n."""
    out = []
    for position_B2, rows_B in zip(position_N2.split(problem.chunk), rows_N.split(problem.chunk), strict=True):
        own = {name: value[rows_B] for name, value in x.items() if name in PER_POSITION} | {"positions_B2": position_B2}
        waves = problem.model.waves(Line(x.changed(**own)), torch.arange(len(rows_B), device=rows_B.device))
        counts_BYX, weight_YX = problem.counts.rows(rows_B).clamp_min(0), problem.counts.weight_YX
        missed_BYX = (waves.intensity[0].clamp_min(0).sqrt() - counts_BYX.sqrt()).square() * weight_YX
        out.append(missed_BYX.sum((1, 2)) / (counts_BYX * weight_YX).sum((1, 2)).clamp_min(1))
    return torch.cat(out)


def searched_positions(problem: Problem, x: Unknowns) -> Unknowns:
    """Positions whose error stands out moved to where it is least on a grid about them; the others stay."""
    position_B2 = x["positions_B2"]
    error_B = errors(problem, x, position_B2, problem.everything)
    rows_B = (error_B > FAR_OFF * problem.share.everyones(error_B).median()).nonzero()[:, 0]
    if not len(rows_B):
        return x
    axis = torch.arange(-REACH, REACH + 1, GRID, dtype=torch.float64, device=rows_B.device)
    offset_G2 = torch.cartesian_prod(axis, axis)
    place_BG2 = inside(problem, x, position_B2[rows_B, None] + offset_G2)
    tried_BG = errors(problem, x, place_BG2.flatten(0, 1), rows_B.repeat_interleave(len(offset_G2))).view(len(rows_B), -1)
    best_B = tried_BG.argmin(1)
    moved_B2 = position_B2.clone()
    moved_B2[rows_B] = place_BG2[torch.arange(len(rows_B), device=rows_B.device), best_B]
    return x.changed(positions_B2=moved_B2)
