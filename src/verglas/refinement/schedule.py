"""When the sampling gets finer, how large the transforms are, and when the refinement is done. Pure: nothing is changed in place.

The rules are those of RELION's auto-refinement. Order within an iteration: `is_converged` (then set `converged`), `image_size`
and `coarse_size`, `perturb`, the accuracies of the poses, `update_sampling`, the expectation; then `monitor_changes` and, with
the new FSC in the state, `update_resolution`.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from verglas.core.memory import uploaded
from verglas.core.symmetry import symmetry_matrices
from verglas.refinement.config import RefineConfig
from verglas.refinement.state import HalfModel, Poses, Schedule, State

UNKNOWN = 999.0  # changes and accuracies that were not measured yet; no measured value is that large
_PATIENCE = 1  # iterations without gain, and without large changes, that are enough
_SAFE_SHARE = 0.75  # of the accuracy: a step finer than this gains nothing
_LARGEST_OFFSET_STEP = 1.5  # Å, after oversampling, once the grid is refined
_KEEP_SAFE = 1.2  # a coarse search sees details of the arc between two views over this
_LOCAL_REACH = 3.0  # standard deviations of the prior that a local search goes away from the last pose
_ACCURACY_SIGMAS = 3.035  # an error of the accuracy costs ln(100): sqrt(2 ln 100) standard deviations of the posterior
_LEAST_INFORMATION = 0.5  # share of it that the coarse pass of a local search must see
_SETTLED_SHARE = 0.40  # of a fine step: smaller changes count as none
_TOLERANCE = 1.03  # changes within 3 per cent of the smallest are not smaller
_PAIRS_AT_ONCE = 2**20  # (particle, symmetry mate) pairs compared at once


class _Verdict(Enum):
    FIRST = "kept: refined from the second iteration on"
    NOT_MEASURED = "kept: the accuracy of the poses was not estimated"
    GAINING = "kept: the resolution still improves"
    MOVING = "kept: the poses still change"
    FINE_ENOUGH = "kept: fine enough"
    REFINE = "refined"


def initial_schedule(config: RefineConfig, pixel_size: float) -> Schedule:
    """The schedule before the first iteration; offsets from px to Å. Searches start local if the grid is fine enough."""
    schedule = Schedule(
        healpix_order=config.healpix_order,
        oversampling=config.oversampling,
        offset_range=config.offset_range * pixel_size,
        offset_step=config.offset_step * pixel_size,
        best_resolution=config.initial_resolution,
    )
    return replace(schedule, local_sigma=_local_sigma(schedule, config))


def perturb(schedule: Schedule, config: RefineConfig, iteration: int) -> Schedule:
    """Draw the perturbation of an iteration from its number and the seed: the last one plus half to one times
    `config.perturbation`, wrapped into -perturbation ... perturbation."""
    limit = config.perturbation
    moved = schedule.perturbation + random.Random(config.seed + iteration).uniform(0.5 * limit, limit)
    return replace(schedule, perturbation=moved - 2 * limit if moved > limit else moved)


def image_size(state: State, config: RefineConfig) -> int:
    """Edge (px, even) of the transforms in the coming iteration: the resolution's shell and some more, at most the box.

    Far from the limit, when the halves agree at the edge (FSC above 0.2) and poses are sharp (mean largest posterior above 0.1:
    otherwise two blurred maps agree on nothing but zeros), a quarter of the box's shells more; the whole box when converged.
    """
    if state.schedule.converged:
        return state.box
    pmax = sum(half.average_pmax for half in state.halves) / len(state.halves)
    far = state.schedule.high_fsc_at_limit and pmax > 0.1
    more = _round(0.25 * state.box / 2) if far else state.schedule.size_increment
    return min(2 * (state.shell_of(state.current_resolution) + more), state.box)


def coarse_size(
    schedule: Schedule, config: RefineConfig, box: int, pixel_size: float, current_size: int, keep_safe: float = _KEEP_SAFE
) -> int:
    """Edge (px, even) of the transforms in the coarse search, which leaves out what blurs within a step at the particle's rim.

    diameter in Å, pixel_size in Å; keep_safe: finer than the arc between two views by this is left out. Without oversampling
    there is one search, at `current_size`.
    """
    if schedule.oversampling == 0:
        return current_size
    arc = schedule.angular_step / 360.0 * math.pi * config.diameter
    return min(2 * math.ceil(box * pixel_size * keep_safe / arc), current_size)


def local_coarse_size(state: State, largest: int) -> int:
    """Edge (px, even) of the transforms in the coarse pass of a local search: what makes both passes cheapest, at most `largest`.

    The coarse pass may look at any part of the data: fewer shells widen the posterior, so that more orientations are significant
    and have children to be compared, but these still hold the same share of its mass. A shell s tells about angles in proportion
    to s^3 times its signal over noise in the images (coefficients times the square of how far a turn moves them; in the map the
    ratio is s times less: the larger a shell of a volume, the fewer slices overlap in it). With a share f of what all shells
    tell, the posterior is f^-1/2 times as wide as the accuracy says; slices of all N orientations cost as the square of the
    size, those of the children are whole.
    """
    schedule, top = state.schedule, state.current_size // 2
    ratio = schedule.local_sigma / schedule.angular_step
    orientations = math.pi * (_LOCAL_REACH * ratio) ** 2 * (2 * _LOCAL_REACH * ratio + 1)
    width = schedule.accuracy_angles / _ACCURACY_SIGMAS / schedule.angular_step
    shell_S = torch.arange(1, top + 1, dtype=torch.float64)
    known_S = torch.stack([_angular_information(half, top) for half in state.halves]).amin(0)  # the least informed class
    wider_S = known_S.clamp_min(_LEAST_INFORMATION).rsqrt()
    cost_S = orientations * (shell_S / top) ** 2 + 8**schedule.oversampling * (1 + 2 * width * wider_S) ** 3
    best = int(cost_S.masked_fill(known_S < _LEAST_INFORMATION, torch.inf).argmin()) + 1
    return min(2 * best, largest)


def _angular_information(half: HalfModel, top: int) -> Tensor:
    """Share of what shells 1..top tell about angles that shells up to each of them tell, float64 [top]."""
    shell_S = torch.arange(1, top + 1, dtype=torch.float64)
    told_S = (shell_S**4 * half.ssnr_S[1 : top + 1].double().nan_to_num(0.0, 0.0, 0.0).clamp_min(0)).cumsum(0)
    return told_S / told_S[-1] if float(told_S[-1]) > 0 else (shell_S == top).double()


def update_sampling(state: State, config: RefineConfig) -> Schedule:
    """The sampling of the coming iteration: once resolution and poses have settled, one HEALPix order more, and offsets as fine
    as their accuracy asks for; or the note that the grid is fine enough. That note holds for as long as it is true: a blurred
    reference makes poses seem inaccurate. (RELION keeps it, and so may end on a grid that has meanwhile become too coarse.)

    Read: the counters, changes_offsets (last iteration) and the accuracies (of this iteration) of the schedule.
    """
    schedule = state.schedule
    verdict = _verdict(state)
    if verdict is _Verdict.FINE_ENOUGH:
        return replace(schedule, fine_enough=True)
    if verdict is not _Verdict.REFINE:
        return replace(schedule, fine_enough=schedule.fine_enough and _is_fine(schedule))
    offset_range, offset_step = _finer_offsets(schedule)
    finer = replace(
        schedule,
        healpix_order=schedule.healpix_order + 1,
        offset_range=offset_range,
        offset_step=offset_step,
        iterations_without_gain=0,
        iterations_without_changes=0,
        smallest_angles=UNKNOWN,
        smallest_offsets=UNKNOWN,
        fine_enough=False,
    )
    return replace(finer, local_sigma=_local_sigma(finer, config))


def finer_about_poses(schedule: Schedule) -> Schedule:
    """Undisplaced grids with steps half as large, searched locally about the poses that particles have."""
    reach, step = min(schedule.offset_range, 1.5 * schedule.offset_step), schedule.offset_step / 2
    finer = replace(
        schedule, healpix_order=schedule.healpix_order + 1, offset_range=reach, offset_step=step, perturbation=0.0
    )
    return replace(finer, local_sigma=2 * finer.fine_angular_step)


def explain_sampling(state: State, config: RefineConfig) -> str:
    """One line for the log: what `update_sampling` makes of this state, and why."""
    old, new, verdict = state.schedule, update_sampling(state, config), _verdict(state)
    step = f"angular step {old.fine_angular_step:.3g}°"
    match verdict:
        case _Verdict.REFINE:
            search = f"local searches, sigma {new.local_sigma:.3g}°" if new.local_sigma else "global searches"
            return (
                f"{step} {verdict.value} to {new.fine_angular_step:.3g}° ({search}): resolution and poses have settled, "
                f"poses are accurate to {old.accuracy_angles:.3g}°; offsets: range {new.offset_range:.3g} Å, "
                f"step {new.fine_offset_step:.3g} Å"
            )
        case _Verdict.FINE_ENOUGH:
            return f"{step} {verdict.value} for poses accurate to {old.accuracy_angles:.3g}°"
        case _Verdict.MOVING:
            return f"{step} {verdict.value}: {old.changes_angles:.3g}°, {old.changes_offsets:.3g} Å"
        case _Verdict.GAINING:
            return f"{step} {verdict.value}: {state.current_resolution:.4g} Å"
    return f"{step} {verdict.value}"


def monitor_changes(
    old_poses: Poses, new_poses: Poses, state: State, config: RefineConfig, device: torch.device | None = None
) -> Schedule:
    """The schedule with the changes of the poses (mean angle in degrees; rms offset along one axis in Å) and their counter.

    An iteration counts as one without large changes when angles and offsets each changed by less than 0.4 fine steps of the
    grid of the start, or by no less than the smallest change so far. (Of the start: in RELION the process that counts never
    hears of finer grids; measured by replaying its runs. Counting in present steps would hold fine grids longer.)
    The first iteration on a grid has nothing to be compared with and never counts. device: that compares the poses.
    """
    schedule = state.schedule
    new_B33, old_B33 = (uploaded(one.rotation_B33, device or one.rotation_B33.device) for one in (new_poses, old_poses))
    angles = float(axes_distance(new_B33, old_B33, config.symmetry).mean())
    moved = (new_poses.origin_B2 - old_poses.origin_B2).double()
    offsets = math.sqrt(float(moved.square().sum()) / (2 * len(moved)))
    fresh = schedule.smallest_angles == UNKNOWN
    start = initial_schedule(config, state.pixel_size)
    settled_angles = angles < _SETTLED_SHARE * start.fine_angular_step or _TOLERANCE * angles >= schedule.smallest_angles
    settled_offsets = offsets < _SETTLED_SHARE * start.fine_offset_step or _TOLERANCE * offsets >= schedule.smallest_offsets
    settled = settled_angles and settled_offsets and not fresh
    return replace(
        schedule,
        changes_angles=angles,
        changes_offsets=offsets,
        smallest_angles=min(angles, schedule.smallest_angles),
        smallest_offsets=min(offsets, schedule.smallest_offsets),
        iterations_without_changes=schedule.iterations_without_changes + 1 if settled else 0,
    )


def axes_distance(a_B33: Tensor, b_B33: Tensor, symmetry: str) -> Tensor:
    """RELION's distance of poses, degrees [B]: mean angle between corresponding image axes, smallest over the symmetry mates."""
    mates_G33 = symmetry_matrices(symmetry).to(a_B33.device)
    distances = []
    block = max(1, _PAIRS_AT_ONCE // len(mates_G33))
    for a_b33, b_b33 in zip(a_B33.double().split(block), b_B33.double().split(block), strict=True):
        cosine_bGi = (a_b33[:, None] * (b_b33[:, None] @ mates_G33)).sum(-1)
        distances.append(torch.rad2deg(cosine_bGi.clamp(-1, 1).acos()).mean(-1).amin(1))
    return torch.cat(distances)


def update_resolution(state: State, new_resolution: float) -> State:
    """The state with a new resolution (Å) and what follows from it and from the FSC of this iteration (fsc_S, current_size).

    Gain: more than 0.0001 1/Å. size_increment: at least the shells between the first FSC below 0.5 and below 0.143, and 5; never
    less than before. high_fsc_at_limit: FSC above 0.2 at the outermost shell used; stays true.
    """
    schedule = state.schedule
    gained = 1 / new_resolution > 1 / state.current_resolution + 0.0001
    first_half, first_seventh = _first_below(state.fsc_S, 0.5), _first_below(state.fsc_S, 0.143)
    high = bool(state.fsc_S[state.current_size // 2 - 1] > 0.2)
    updated = replace(
        schedule,
        iterations_without_gain=0 if gained else schedule.iterations_without_gain + 1,
        best_resolution=min(new_resolution, schedule.best_resolution),
        size_increment=max(schedule.size_increment, first_seventh - first_half + 5),
        high_fsc_at_limit=schedule.high_fsc_at_limit or high,
    )
    return replace(state, current_resolution=new_resolution, schedule=updated)


def is_converged(schedule: Schedule, config: RefineConfig) -> bool:
    """Whether the next iteration is the last: the grid is fine enough, neither resolution nor poses get better."""
    settled = min(schedule.iterations_without_gain, schedule.iterations_without_changes) >= _PATIENCE
    return schedule.fine_enough and settled


def _verdict(state: State) -> _Verdict:
    schedule = state.schedule
    if state.iteration < 1:
        return _Verdict.FIRST
    if schedule.iterations_without_gain < _PATIENCE:
        return _Verdict.GAINING
    if schedule.iterations_without_changes < _PATIENCE:
        return _Verdict.MOVING
    if UNKNOWN in (schedule.accuracy_angles, schedule.accuracy_offsets):
        return _Verdict.NOT_MEASURED
    return _Verdict.FINE_ENOUGH if _is_fine(schedule) else _Verdict.REFINE


def _is_fine(schedule: Schedule) -> bool:
    return schedule.fine_angular_step < _SAFE_SHARE * schedule.accuracy_angles


def _finer_offsets(schedule: Schedule) -> tuple[float, float]:
    """(range, coarse step) in Å for the next grid: five times the last change, three to nine offsets across."""
    step = min(_LARGEST_OFFSET_STEP, _SAFE_SHARE * schedule.accuracy_offsets) * 2**schedule.oversampling
    reach = min(1.3 * schedule.offset_range, 5 * schedule.changes_offsets)
    reach = max(reach, 1.5 * step)
    if reach > 4 * step:
        reach /= 2
    if reach > 4 * step:
        step = reach / 4
    if step > schedule.offset_step:  # never coarser than before
        return schedule.offset_range, schedule.offset_step
    return reach, step


def _local_sigma(schedule: Schedule, config: RefineConfig) -> float:
    """Spread of the orientation prior in degrees: two fine steps, so searches reach six; 0 while they are global."""
    local = schedule.healpix_order >= config.local_from_order or config.relax_symmetry is not None
    return 2 * schedule.fine_angular_step if local else 0.0


def _first_below(fsc_S: Tensor, threshold: float) -> int:
    """First shell with an FSC below a threshold, -1 if there is none."""
    below = torch.nonzero(fsc_S < threshold)
    return int(below[0]) if len(below) else -1


def _round(value: float) -> int:
    return math.floor(value + 0.5)
