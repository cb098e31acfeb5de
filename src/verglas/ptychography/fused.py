"""Sums over positions by the kernels of `farfield`, where a problem is of their kind: fewer walks through memory.

Far field, one slice and one mode of the object, one probe (of any modes) for all positions, patterns as they were counted, no
scale or background to be fitted; on a GPU single precision and windows of their sizes. Everything else goes through
`model.Model`: `why_not` tells the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.fft import fft2, ifft2

from verglas.kernels import farfield
from verglas.kernels.farfield import Counted, Lit, Step
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


def add_sums(problem: Problem, x: Unknowns, rows_B: Tensor, gradient: Unknowns) -> Tensor:
    """Adds the gradient of a chunk; [3] float64: loss, mismatch, counted."""
    (rows_B,) = in_order(problem, x, [rows_B])
    place = problem.model.place(x["positions_B2"], rows_B)
    lit, counted = patterns_of(problem, x, place)
    of_object = None if gradient.object_OLYX is None else gradient.object_OLYX[0, 0]
    found = farfield.farfield(lit, counted, of_object, gradient.probe_MYX is not None)
    if found.light_MYX is not None:
        gradient["probe_MYX"].add_(unmoved(found.light_MYX, place))
    return found.totals_3


def misfit_along(problem: Problem, x: Unknowns, direction: Unknowns, lengths: list[float]) -> Tensor:
    """[K, 3] float64: misfit and two derivatives at lengths of a step of object and probe."""
    length_K = torch.tensor(lengths, dtype=torch.float64, device=problem.like.device)
    totals_K3 = torch.zeros(len(lengths), 3, dtype=torch.float64, device=problem.like.device)
    for rows_B in problem.chunks():
        (rows_B,) = in_order(problem, x, [rows_B])
        place = problem.model.place(x["positions_B2"], rows_B)
        change = None if direction.probe_MYX is None else light(direction.probe_MYX, place)
        lit, counted = patterns_of(problem, x, place)
        totals_K3 += farfield.along(lit, Step(direction["object_OLYX"][0, 0], change), counted, length_K)
    return totals_K3


def in_order(problem: Problem, x: Unknowns, batches: list[Tensor]) -> list[Tensor]:
    """Each of several batches in the order of stripes: what is at work together sees the same of the object."""
    if problem.counts.blocks is not None:
        return batches  # travel in the order in which they are asked for
    rows_N = torch.cat(batches)
    sizes = [len(rows_B) for rows_B in batches]
    if not len(rows_N):
        return batches
    position_N2 = x["positions_B2"][rows_N]
    stripe_N = (position_N2[:, 0] / STRIPE).floor() * x["object_OLYX"].shape[-1] + position_N2[:, 1]
    number_N = torch.from_numpy(np.repeat(np.arange(len(batches)), sizes)).to(rows_N.device)  # 8 ms by 32 threads of torch
    order_N = (stripe_N + number_N * (2 * x["object_OLYX"].numel())).argsort()
    return list(rows_N[order_N].split(sizes))


def patterns_of(problem: Problem, x: Unknowns, place: Place) -> tuple[Lit, Counted]:
    """Light, object and patterns of a chunk, which is the last one that was handed out."""
    lit = Lit(x["object_OLYX"][0, 0], light(x["probe_MYX"], place), place.corner_B2, place.fraction_B2)
    stored_BYX, index_B = problem.counts.stored(place.rows_B)
    scale_B = x["scale_B"] if index_B is place.rows_B else x["scale_B"][place.rows_B]
    counted = Counted(stored_BYX, scale_B, index_B, problem.counts.weight_YX, x["background_YX"], problem.noise)
    return lit, counted


def light(probe_MYX: Tensor, place: Place) -> Tensor:
    """A probe as `Lit` has it."""
    return probe_MYX if place.fraction_B2 is None else fft2(probe_MYX, norm="ortho")


def unmoved(light_MYX: Tensor, place: Place) -> Tensor:
    """From the gradient of light as `Lit` has it to that of the probe."""
    return light_MYX if place.fraction_B2 is None else ifft2(light_MYX, norm="ortho")
