"""How well each particle of a 2-D classification fits its class, judged without its own noise.

The particles of a class are dealt into two halves, and each half is averaged at the poses that were found. Every particle X, of
CTF C and noise sigma^2, is then compared with the average A of the half that it is not in:

    fit = sum Re(C A conj(X)) / sigma^2 / sqrt(sum |C A|^2 / sigma^2)

This is how far the particle stands out of the noise through the filter that its class matches it with, in standard deviations:
once with all coefficients, once with details finer than a sixth of the diameter alone. Against the average of its own class it
would be larger by what its own noise brings in, most in the smallest classes. Pure noise has up to 4, as its pose is the best of
many. Both sums are needed: blobs, edges and gaps between neighbours have coarse features in common but no details; weak
particles have details that are no stronger than what noise brings in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from verglas.core.masks import soft_circle
from verglas.expectation.images import Prepared
from verglas.expectation.search import Searcher
from verglas.maximization.planes import solve_planes
from verglas.projection.planes import FourierPlanes
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import Classify2dConfig
from verglas.refinement.dataset import Dataset
from verglas.refinement.plane_expect import PlaneExpectation
from verglas.refinement.state import State

FINER = 6.0  # details are those finer than this part of the diameter


def class_fits(state: State, data: Dataset, plan: Plan, config: Classify2dConfig, on: Computing) -> Tensor:
    """Fits of every particle by all coefficients and by details, float64 [B, 2]. state: with the classes and poses of an
    iteration of this plan."""
    count = len(state.halves)
    work = PlaneExpectation([*state.halves, *state.halves], data, state.poses, plan, config, on)
    class_B, half_B = state.poses.class_B, halves_of(state.poses.class_B, config.seed)
    for rows, searcher, prepared in at_own_poses(work):
        work.add_whole(searcher, prepared, state.poses.rotation_B33[rows], class_B[rows] + count * half_B[rows])
    tau2_CS = torch.stack([model.tau2_S for model in work.models]).to(on.device)
    image_CYX = solve_planes(work.averages, tau2_CS, config.tau2_fudge).image_CYX
    image_CYX *= soft_circle(state.box, config.diameter / 2 / state.pixel_size, config.mask_edge, on.device)
    planes = FourierPlanes.from_images(image_CYX, plan.model_grid.radius, config.padding, on.device, on.dtype)
    coarsest = min(round(FINER * state.box * state.pixel_size / config.diameter), (plan.model_grid.radius + 1) // 2)
    fit_B2 = torch.zeros(len(data), 2, dtype=torch.float64)
    for rows, searcher, prepared in at_own_poses(work):
        preparer = searcher.preparer
        inverse_K = (1 / work.common_S)[preparer.shell_K].to(prepared.weight_BK)
        other_B = (class_B[rows] + count * (1 - half_B[rows])).to(on.device)
        turn_B33 = state.poses.rotation_B33[rows].to(on.device)
        slice_B2K = planes.slices(turn_B33, other_B, preparer.coordinates_K3, inverse_K)
        used_K2 = torch.stack([torch.ones_like(inverse_K), (preparer.shell_K >= coarsest).to(inverse_K)], 1)
        cross_B2 = (prepared.scored_B2K * slice_B2K).sum(1) @ used_K2
        power_B2 = (prepared.weight_BK * slice_B2K.square().sum(1)) @ used_K2
        fit_B2[rows] = (cross_B2 / power_B2.clamp_min(1e-12).sqrt()).double().cpu()
    return fit_B2


def halves_of(class_B: Tensor, seed: int) -> Tensor:
    """Which half of its class each particle is dealt into: 0 or 1, int64 [B]."""
    draw = torch.Generator().manual_seed(seed)
    order_B = torch.randperm(len(class_B), generator=draw)
    order_B = order_B[torch.argsort(class_B[order_B], stable=True)]  # class after class, at random within each
    sorted_B = class_B[order_B]
    first_C = torch.searchsorted(sorted_B, torch.arange(int(class_B.max()) + 1))
    half_B = torch.empty_like(class_B)
    half_B[order_B] = (torch.arange(len(class_B)) - first_C[sorted_B]) % 2
    return half_B


def at_own_poses(work: PlaneExpectation) -> Iterator[tuple[Tensor, Searcher, Prepared]]:
    """Rows of batches, the searcher of their optics group, and the images moved by the whole of their offsets."""
    for rows, group in work.batches(torch.arange(len(work.data))):
        searcher, prepared = work.prepared(rows, group)
        rest_B2 = work.origin_B2[rows.to(work.on.device)] / work.data.groups[group].pixel_size
        rest_B2 = rest_B2 - work.whole_B2[group][rows.to(work.on.device)]
        yield rows, searcher, prepared.moved(rest_B2, searcher.preparer.pixels)
