"""Positions that are far off are looked for on a grid about them: no slope leads home from there.

The object that all positions explain carries the trace of a wrong one, which fits its own trace and stays, above all at the rim
of a scan. So each is tried against what the others see: with psi the exit waves that the counts ask for, and their projection

    O_b = (sum_c conj(light_c) psi_c - conj(light_b) psi_b + ridge mean) / (sum_c |light_c|^2 - |light_b|^2 + ridge)

(of several slices no such sum is known: there the object itself is taken). Axes: N positions that are tried, G places of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.kernels.patches import patches
from verglas.ptychography.model import Place, Waves
from verglas.ptychography.noise import Amplitude
from verglas.ptychography.problem import Problem
from verglas.ptychography.unknowns import Line, Unknowns

REACH, GRID = 8, 2  # px to each side, and between two places
RIDGE = 0.01  # of the greatest light: where the others hardly saw the object, it is its mean
LEAST_GAIN = 0.1  # of what the place can change: a position moves for more than that
LEAST_LOSS = 5.0  # and for more of (sqrt(I) - sqrt(n))^2, of which noise makes a quarter a pixel


@dataclass(frozen=True)
class Others:
    """sum_OLYX: sum conj(light) psi + ridge mean, light_OLYX: sum |light|^2 + ridge over all positions, REACH px wider on all
    sides than the object; where light_OLYX is None, sum_OLYX is the object itself. ridge: RIDGE of the greatest light."""

    sum_OLYX: Tensor
    light_OLYX: Tensor | None = None
    ridge: float = 0.0


def searched_positions(problem: Problem, x: Unknowns, far_off: float) -> Unknowns:
    """Positions whose loss is more than far_off times the median moved to where it is least on the grid; the others stay."""
    others = others_of(problem, x)
    loss_B = losses_here(problem, x, others)
    rows_N = (loss_B > far_off * problem.share.everyones(loss_B).nanmedian()).nonzero()[:, 0]
    if not len(rows_N):
        return x
    offset_N2, least_N, greatest_N = best_places(problem, x, others, rows_N)
    gain_N = loss_B[rows_N] - least_N
    goes_N = (gain_N > LEAST_GAIN * (greatest_N - least_N)) & (gain_N > LEAST_LOSS)
    moved_B2 = x["positions_B2"].clone()
    moved_B2[rows_N] += offset_N2 * goes_N[:, None]
    return x.changed(positions_B2=inside(problem, x, moved_B2))


def best_places(problem: Problem, x: Unknowns, others: Others, rows_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([N, 2] px, float64, from each position to the place of the grid where its loss is least; this loss, and the greatest)."""
    axis = torch.arange(-REACH, REACH + 1, GRID)
    offset_G2 = torch.cartesian_prod(axis, axis)
    loss_NG = torch.cat([losses(problem, x, others, rows_B, offset_G2) for rows_B in problem.chunks(rows_N)])
    least_N, best_N = loss_NG.min(1)
    return offset_G2.to(x["positions_B2"])[best_N], least_N, loss_NG.amax(1)


def losses_here(problem: Problem, x: Unknowns, others: Others) -> Tensor:
    """[B] loss of all positions of this rank where they are, on the object of the others; no number for those that rest."""
    here_12, loss_B = torch.zeros(1, 2, dtype=torch.long), torch.full_like(x["scale_B"], torch.nan)
    for rows_B in problem.chunks(problem.at_work()):
        loss_B[rows_B] = losses(problem, x, others, rows_B, here_12)[:, 0]
    return loss_B


def inside(problem: Problem, x: Unknowns, position_B2: Tensor) -> Tensor:
    """Positions whose windows, and a pixel more, lie inside the object."""
    height, width = x["object_OLYX"].shape[-2:]
    low_2, high_2 = (one.to(position_B2) for one in problem.share.limits((height, width)))
    return torch.minimum(torch.maximum(position_B2, low_2), high_2)


def others_of(problem: Problem, x: Unknowns) -> Others:
    """The sums over all positions at work, of all ranks."""
    object_OLYX, share = x["object_OLYX"], problem.share
    if object_OLYX.shape[1] > 1:
        return Others(wider(object_OLYX))
    into = Unknowns(object_OLYX=torch.zeros_like(object_OLYX))
    for rows_B in problem.chunks(problem.at_work()):
        waves = problem.model.waves(Line(x), rows_B)
        problem.model.spread(x, waves, wanted(problem, x, waves), into)
    share.add_up(into)
    evenly = x.changed(scale_B=torch.ones_like(x["scale_B"]))
    light_OLYX = problem.curvature(evenly, ("object_OLYX",), problem.at_work())["object_OLYX"]
    sum_O, light_O = share.total(*((one[(..., *share.cell)]).sum((1, 2, 3)) for one in (into["object_OLYX"], light_OLYX)))
    ridge = RIDGE * float(share.greatest("object_OLYX", light_OLYX))
    mean_O111 = (sum_O / light_O)[:, None, None, None]
    return Others(wider(into["object_OLYX"] + ridge * mean_O111), wider(light_OLYX + ridge), ridge)


def wider(object_OLYX: Tensor) -> Tensor:
    """The object and REACH pixels about it, as those at its edge."""
    row_Y, column_X = (torch.arange(-REACH, n + REACH, device=object_OLYX.device).clamp(0, n - 1) for n in object_OLYX.shape[-2:])
    return object_OLYX[..., row_Y[:, None], column_X]


def wanted(problem: Problem, x: Unknowns, waves: Waves) -> Tensor:
    """[B, O, M, Y, X] exit waves that the counts ask for: those that are there, with the counts' amplitudes at the detector."""
    counts_BYX = problem.counts.rows(waves.place.rows_B)
    slope_BYX = Amplitude(problem.offset).slope(waves.intensity[0], counts_BYX) * problem.counts.weight_YX
    down = problem.model.at_detector(waves, torch.ones_like(x["scale_B"]), slope_BYX)
    return waves.exit[0] - 0.5 * problem.model.from_the_detector(down, waves.place)


def losses(problem: Problem, x: Unknowns, others: Others, rows_B: Tensor, offset_G2: Tensor) -> Tensor:
    """[B, G] loss of the patterns rows_B at their positions plus whole pixels, up to REACH, on the object of the others."""
    counts_BYX, weight_YX, noise = problem.counts.rows(rows_B), problem.counts.weight_YX, Amplitude(problem.offset)
    waves = problem.model.waves(Line(x), rows_B)
    wide_BOLYX = _object_of_others(problem, x, others, waves)
    rows, columns = problem.scan.window
    scale_B11 = x["scale_B"][rows_B, None, None]
    found = []
    for row, column in (offset_G2 + REACH).tolist():
        patch_BOLYX = wide_BOLYX[..., row : row + rows, column : column + columns]
        power_BYX = _power(problem, waves.light[0], patch_BOLYX, waves.place)
        loss_BYX = noise.loss(scale_B11 * power_BYX + x["background_YX"], counts_BYX)
        found.append((loss_BYX * weight_YX).sum((1, 2)))
    return torch.stack(found, 1)


def expected_loss(problem: Problem, waves: Waves) -> Tensor:
    """[B] what photon noise makes of the loss: the variance of sqrt(n + 3/8), 0.25 (1 - exp(-1.26 I)) within 0.01: 0.315 I for
    few photons, 1/4 for many."""
    variance_BYX = 0.25 * (1 - torch.exp(-1.26 * waves.intensity[0]))
    return (variance_BYX * problem.counts.weight_YX).sum((1, 2)).clamp_min(1e-6)


def _power(problem: Problem, light_BMYX: Tensor, patch_BOLYX: Tensor, place: Place) -> Tensor:
    """[B, Y, X] sum |wave|^2 at the detector of light that falls on patches of the object."""
    detector_BOMYX = problem.model.to_the_detector(problem.model.exit_wave(light_BMYX, patch_BOLYX), place)
    return problem.model.binned(torch.view_as_real(detector_BOMYX).square().sum((1, 2, -1)))


def _object_of_others(problem: Problem, x: Unknowns, others: Others, waves: Waves) -> Tensor:
    """[B, O, L, Y + 2 REACH, X + 2 REACH] what is about each position, without what it has said itself."""
    corner_B2 = waves.place.corner_B2
    edges = (problem.scan.window[0] + 2 * REACH, problem.scan.window[1] + 2 * REACH)
    wide_BOLYX = patches(others.sum_OLYX, corner_B2, edges)
    if others.light_OLYX is None:
        return wide_BOLYX
    light_BOLYX = patches(others.light_OLYX.to(wide_BOLYX.dtype), corner_B2, edges).real
    own = (..., slice(REACH, -REACH), slice(REACH, -REACH))
    works_B1111 = problem.works(waves.place.rows_B)[:, None, None, None, None]
    wide_BOLYX[own] -= problem.model.through(waves, wanted(problem, x, waves))[1] * works_B1111
    light_BOLYX[own] -= waves.light[0].abs().square().sum(1)[:, None, None] * works_B1111
    return wide_BOLYX / light_BOLYX.clamp_min(others.ridge)
