"""Adding up what all ranks have found of the sets of particles, so that maps can be solved for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verglas.maximization.accumulate import table_of
from verglas.maximization.solvers import LARGEST_BOX, Frame, Solvers, collect
from verglas.maximization.sums import added_up
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import RefineConfig
from verglas.refinement.expect import HalfExpectation


def add_up(sets: Sequence[HalfExpectation], plan: Plan, config: RefineConfig, on: Computing, apart: bool) -> Solvers | None:
    """Add up the sums of all ranks, which end on the ranks that solve with them. apart: each rank has half-sets apart. Returns
    who solves for either, None where ranks solve in slabs or there is one."""
    solvers = None
    if apart and by_single_ranks(plan, config, on):
        slices = [one.slices for one in sets]
        solvers = Solvers.agreed(on.ranks, plan.model_grid.box, slices, on.device)
    if solvers is None:
        for one in sets:
            one.add_up_slices(share=True)
    else:
        frame = frame_of(plan, on)
        for number, one in enumerate(sets):
            mine = one.accumulators[0] if one.slices or solvers.mine == number else None
            collect(mine, frame.rows.count, number, solvers, frame.like)
    for one, sums in zip(sets, added_up([one.sums for one in sets], on.ranks), strict=True):
        one.sums = sums  # GPUs would mistake this for a piece of what is under way before that has arrived
    return solvers


def by_single_ranks(plan: Plan, config: RefineConfig, on: Computing) -> bool:
    """Whether one rank is to solve for each half-set's map (`verglas.maximization.solvers`): not where both half maps are needed
    in one place (the last iteration, an FSC inside a mask), nor where messages are coded, as these are cut into slabs."""
    ways = on.ranks.ways
    if not ways.share_solving or ways.solvers is False or ways.compress:
        return False
    if plan.schedule.converged or config.solvent_corrected_fsc:
        return False
    return bool(ways.solvers) or plan.model_grid.box <= LARGEST_BOX


def frame_of(plan: Plan, on: Computing) -> Frame:
    """What all ranks know of the sums of an iteration."""
    grid = plan.model_grid
    rows = table_of(grid.box, grid.radius, grid.padding, on.device)
    return Frame(grid.box, grid.padding, rows, torch.empty(0, dtype=on.dtype, device=on.device))
