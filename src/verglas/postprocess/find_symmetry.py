"""The point group of a map, from how well the map agrees with copies of itself.

1. `self_correlation.prepare`: a small map at about 20 Å, shells of equal power, no spherical mean.
2. `self_correlation.axis_scores`: n-fold axes among a thousand directions.
3. Each group is laid on the best axes of its highest order, turned about them in steps, and polished: the rotation of its
   frame and its centre maximise the mean correlation of the map with all copies that the group makes.
4. A group holds if the worst of its operations does: the largest that holds is proposed, C1 if none does.

A map that has a symmetry at 20 Å may lack it at 3 Å: the proposal is to be tested by refinements with and without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.rotations import rotation_about_axis
from verglas.core.shells import fsc
from verglas.core.sphere import even_directions
from verglas.core.symmetry import symmetry_matrices
from verglas.core.symmetry_names import normalise_name
from verglas.core.threads import few_threads
from verglas.errors import InputError
from verglas.postprocess import mapops
from verglas.postprocess.align import best_placed, even_rotations
from verglas.postprocess.self_correlation import (
    SmallMap,
    axis_scores,
    copies,
    correlations,
    onto_z,
    prepare,
)

RESOLUTION = 15.0  # Å
HIGHEST_FOLD = 12
PROPOSED = (*(f"C{n}" for n in range(2, HIGHEST_FOLD + 1)), *(f"D{n}" for n in range(2, HIGHEST_FOLD + 1)), "T", "O", "I")
MAIN_FOLD = {"T": 3, "O": 4, "I": 5}
HOLDS = 0.65  # share of the ceiling that every operation of the best group must reach (figures: benchmarks/NOTES.md)
OF_BEST = 0.75  # of what the best group reaches, for every operation of another: noise lowers all operations alike
WORTH_A_LOOK = 0.15  # score of an axis that groups are laid on
DIRECTIONS = 1000  # about 5 degrees apart
AXES_KEPT, AXES_APART = 2, 20.0  # per order; degrees
TURN_STEP = 4.0  # degrees, of a group about its main axis
OPERATIONS_POLISHED = 8


@dataclass(frozen=True)
class Candidate:
    """A group laid on a map.

    weakest, mean: correlation of the map with its copies, over all operations but the identity, as a share of what noise
    allows (`SmallMap.ceiling`); rotation_33: A, from the map's frame to the group's standard axes; centre_3: (x, y, z) from
    the centre voxel, Å.
    """

    name: str
    weakest: float
    mean: float
    rotation_33: Tensor
    centre_3: Tensor

    @property
    def order(self) -> int:
        """Number of operations."""
        return len(symmetry_matrices(self.name))


@dataclass(frozen=True)
class FoundSymmetry:
    """best: the proposal; candidates: what was tried, best of each group, by `weakest`; control: 95th percentile of the
    correlation with copies turned at random; frequency_S (1/Å), agreement_S, control_S: mean FSC with the copies of `best`
    (zeros for C1), and with those turned at random; resolution: Å, of the comparison."""

    best: Candidate
    candidates: list[Candidate]
    control: float
    frequency_S: Tensor
    agreement_S: Tensor
    control_S: Tensor
    resolution: float


@few_threads()
def find_symmetry(
    map_ZYX: Tensor, pixel_size: float, resolution: float = RESOLUTION, groups: Sequence[str] = PROPOSED
) -> FoundSymmetry:
    """Propose the point group of a map [Z, Y, X], density positive, anywhere in its box and in any orientation.

    resolution: Å, what detail takes part; groups: those to try. Raises InputError for a map without density.
    """
    if not float(map_ZYX.max()) > float(map_ZYX.min()):
        raise InputError("map", "all voxels have one value", "a density map")
    resolution = max(resolution, 2.5 * pixel_size)
    small = prepare(map_ZYX, pixel_size, resolution)
    direction_D3 = even_directions(DIRECTIONS, hemisphere=True)
    score_DN = axis_scores(small, direction_D3, HIGHEST_FOLD)
    tried = []
    for name in groups:
        score_D = score_DN[:, main_axis(name)[0] - 2]
        axes = [i for i in _peaks(direction_D3, score_D) if score_D[i] > WORTH_A_LOOK]
        laid = [lay_on_axis(small, name, direction_D3[i]) for i in axes]
        tried += sorted(laid, key=lambda one: one.weakest)[-1:]
    tried.sort(key=lambda one: -one.weakest)
    none = Candidate("C1", 1.0, 1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    return _with_curves(small, choose(tried) or none, tried)


@few_threads()
def align_to_group(map_ZYX: Tensor, pixel_size: float, symmetry: str, resolution: float = RESOLUTION) -> Candidate:
    """Lay a group that is known (Cn or Dn with n up to 12, T, O, I) on the map, however badly it fits."""
    name = normalise_name(symmetry)
    small = prepare(map_ZYX, pixel_size, max(resolution, 2.5 * pixel_size))
    direction_D3 = even_directions(DIRECTIONS, hemisphere=True)
    fold, _ = main_axis(name)
    if fold > HIGHEST_FOLD:
        raise InputError("--sym", name, f"an axis of at most {HIGHEST_FOLD}-fold symmetry")
    score_D = axis_scores(small, direction_D3, HIGHEST_FOLD)[:, fold - 2]
    return max((lay_on_axis(small, name, direction_D3[i]) for i in _peaks(direction_D3, score_D)), key=lambda one: one.mean)


def aligned(map_ZYX: Tensor, pixel_size: float, found: Candidate) -> Tensor:
    """The map with the group's axes where `verglas.core.symmetry` has them, through the centre voxel."""
    return mapops.rotate(map_ZYX, found.rotation_33, -(found.rotation_33 @ found.centre_3) / pixel_size)


def choose(tried: Sequence[Candidate]) -> Candidate | None:
    """The largest group whose worst operation holds beside that of the best group; None if not even that one holds."""
    best = max((one.weakest for one in tried), default=0.0)
    holding = [one for one in tried if best >= HOLDS and one.weakest >= OF_BEST * best]
    return max(holding, key=lambda one: (one.order, one.weakest), default=None)


def main_axis(name: str) -> tuple[int, Tensor]:
    """Order and direction (unit vector) of the axis that a group is laid on the map by."""
    fold = MAIN_FOLD.get(name[0]) or int(name[1:])
    if name[0] in "CD":
        return fold, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    trace = 1 + 2 * math.cos(2 * math.pi / fold)  # of a turn by 360 / fold
    turn = next(one for one in symmetry_matrices(name) if abs(float(one.trace()) - trace) < 1e-6)
    axis_3 = torch.stack([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    return fold, axis_3 / axis_3.norm()


def lay_on_axis(small: SmallMap, name: str, axis_3: Tensor) -> Candidate:
    """The group with its main axis near `axis_3`: the best turn about it, then rotation and centre polished."""
    fold, main_3 = main_axis(name)
    operation_R33 = _one_of_each_pair(symmetry_matrices(name)[1:])
    upright_33, back_33 = onto_z(axis_3[None])[0], onto_z(main_3[None])[0].T
    off_axis = [one for one in operation_R33 if (one @ main_3 - main_3).norm() > 1e-6]
    centre_3 = torch.zeros(3, dtype=torch.float64)
    frame_33 = back_33 @ upright_33
    if off_axis:
        turns = torch.arange(0, 360 / fold, TURN_STEP).tolist()
        frame_T33 = torch.stack([back_33 @ rotation_about_axis((0, 0, 1), turn) @ upright_33 for turn in turns])
        score_T = correlations(small.map_ZYX, frame_T33.mT @ off_axis[0] @ frame_T33, centre_3)
        frame_33 = frame_T33[int(score_T.argmax())]
    few_R33 = operation_R33[:: math.ceil(len(operation_R33) / OPERATIONS_POLISHED)]
    frame_33, centre_3 = _polish(small.map_ZYX, frame_33, centre_3, few_R33)
    score_R = correlations(small.map_ZYX, frame_33.T @ operation_R33 @ frame_33, centre_3) / small.ceiling
    centre_3 = small.centre_3 + centre_3 * small.pixel_size
    return Candidate(name, float(score_R.min()), float(score_R.mean()), frame_33, centre_3)


def _polish(map_ZYX: Tensor, frame_33: Tensor, centre_3: Tensor, operation_R33: Tensor) -> tuple[Tensor, Tensor]:
    """Maximise the mean correlation over the frame's rotation and the centre (px)."""

    def mean_correlation(frame_33: Tensor, centre_3: Tensor) -> Tensor:
        return correlations(map_ZYX, frame_33.T @ operation_R33 @ frame_33, centre_3).mean()

    _, frame_33, centre_3 = best_placed(mean_correlation, frame_33, centre_3, map_ZYX.shape[0], rounds=15, tolerance=1e-5)
    return frame_33, centre_3


def _with_curves(small: SmallMap, best: Candidate, tried: list[Candidate]) -> FoundSymmetry:
    """What shells the proposal rests on, beside copies turned at random."""
    map_ZYX = small.map_ZYX
    box = map_ZYX.shape[0]
    centre_3 = (best.centre_3 - small.centre_3) / small.pixel_size if best.name != "C1" else torch.zeros(3, dtype=torch.float64)
    random_R33 = even_rotations(64)

    def mean_fsc(rotation_R33: Tensor) -> Tensor:
        return torch.stack([fsc(one, map_ZYX) for one in copies(map_ZYX, rotation_R33, centre_3)]).mean(0)

    operation_R33 = _one_of_each_pair(symmetry_matrices(best.name)[1:])
    frame_33 = best.rotation_33
    agreement_S = mean_fsc(frame_33.T @ operation_R33 @ frame_33) if len(operation_R33) else torch.zeros(box // 2 + 1)
    control = float(correlations(map_ZYX, random_R33, centre_3).quantile(0.95))
    frequency_S = torch.arange(box // 2 + 1) / (box * small.pixel_size)
    return FoundSymmetry(best, tried, control, frequency_S, agreement_S, mean_fsc(random_R33), small.resolution)


def _peaks(direction_D3: Tensor, score_D: Tensor) -> list[int]:
    """Positions of the best directions, `AXES_APART` from each other."""
    kept: list[int] = []
    for i in score_D.argsort(descending=True).tolist():
        cosine = max((abs(float(direction_D3[i] @ direction_D3[j])) for j in kept), default=0.0)
        if cosine < math.cos(math.radians(AXES_APART)):
            kept.append(i)
        if len(kept) == AXES_KEPT:
            break
    return kept


def _one_of_each_pair(operation_R33: Tensor) -> Tensor:
    """Operations without the inverses of others: a map agrees with a copy as well as the copy does with the map."""
    kept: list[Tensor] = []
    for one in operation_R33:
        if not any((one.T - other).abs().max() < 1e-6 for other in kept):
            kept.append(one)
    return torch.stack(kept) if kept else operation_R33
