"""Sums over positions by the kernels of `farfield`, where a problem is of their kind: fewer walks through memory.

Far field, one slice and one mode of the object, one probe (of any modes) for all positions, patterns as they were counted, no
scale or background to be fitted; on a GPU single precision and windows of their sizes. Everything else goes through
`model.Model`: `why_not` tells the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fft import fft2, ifft2

from verglas.kernels import farfield
from verglas.kernels.farfield import Counted, Curvature, Lit, Step
from verglas.ptychography.model import Place
from verglas.ptychography.unknowns import Unknowns

STRIPE = 64  # rows of the object

if TYPE_CHECKING:
    from verglas.ptychography.problem import Problem


def why_not(problem: Problem) -> str | None:
    """Why the kernels cannot serve; None if they can."""
    options, geometry = problem.options, problem.scan.geometry
    others = {
        "a near field": geometry.kind != "far", "several slices": bool(geometry.slice_distances),
        "several modes of the object": options.object_modes > 1, "a probe that changes": options.opr_modes > 0,
        "a binned detector": geometry.binning > 1, "fitted scales": options.fit_scale,
        "a fitted background": options.fit_background,
    }  # fmt: skip
    reasons = [name for name, holds in others.items() if holds]
    return reasons[0] if reasons else farfield.why_not(problem.like.device, problem.like.dtype, problem.scan.window)


def add_sums(problem: Problem, x: Unknowns, rows_B: Tensor, gradient: Unknowns, curvature: Unknowns | None) -> Tensor:
    """Adds the gradient of a chunk, and where positions have no fractions its curvature [Y, X]; [3] float64: loss, mismatch,
    counted."""
    place, counted = _patterns(problem, x, rows_B)
    lit = Lit(x["object_OLYX"][0, 0], _light(x["probe_MYX"], place), place.corner_B2, place.fraction_B2)
    of_object = None if gradient.object_OLYX is None else gradient.object_OLYX[0, 0]
    diagonal = None if curvature is None else Curvature(curvature.object_OLYX, curvature.probe_MYX)
    totals_3, of_light = farfield.farfield(lit, counted, of_object, gradient.probe_MYX is not None, diagonal)
    if of_light is not None:
        gradient["probe_MYX"].add_(of_light if place.fraction_B2 is None else ifft2(of_light, norm="ortho"))
    return totals_3


def misfit_along(problem: Problem, x: Unknowns, direction: Unknowns, lengths: list[float]) -> Tensor:
    """[K, 3] float64: misfit and two derivatives at lengths of a step of object and probe."""
    length_K = torch.tensor(lengths, dtype=torch.float64, device=problem.like.device)
    totals_K3 = torch.zeros(len(lengths), 3, dtype=torch.float64, device=problem.like.device)
    for rows_B in problem.chunks():
        totals_K3 += farfield.along(*_along(problem, x, direction, rows_B), length_K)
    return totals_K3


def products(problem: Problem, x: Unknowns, step: Unknowns, rows_B: Tensor) -> Tensor:
    """[B, 5] float64 products of a chunk's exit waves, changed by the step's object and by its probe, and their gradient."""
    return farfield.products(*_along(problem, x, step, rows_B))


def _along(problem: Problem, x: Unknowns, step: Unknowns, rows_B: Tensor) -> tuple[Lit, Step, Counted]:
    """What lies along a step of object and probe."""
    place, counted = _patterns(problem, x, rows_B)
    lit = Lit(x["object_OLYX"][0, 0], _light(x["probe_MYX"], place), place.corner_B2, place.fraction_B2)
    change = None if step.probe_MYX is None else _light(step.probe_MYX, place)
    return lit, Step(step["object_OLYX"][0, 0], change), counted


def _light(probe_MYX: Tensor, place: Place) -> Tensor:
    """As `Lit` has it."""
    return probe_MYX if place.fraction_B2 is None else fft2(probe_MYX, norm="ortho")


def _patterns(problem: Problem, x: Unknowns, rows_B: Tensor) -> tuple[Place, Counted]:
    """Where a chunk lies, and its patterns; in the order of stripes: what is at work together sees the same of the object."""
    position_B2 = x["positions_B2"][rows_B]
    stripe_B = (position_B2[:, 0] / STRIPE).floor()
    order_B = (stripe_B * x["object_OLYX"].shape[-1] + position_B2[:, 1]).argsort()
    stored_BYX, index_B = problem.counts.stored(rows_B)
    scale_B = x["scale_B"] if index_B is rows_B else x["scale_B"][rows_B]
    counted = Counted(stored_BYX, scale_B, index_B[order_B], problem.counts.weight_YX, x["background_YX"], problem.noise)
    return problem.model.place(x["positions_B2"], rows_B[order_B]), counted
