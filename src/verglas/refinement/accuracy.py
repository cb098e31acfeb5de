"""The expected accuracy of poses before an iteration, and what the iteration will look like."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from verglas.expectation.accuracy import MOST_PARTICLES, drawn_axes, expected_accuracy
from verglas.expectation.images import ModelGrid
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.refinement import schedule as sampling
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset
from verglas.refinement.expect import HalfExpectation, leave_references
from verglas.refinement.state import Schedule, State


def plan_of(state: State, config: RefineConfig, correlate: bool) -> Plan:
    """Grids and sizes of the coming iteration."""
    schedule = state.schedule
    coarse = sampling.coarse_size(schedule, config, state.box, state.pixel_size, state.current_size)
    if schedule.local_sigma and schedule.oversampling:
        coarse = sampling.local_coarse_size(state, coarse)
    grid = OrientationGrid.build(schedule.healpix_order, schedule.oversampling, config.symmetry, schedule.perturbation)
    offsets = OffsetGrid.build(schedule.offset_range, schedule.offset_step, schedule.oversampling, schedule.perturbation)
    scored = state.shell_of(config.limit_resolution) if config.limit_resolution else None
    coarse = coarse if scored is None else min(coarse, 2 * scored)
    model_grid = ModelGrid(state.box, state.pixel_size, state.current_size // 2, coarse // 2, config.padding, scored)
    return Plan(grid, offsets, model_grid, schedule, correlate)


def measure_accuracy(state: State, data: Dataset, config: RefineConfig, on: Computing) -> Schedule:
    """Expected accuracy of angles (degrees) and offsets (Å), from the first half-set's model and 100 of its particles.

    In a classification: of the largest class, whose particles' poses it is, too. The ranks that have that half-set share the
    particles; the others make their own reference meanwhile, as these have theirs then.
    """
    best = max(range(len(state.halves)), key=lambda k: float(state.halves[k].direction_prior_D.sum())) if state.classified else 0
    mine_B = state.poses.class_B == best if state.classified else state.poses.half_B == int(state.poses.half_B.min())
    first = mine_B.nonzero().squeeze(1)
    if len(first) == 0:
        return state.schedule
    first = first[data.group_B[first] == data.group_B[first[0]]][:MOST_PARTICLES]
    group, place = int(data.group_B[first[0]]), sharing(mine_B, data, on)
    turn = slice(*place) if place else slice(0, 0)
    error_2B = torch.zeros(2, len(first), dtype=torch.float64)
    if len(mine := first[turn]) or on.in_layers:
        half = HalfExpectation([state.halves[best]], data, state.poses, plan_of(state, config, False), config, on)
        if len(mine):
            searcher, weight_BK = half.weights(mine, group)
            rotation_B33, axes_2B = state.poses.rotation_B33[mine], drawn_axes(len(first), config.seed)[:, turn]
            found = expected_accuracy(searcher.full, rotation_B33, weight_BK, searcher.preparer.pixels, 0, axes_2B)
            error_2B[:, turn] = torch.stack([found.angle_B, found.offset_B])
        half.release().leave_references()
    elif place is None and not state.classified:
        own = [model for number, model in enumerate(state.halves) if number != best]
        leave_references(own, plan_of(state, config, False).model_grid, on)
    on.ranks.meet("accuracy: all")
    angle, offset = on.ranks.add_up(error_2B, "accuracy").mean(1).tolist()
    return replace(state.schedule, accuracy_angles=angle, accuracy_offsets=offset * data.groups[group].pixel_size)


def sharing(mine_B: Tensor, data: Dataset, on: Computing) -> tuple[int, None, int] | None:
    """Which of the chosen particles this rank measures with, as a slice: it shares them with all ranks, or where half-sets are
    apart with those that have any of these particles. None: it has none of them."""
    ranks, shares = on.ranks, data.shares
    if shares is None or shares.half_B is None:
        return ranks.rank, None, ranks.size
    have = torch.bincount(shares.owner_B[mine_B], minlength=ranks.size).nonzero().squeeze(1).tolist()
    return (have.index(ranks.rank), None, len(have)) if ranks.rank in have else None
