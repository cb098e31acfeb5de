"""3-D classification: all particles against K references at once, no half-sets (RELION facts 3.9, 4.3, 4.8, 5.6, 6.2).

The sampling stays fixed; a class's prior is the power of the reference that its particles were compared with, times tau2_fudge.
Several classes from one reference begin as one, and are divided once poses have settled (`settle`), or at random.
`prepare` a session, then take `iterations` from it. Nothing is written or printed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.core.masks import soft_sphere
from verglas.distributed.ranks import ALONE, Ranks
from verglas.errors import InputError
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.io.mrc import Map, read_map
from verglas.maximization.halves import Solution, solve_single
from verglas.maximization.reference import check_mask, initial_reference, initial_ssnr, low_pass, volume_spectrum
from verglas.maximization.sums import joined_classes
from verglas.particles.table import ParticleTable
from verglas.projection.volume import FourierVolume
from verglas.refinement import driver, settle
from verglas.refinement import schedule as sampling
from verglas.refinement.accuracy import measure_accuracy, plan_of
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import ClassifyConfig, RefineConfig
from verglas.refinement.dataset import Dataset, Progress
from verglas.refinement.driver import Session, quiet, repeated
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.plan import RunPlan
from verglas.refinement.state import HalfModel, Poses, State
from verglas.refinement.step import (
    MINIMUM_SHELL,
    Iteration,
    ParticleSet,
    Stopwatch,
    expect,
    reference_mask,
    updated_model,
)

FINE_ITERATIONS, FINE_SHARE = 4, 4  # the last ones, but no more than a quarter

__all__ = ["Session", "class_figures", "iterations", "prepare"]


@dataclass(frozen=True)
class ClassFigures:
    """share: of the posterior weight; resolution: Å, where the SSNR falls below 1; particles: whose best class it is."""

    share: float
    resolution: float
    particles: int


def prepare(
    table: ParticleTable, references: list[Map], config: ClassifyConfig, device: torch.device | str = "cpu",
    threads: int | None = None, progress: Progress | None = None, planned: RunPlan | None = None, ranks: Ranks = ALONE,
) -> Session:  # fmt: skip
    """As `driver.prepare`, for K = config.classes references, or a single one that all classes start from.

    Raises InputError if there are more than one, but not as many as classes.
    """
    if len(references) not in (1, config.classes):
        raise InputError("--reference", f"{len(references)} maps for {config.classes} classes", "one map, or one per class",
                         "With one map the particles are divided once their poses have settled.")  # fmt: skip
    session = driver.prepare(table, references[0], config, device, threads, progress, planned, ranks)
    state, group, notices = session.state, table.groups[0], list(session.notices)
    first = state.halves[0]
    mask = soft_sphere(state.box, config.diameter / 2 / state.pixel_size, config.mask_edge)
    maps = [first.map_ZYX]
    for number, reference in enumerate(references[1:], 2):
        map_ZYX, said = initial_reference(reference, group.box, group.pixel_size, config.initial_resolution)
        maps.append(map_ZYX.float() * mask)
        notices += [f"Reference {number}: {text}" for text in said]
    maps *= config.classes if len(maps) == 1 else 1
    if config.start == "settle":
        del maps[len(references) :]
    models = [_first_model(first, map_ZYX, len(table), replace(config, classes=len(maps))) for map_ZYX in maps]
    schedule = replace(state.schedule, local_sigma=config.local_sigma or state.schedule.local_sigma)
    return replace(session, state=replace(state, halves=models, schedule=schedule, classified=True), notices=notices)


def iterations(session: Session, progress: Progress | None = None) -> Iterator[Iteration]:
    """As many iterations as the configuration asks for, from the session's state on."""
    config = session.config
    assert isinstance(config, ClassifyConfig)

    def after(state: State) -> Iteration:
        return iterate(state, session.data, config, session.on, session.mask_ZYX, progress or quiet)

    return repeated(session, after, maps=False)


def iterate(
    state: State, data: Dataset, config: ClassifyConfig, on: Computing, mask_ZYX: Tensor | None, progress: Progress
) -> Iteration:
    """The iteration after `state`; `state` itself stays as it is. mask_ZYX: the user's, None for a sphere."""
    watch, notes = Stopwatch(on), list[str]()
    number, division = state.iteration + 1, None
    if settle.is_settling(state, config):
        with watch("division"):
            division = settle.divided(state, data, config, on, mask_ZYX, progress)
        notes.append(settle.SETTLING if division is None else division.note)
        if division is not None:
            state, config = division.begin(state), replace(config, align="none")
    correlate = number == 1 and not config.absolute_greyscale
    size = sampling.image_size(state, config)
    with watch("accuracy"):
        state = replace(sampled(state, config, number), iteration=number, current_size=size)
        if number > 1:
            state = replace(state, schedule=measure_accuracy(state, data, config, on))
    plan = classes_plan(state, config, correlate)
    sets = particle_sets(state, config, correlate) if division is None else division.sets(state)
    with watch("expectation"):
        parts, poses = expect(sets, state.poses, data, config, on, plan, progress)
        name_classes(poses, sets, state.rest)
        if division is None and len(sets) > 1 and state.rest < 0:
            notes.append(f"All references are the same: the particles were divided among the {len(sets)} classes at random.")
    notes += [notice for part in parts for notice in part.notices]
    with watch("maximization"):
        new = maximise(replace(state, poses=poses), parts, config, mask_ZYX, correlate)
        new = with_resolution(focused(new, config), config, correlate)
        new = settle.with_apart(replace(new, schedule=changes(state.poses, new, config, on.device)))
    notes += empty_classes(state, new)
    return Iteration(new, watch.seconds, notes, plan.grid.direction_D2)


def sampled(state: State, config: ClassifyConfig, number: int) -> State:
    """With the grids of iteration `number`: displaced, but for the last ones of several, whose classes and poses are the result.

    A grid of an asymmetric unit that is turned by a whole step leaves out a part of the unit's rim; particles seen from there
    get wrong poses and, 2 to 4 % of those in D2, wrong classes. The last grids are also finer by one order, searched about the
    poses found so far: how well a particle fits should not depend on how far from a grid's point it lies, or what lies far
    counts as fitting no class.
    """
    left = config.max_iterations - number
    if config.max_iterations == 1 or left >= min(FINE_ITERATIONS, max(1, config.max_iterations // FINE_SHARE)):
        return replace(state, schedule=sampling.perturb(state.schedule, config, number))
    if config.align != "all" or state.schedule.local_sigma or number == 1:
        return replace(state, schedule=replace(state.schedule, perturbation=0.0))
    schedule = sampling.finer_about_poses(state.schedule)
    count = OrientationGrid.build(schedule.healpix_order, schedule.oversampling, config.symmetry, 0.0).n_directions
    flat_D = torch.full((count,), 1 / count, dtype=torch.float64)
    halves = [replace(one, direction_prior_D=float(one.direction_prior_D.sum()) * flat_D) for one in state.halves]
    return replace(state, schedule=schedule, halves=halves)


def name_classes(poses: Poses, sets: list[ParticleSet], rest: int) -> None:
    """Particles that were compared with one class belong to it, those that fit none to the one for the rest."""
    if len(sets) > 1:
        alone = len(sets[0].models) == 1
        for number, one in enumerate(sets):
            if alone or number == 1:
                poses.class_B[one.rows] = number if alone else rest


def focused(state: State, config: ClassifyConfig) -> State:
    """With the map of every class its own inside the focus mask, outside it the mean of all, weighted by their shares.

    The class for the rest keeps its map, and has no part in the mean.
    """
    if config.focus_mask is None or len(state.halves) == 1:
        return state
    models = state.halves
    mask_ZYX = check_mask(read_map(config.focus_mask), state.box, state.pixel_size, str(config.focus_mask))
    mask_ZYX = mask_ZYX.to(models[0].map_ZYX.device)
    share_C = [0.0 if k == state.rest else float(model.direction_prior_D.sum()) for k, model in enumerate(models)]
    mean_ZYX = sum(share * model.map_ZYX for share, model in zip(share_C, models)) / max(sum(share_C), 1e-9)
    maps = [mask_ZYX * model.map_ZYX + (1 - mask_ZYX) * mean_ZYX for model in models]
    kept = enumerate(zip(models, maps, strict=True))
    return replace(state, halves=[model if k == state.rest else replace(model, map_ZYX=own) for k, (model, own) in kept])


def classes_plan(state: State, config: ClassifyConfig, correlate: bool) -> Plan:
    """Grids and sizes of the coming iteration; where nothing is searched, the only offset is the one a particle has."""
    plan = replace(plan_of(state, config, correlate), align=config.align)
    return replace(plan, offsets=OffsetGrid.build(0.0, state.pixel_size, 0)) if config.align == "none" else plan


def particle_sets(state: State, config: ClassifyConfig, correlate: bool) -> list[ParticleSet]:
    """Which particles are compared with which references.

    All with all, those that fit no class by themselves; unless all references are the same: then the first iteration by
    correlation needs one of them only, and the next one divides the particles among the classes at random.
    """
    n, models = len(state.poses.half_B), state.halves
    everyone = torch.arange(n)
    if len(models) == 1 or not all(torch.equal(models[0].map_ZYX, model.map_ZYX) for model in models[1:]):
        return settle.sets_with_rest(state)
    if correlate:
        return [ParticleSet(models[:1], everyone)]
    draw = torch.Generator().manual_seed(config.seed + state.iteration)
    drawn_B = torch.randperm(n, generator=draw) % len(models)
    return [ParticleSet([model], (drawn_B == k).nonzero().squeeze(1)) for k, model in enumerate(models)]


def maximise(
    state: State, parts: list[HalfExpectation], config: ClassifyConfig, mask_ZYX: Tensor | None, correlate: bool
) -> State:
    """New maps, noise and priors. Where one reference stood for all classes, each gets its map; an empty class keeps its own."""
    if len(parts) > 1 and len(parts[0].models) > 1:
        sums, accumulators, volumes = settle.with_rest(parts, state.rest)
    else:
        sums = joined_classes([part.sums for part in parts])
        accumulators = [one for part in parts for one in part.accumulators]
        volumes = [one for part in parts for one in part.volumes]
    shared = updated_model(state.halves[0], sums, state, state.poses, 1, correlate, config)
    priors_CD = shared.direction_prior_D.view(len(accumulators), -1)
    mask = reference_mask(state, config, mask_ZYX, accumulators[0].running_V4.device)
    models = []
    for k, (sums_of_class, volume) in enumerate(zip(accumulators, volumes, strict=True)):
        solution = None
        if float(priors_CD[k].sum()) > 0:
            solution = solve_single(sums_of_class, config.symmetry, volume_spectrum(volume), config.tau2_fudge, mask > 0)
        models.append(_next_model(shared, state.halves[k], priors_CD[k], solution, mask))
    if correlate:
        models = [_blurred(model, config, state.pixel_size, volumes[0]) for model in models]
    if len(models) < len(state.halves):
        count = len(state.halves)
        models = [replace(models[0], direction_prior_D=models[0].direction_prior_D / count) for _ in range(count)]
    return replace(state, halves=models)


def with_resolution(state: State, config: ClassifyConfig, correlate: bool) -> State:
    """The resolution of the best class; after a first iteration by correlation that of the reference (facts 4.8)."""
    if correlate:
        return replace(state, current_resolution=config.initial_resolution)
    best = max(last_shell(model, state) for model in state.halves)
    return sampling.update_resolution(state, state.resolution_of(best))


def class_figures(state: State) -> list[ClassFigures]:
    """Share, resolution and number of particles of each class."""
    counts_C = torch.bincount(state.poses.class_B, minlength=len(state.halves)).tolist()
    return [
        ClassFigures(float(model.direction_prior_D.sum()), state.resolution_of(last_shell(model, state)), count)
        for model, count in zip(state.halves, counts_C)
    ]


def _first_model(half: HalfModel, map_ZYX: Tensor, particles: int, config: ClassifyConfig) -> HalfModel:
    """What a class begins with: its reference, and an equal share of the particles."""
    tau2_S, ssnr_S = initial_ssnr(map_ZYX, half.sigma2_noise_GS, particles / config.classes, config.tau2_fudge)
    prior_D = half.direction_prior_D / config.classes
    return replace(half, map_ZYX=map_ZYX, direction_prior_D=prior_D, tau2_S=tau2_S, ssnr_S=ssnr_S)


def _next_model(
    shared: HalfModel, old: HalfModel, prior_D: Tensor, solution: Solution | None, mask_ZYX: Tensor
) -> HalfModel:
    """A class's model: what all share, its own priors, and its new map, or the old one where it has no particles."""
    names = ("tau2_S", "sigma2_S", "ssnr_S", "coverage_S")
    if solution is None:
        own = {name: getattr(old, name) for name in names}
        return replace(shared, map_ZYX=old.map_ZYX, direction_prior_D=prior_D, **own)
    own = {name: getattr(solution, name).cpu() for name in names}
    return replace(shared, map_ZYX=(solution.map_ZYX * mask_ZYX).float(), direction_prior_D=prior_D, **own)


def _blurred(model: HalfModel, config: ClassifyConfig, pixel_size: float, like: FourierVolume) -> HalfModel:
    """On the right grey scale after scoring by correlation, but no better than the reference: low-passed again."""
    map_ZYX = low_pass(model.map_ZYX.to(like.values.device), config.initial_resolution, pixel_size)
    return replace(model, map_ZYX=map_ZYX)


def last_shell(model: HalfModel, state: State) -> int:
    """The shell before the signal-to-noise ratio first falls below 1."""
    low = (model.ssnr_S[1 : state.current_size // 2 + 1] < 1).nonzero().squeeze(1)
    return max(int(low[0]) if len(low) else state.current_size // 2, MINIMUM_SHELL)


def changes(before: Poses, state: State, config: RefineConfig, device: torch.device | None = None) -> sampling.Schedule:
    """The schedule with the changes of poses and classes. device: that compares them."""
    schedule = sampling.monitor_changes(before, state.poses, state, config, device)
    changed = float((before.class_B != state.poses.class_B).double().mean())
    return replace(schedule, changes_classes=changed)


def empty_classes(before: State, after: State) -> list[str]:
    """A note for each class that has lost its last particle in this iteration."""
    pairs = enumerate(zip(before.halves, after.halves, strict=True), 1)
    return [
        f"Class {number} has no particles any more: it stays empty, its map is the last one it had."
        for number, (old, new) in pairs
        if float(old.direction_prior_D.sum()) > 0 and float(new.direction_prior_D.sum()) == 0
    ]
