"""Correction of scan positions: each is moved by a Gauss-Newton step of its own, of the square roots of its pattern.

    J = d sqrt(I) / d(row, column) = scale Re(sum conj(F) dF) / sqrt(I);      step = (J^T J)^-1 J^T (sqrt(n) - sqrt(I))

with F the wave at the detector and dF its derivative with respect to the position: two more transforms per wave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.ptychography.problem import Problem
from verglas.ptychography.unknowns import Line, Unknowns

LONGEST = 0.5  # px of one step: beyond it the derivative says little
SHARE = 0.7  # of the Gauss-Newton step: object and probe have yet to follow


def corrected_positions(problem: Problem, x: Unknowns) -> Unknowns:
    """Positions after one step; their mean stays, and they stay inside the object."""
    step_B2 = torch.cat([steps(problem, x, rows_B) for rows_B in problem.chunks()])
    length_B1 = step_B2.norm(dim=1, keepdim=True)
    step_B2 = SHARE * step_B2 * (LONGEST / length_B1.clamp_min(LONGEST))
    step_B2 = step_B2 - step_B2.mean(0)
    shape = x["object_OLYX"].shape[-2:]
    room_2 = torch.tensor([n - edge - 1 for n, edge in zip(shape, problem.scan.window, strict=True)]).to(step_B2)
    return x.changed(positions_B2=torch.minimum((x["positions_B2"] + step_B2).clamp_min(0), room_2))


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
