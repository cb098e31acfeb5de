"""What a search for first models asks of its maps: their point group and its axes, and how much independent starts agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from verglas.refinement.abinitio_symmetry import Placed, Proposed
    from verglas.refinement.state import State

CONSISTENCY_RESOLUTION, CONSISTENCY_ROTATIONS = 20.0, 1152  # Å; of the search for the best overlap
MOST_COMPARED = 3  # classes of a restart, each with all of another restart
LARGE_CLASS = 0.5  # of an equal share: smaller classes are not asked for their point group
CANDIDATES_TOLD = 4


def place_on_axes(map_ZYX: Tensor, pixel_size: float, symmetry: str) -> Placed:
    """The map [N, N, N] (Å/px) turned and moved onto the axes that are found in it."""
    from verglas.postprocess.find_symmetry import align_to_group, aligned
    from verglas.refinement.abinitio_symmetry import Placed

    map_ZYX = map_ZYX.cpu()
    found = align_to_group(map_ZYX, pixel_size, symmetry)
    return Placed(aligned(map_ZYX, pixel_size, found), found.rotation_33, found.centre_3, found.mean)


def propose_group(maps: Sequence[Tensor], shares: Sequence[float], pixel_size: float) -> Proposed:
    """The point group that every map [N, N, N] (Å/px) of a large class shows; C1 where they differ or none holds."""
    from verglas.postprocess.find_symmetry import HOLDS, OF_BEST, find_symmetry
    from verglas.refinement.abinitio_symmetry import Proposed

    groups, weakest, notes = [], [], []
    for number, (map_ZYX, share) in enumerate(zip(maps, shares, strict=True), 1):
        if share < LARGE_CLASS / len(maps):
            continue
        found = find_symmetry(map_ZYX.cpu(), pixel_size)
        groups.append(found.best.name)
        weakest.append(found.best.weakest)
        tried = ", ".join(f"{one.name} {one.weakest:.2f}" for one in found.candidates[:CANDIDATES_TOLD]) or "none comes near"
        notes.append(f"Class {number} shows {found.best.name}. Agreement with the worst of its turned copies: {tried}; the best "
                     f"group needs {HOLDS:g}, a larger one {OF_BEST:g} of the best.")  # fmt: skip
    if len(set(groups)) == 1 and groups[0] != "C1":
        return Proposed(groups[0], min(weakest), [*notes, f"Point group: {groups[0]}."])
    reason = "the classes differ" if len(set(groups)) > 1 else "no turned copy agrees well enough"
    return Proposed("C1", 1.0, [*notes, f"Point group: C1, {reason}."])


def consistency_of(state: State, classes: int) -> float:
    """Mean correlation of the maps of two restarts at 20 Å, aligned in the better hand; of the classes that are most alike, for
    the first classes of each restart."""
    from itertools import combinations

    from verglas.maximization.reference import low_pass
    from verglas.postprocess.align import align

    device = state.halves[0].map_ZYX.device
    maps = [low_pass(map_ZYX.float(), CONSISTENCY_RESOLUTION, state.pixel_size).to(device) for map_ZYX in state.candidates]
    restarts = [maps[first : first + classes] for first in range(0, len(maps), classes)]
    found = []
    for one, other in combinations(restarts, 2):
        pairs = [[align(a, b, CONSISTENCY_ROTATIONS, True, smooth=True).correlation for b in other] for a in one[:MOST_COMPARED]]
        found += [max(row) for row in pairs]
    return sum(found) / len(found)
