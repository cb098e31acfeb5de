"""The point group in a search for first models: proposed by the maps if it was not given, and laid on each of them late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verglas.expectation.sampling import OrientationGrid
from verglas.refinement.abinitio_schedule import Stage, stage_of
from verglas.refinement.config import AbInitioConfig
from verglas.refinement.state import State
from verglas.refinement.step import Iteration, copied


@dataclass(frozen=True)
class Placed:
    """map_ZYX(R (r - centre)) = a given map(r), so that the axes found in that map stand where the point group has them.

    rotation_33: R; centre_3: (x, y, z), Å from the centre voxel; correlation: of the map with its copies turned by the group.
    """

    map_ZYX: Tensor
    rotation_33: Tensor
    centre_3: Tensor
    correlation: float


@dataclass(frozen=True)
class Proposed:
    """group: the point group that the maps show; weakest: agreement with the worst of their turned copies (1 at best, and for
    C1); notes: the scores of each map."""

    group: str
    weakest: float
    notes: list[str] = field(default_factory=list)


PlaceOnAxes = Callable[[Tensor, float, str], Placed]
"""Map [N, N, N], pixel size in Å, point group -> the map on the group's axes."""

ProposeGroup = Callable[[Sequence[Tensor], Sequence[float], float], Proposed]
"""Maps of the classes, their shares of the particles, pixel size in Å -> the point group of all of them."""


def decided(config: AbInitioConfig, state: State) -> AbInitioConfig:
    """The options with the point group that was found, once it was."""
    if not config.find_symmetry or not state.found_group:
        return config
    return replace(config, symmetry=state.found_group, find_symmetry=False)


def is_due(state: State, config: AbInitioConfig) -> bool:
    """Whether the point group is to be found now: the iterations without it are over."""
    return config.find_symmetry and stage_of(state.iteration + 1, config) is Stage.SYMMETRIC


def with_group(done: Iteration, propose: ProposeGroup) -> Iteration:
    """The iteration with the point group that its maps show in its state, and their scores in its notes."""
    state = done.state
    shares = [float(model.direction_prior_D.sum()) for model in state.halves]
    found = propose([model.map_ZYX for model in state.halves], shares, state.pixel_size)
    state = replace(state, found_group=found.group, found_agreement=found.weakest)
    return replace(done, state=state, notes=[*done.notes, *found.notes])


def symmetry_begins(state: State, config: AbInitioConfig) -> bool:
    """Whether the coming iteration is the first with the point group."""
    now, before = stage_of(state.iteration + 1, config), stage_of(state.iteration, config)
    return now is Stage.SYMMETRIC and before is not Stage.SYMMETRIC


def on_axes(state: State, config: AbInitioConfig, place: PlaceOnAxes) -> tuple[State, list[str]]:
    """Maps and poses turned so that the symmetry axes found in each map stand where the point group has them."""
    poses, notes, models = copied(state.poses), list[str](), []
    count = OrientationGrid.build(state.schedule.healpix_order, 0, config.symmetry, 0.0).n_directions
    for k, model in enumerate(state.halves):
        found = place(model.map_ZYX, state.pixel_size, config.symmetry)
        notes.append(f"Class {k + 1}: {config.symmetry} axes found, correlation with its turned copies {found.correlation:.2f}.")
        mine = poses.class_B == k
        turned_B33 = poses.rotation_B33[mine]
        moved_B2 = (turned_B33 @ found.centre_3)[:, :2]
        poses.rotation_B33[mine] = turned_B33 @ found.rotation_33.T
        poses.origin_B2[mine] -= moved_B2
        share = float(model.direction_prior_D.sum())
        flat_D = torch.full((count,), share / count, dtype=torch.float64)
        models.append(replace(model, map_ZYX=found.map_ZYX.to(model.map_ZYX), direction_prior_D=flat_D))
    return replace(state, halves=models, poses=poses), notes
