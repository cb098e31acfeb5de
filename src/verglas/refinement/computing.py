"""Where an expectation runs, and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from verglas.distributed.ranks import ALONE, Ranks
from verglas.expectation.images import ModelGrid
from verglas.expectation.in_plane import InPlaneGrid
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.expectation.slices import Reference
from verglas.refinement.config import Align
from verglas.refinement.helpers import NOBODY, Helpers
from verglas.refinement.plan_sizes import Turns
from verglas.refinement.state import Schedule


@dataclass(frozen=True)
class Computing:
    """Where and how the expectation runs. dtype: of images and sums; operand: of the factors of matrix products; memory: bytes
    that the arrays of a batch may take, and as many those of slices; ranks: processes that share the work; helpers: of this rank,
    on CPU cores beside its GPU; cells: half-precision references as cells, too (`FourierVolume`); in_layers: every rank has
    layers of references and sums (`InLayers`); ready: references made before, for the next expectation; turns: of half-sets;
    most_held: bytes of a GPU that are to be held at most: before large arrays would take more, what lies unused between others is
    given back."""

    device: torch.device
    dtype: torch.dtype
    operand: torch.dtype
    memory: float
    ranks: Ranks = ALONE
    helpers: Helpers = NOBODY
    cells: bool = True
    in_layers: bool = False
    ready: list[Reference] = field(default_factory=list, compare=False)
    turns: Turns = "overlapping"
    most_held: float = float("inf")


@dataclass(frozen=True)
class Plan:
    """What an iteration does: grids, sizes (shells), whether it scores by correlation (first iteration), what it searches, and
    how many coarse samples of a particle count at most (0: any number)."""

    grid: OrientationGrid | InPlaneGrid
    offsets: OffsetGrid
    model_grid: ModelGrid
    schedule: Schedule
    correlate: bool
    align: Align = "all"
    most: int = 0

    @property
    def own_lists(self) -> bool:
        """Whether each particle has orientations of its own: in local searches, or the one it came with."""
        return self.align != "all" or self.schedule.local_sigma > 0
