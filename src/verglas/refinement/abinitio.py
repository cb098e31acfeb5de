"""First models without a reference: a stochastic gradient from random starts, then iterations with all particles.

Each step compares a few particles with all classes on the coarse grid and moves the sums of the maps towards theirs
(`maximization.running`); resolution and batches grow while the step shrinks and the noise cools. Then follow a few iterations
of 3-D classification with all particles, at last with the point group about the axes found in each map. The hand stays open:
images of a map and of its mirror image are the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from verglas.core.memory import make_room
from verglas.distributed.ranks import ALONE, Ranks
from verglas.expectation.images import ModelGrid
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.io.mrc import Map
from verglas.maximization.halves import solve_single
from verglas.maximization.reference import flatten, low_pass
from verglas.maximization.running import accumulator_of, prior_power, stepped
from verglas.maximization.sums import half_plane_counts, updated_noise, updated_offset_sigma
from verglas.particles.table import ParticleTable
from verglas.refinement import classes, driver
from verglas.refinement import schedule as sampling
from verglas.refinement.abinitio_schedule import (
    STEPS_PER_ROUND,
    Stage,
    Step,
    offset_grid,
    resolutions,
    rounds,
    stage_of,
    step_of,
)
from verglas.refinement.abinitio_symmetry import (
    PlaceOnAxes,
    ProposeGroup,
    decided,
    is_due,
    on_axes,
    symmetry_begins,
    with_group,
)
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import AbInitioConfig
from verglas.refinement.dataset import Dataset, Progress
from verglas.refinement.driver import Session, quiet
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.plan import RunPlan
from verglas.refinement.state import HalfModel, State, same_everywhere
from verglas.refinement.step import Iteration, Stopwatch, copied, store

BLOBS = 40  # of either sign
KEPT = 0.9  # of noise, shares and spread of offsets in a step
SMALLEST_SHARE = 0.3  # of an equal share: no class dies during the gradient
GRADIENT_MASS = 0.95  # of the posterior that a gradient step works with
GRADIENT_PADDING = 1.0
OFFSET_SIGMA = 0.04  # of the diameter, at the start


def prepare(
    table: ParticleTable, config: AbInitioConfig, device: torch.device | str = "cpu", threads: int | None = None,
    progress: Progress | None = None, planned: RunPlan | None = None, ranks: Ranks = ALONE,
) -> Session:  # fmt: skip
    """Read the images, estimate their noise, draw the first random maps. InputError for images that cannot be used."""
    group = table.groups[0]
    config = replace(config, initial_offset_sigma=OFFSET_SIGMA * config.diameter)
    first, last = resolutions(config, group.pixel_size)
    first_config = replace(config, initial_resolution=first)
    blobs_ZYX = random_blobs(group.box, config.diameter / group.pixel_size, config.seed)
    start = Map(blobs_ZYX.numpy(), group.pixel_size)
    session = driver.prepare(table, start, replace(first_config, symmetry="C1"), device, threads, progress, planned, ranks)
    notices = [*session.notices, f"The gradient goes from {first:.3g} Å to {last:.3g} Å."]
    state = _random_start(replace(session.state, classified=True), config, 0)
    return replace(session, state=state, config=replace(config, symmetry=driver.normalise_name(config.symmetry)), notices=notices)


def iterations(
    session: Session, progress: Progress | None = None, place: PlaceOnAxes | None = None, propose: ProposeGroup | None = None
) -> Iterator[Iteration]:
    """All iterations from the session's state on: rounds of the gradient, then those with all particles.

    place: finds the axes of the point group in a map; propose: finds the point group, where the options ask for it. ValueError
    if one of them is needed and not given.
    """
    state, given = session.state, session.config
    assert isinstance(given, AbInitioConfig)
    if given.find_symmetry and propose is None:
        raise ValueError("a point group that is to be found needs `propose`")
    if (given.find_symmetry or given.symmetry != "C1") and place is None:
        raise ValueError("a point group needs `place`, which finds its axes")
    while stage_of(state.iteration + 1, decided(given, state)) is not None:
        config, notes = decided(given, state), list[str]()
        make_room(session.on.device, session.on.memory)
        if place is not None and symmetry_begins(state, config):
            state, notes = on_axes(state, config, place)
        done = iterate(state, session.data, config, session.on, session.mask_ZYX, progress or quiet)
        done = replace(done, notes=[*notes, *done.notes])
        if propose is not None and is_due(done.state, config):
            done = with_group(done, propose)
        state = same_everywhere(done.state, session.on.ranks)
        yield replace(done, state=state, communication=session.on.ranks.communication())


def iterate(
    state: State, data: Dataset, config: AbInitioConfig, on: Computing, mask_ZYX: Tensor | None, progress: Progress
) -> Iteration:
    """The iteration after `state`; `state` itself stays as it is. mask_ZYX: the user's, None for a sphere."""
    stage, notes = stage_of(state.iteration + 1, config), list[str]()
    if stage is Stage.GRADIENT:
        return gradient_round(state, data, config, on, mask_ZYX, progress)
    if stage_of(state.iteration, config) is Stage.GRADIENT:
        state = replace(state, schedule=sampling.initial_schedule(config, state.pixel_size))
    if stage is Stage.COMPARE:
        state = replace(state, halves=_all_candidates(state))
    done = classes.iterate(state, data, full_config(config, stage, state.pixel_size), on, mask_ZYX, progress)
    new = done.state
    if stage is Stage.COMPARE:
        new, notes = _best_restart(new, config)
    return replace(done, state=new, notes=[*notes, *done.notes])


def full_config(config: AbInitioConfig, stage: Stage | None, pixel_size: float) -> AbInitioConfig:
    """The options of an iteration with all particles: images to the gradient's last resolution, and the point group, if it is
    its turn."""
    symmetry = config.symmetry if stage is Stage.SYMMETRIC else "C1"
    last = resolutions(config, pixel_size)[1]
    return replace(config, symmetry=symmetry, absolute_greyscale=True, limit_resolution=last)


def gradient_round(
    state: State, data: Dataset, config: AbInitioConfig, on: Computing, mask_ZYX: Tensor | None, progress: Progress
) -> Iteration:
    """`STEPS_PER_ROUND` gradient steps; a new random start before the first one of a restart."""
    watch, notes, first = Stopwatch(on), list[str](), state.iteration * STEPS_PER_ROUND
    restart, round_of = divmod(state.iteration, rounds(config))
    if round_of == 0 and restart > 0:
        state = _random_start(state, config, restart)
        notes.append(f"Restart {restart + 1} of {config.restarts}: new random maps.")
    steps = [step_of(first + i, len(data), state.pixel_size, config) for i in range(STEPS_PER_ROUND)]
    done, total = 0, sum(len(step.rows) for step in steps)
    state = replace(state, iteration=state.iteration + 1, poses=copied(state.poses))
    for number, step in enumerate(steps, first):
        with watch("expectation"):
            part = _expect(state, data, config, on, step, number)
            if data.shares is not None:
                data.shares.board.next_round()  # all ranks have added up the step before
            found = list(part.run(step.rows))
            part.release()
            on.ranks.meet("expectation")
            store(state.poses, found, on)
            part.add_up_slices()
            part.add_up_sums()
        with watch("maximization"):
            state = gradient_step(state, part, step, config, mask_ZYX)
        done += len(step.rows)
        progress("expectation", done, total)
    resolution = state.resolution_of(state.current_size // 2)
    if state.iteration % rounds(config) == 0:
        maps = [model.map_ZYX.cpu() for model in state.halves]
        state = replace(state, candidates=[*state.candidates, *maps] if config.restarts > 1 else [], running=[])
    state = replace(state, current_resolution=resolution, schedule=part.plan.schedule)
    return Iteration(state, watch.seconds, notes, part.plan.grid.direction_D2)


def gradient_step(
    state: State, part: HalfExpectation, step: Step, config: AbInitioConfig, mask_ZYX: Tensor | None
) -> State:
    """Maps, noise and shares after a batch. The first step, by correlation, gives the maps the images' grey scale."""
    radius, first = part.plan.model_grid.radius, part.plan.correlate
    count, sums = len(step.rows), part.sums
    running: list[Tensor | None] = [*state.running] or [None] * len(state.halves)
    share_C = _shares(state, sums.direction_D, first)
    noise_GS = state.halves[0].sigma2_noise_GS
    if not first:
        noise_GS = torch.lerp(updated_noise(sums, noise_GS, half_plane_counts(state.box)), noise_GS, KEPT)
    spread = updated_offset_sigma(sums, state.halves[0].offset_sigma)
    spread = KEPT * state.halves[0].offset_sigma + (1 - KEPT) * spread
    pmax = sums.pmax / max(sums.particles, 1)
    models, kept = [], []
    for k, (model, accumulator, volume) in enumerate(zip(state.halves, part.accumulators, part.volumes, strict=True)):
        running_V3 = stepped(running[k], accumulator, count, 1.0 if first else step.size)
        kept.append(running_V3)
        prior_S = prior_power(volume, radius if first else state.current_size // 2, radius)
        whole = accumulator_of(running_V3 * step.temperature, state.box, radius, GRADIENT_PADDING, count / step.size)
        solution = solve_single(whole, "C1", prior_S if not first else torch.full_like(prior_S, 1e6), config.tau2_fudge)
        map_ZYX = flatten(solution.map_ZYX, config.diameter / 2 / state.pixel_size, config.mask_edge, mask_ZYX).float()
        curves = {name: getattr(solution, name).cpu() for name in ("tau2_S", "sigma2_S", "ssnr_S", "coverage_S")}
        prior_D = torch.full_like(model.direction_prior_D, float(share_C[k]) / len(model.direction_prior_D))
        models.append(replace(model, map_ZYX=map_ZYX, direction_prior_D=prior_D, sigma2_noise_GS=noise_GS, offset_sigma=spread,
                              average_pmax=pmax, log_likelihood=sums.log_likelihood, **curves))  # fmt: skip
    return replace(state, halves=models, running=kept, current_size=2 * radius)


def random_blobs(box: int, diameter_px: float, seed: int) -> Tensor:
    """A random start [N, N, N] float32: Gaussian blobs about a centre that lie as a particle of that diameter might.

    exp(-(10 d / D)^2) at centres drawn with a standard deviation of D / 6 along each axis; the negative ones at half weight.
    """
    draw = torch.Generator().manual_seed(seed)
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    centre_N3 = torch.randn(2 * BLOBS, 3, generator=draw, dtype=torch.float64) * diameter_px / 6
    weight_N = torch.tensor([1.0] * BLOBS + [-0.5] * BLOBS, dtype=torch.float64)
    profile_3NX = torch.exp(-((axis - centre_N3.T[:, :, None]) * (10 / diameter_px)).square())
    x_NX, y_NY, z_NZ = profile_3NX
    return torch.einsum("n,nz,ny,nx->zyx", weight_N, z_NZ, y_NY, x_NX).float()


def _random_start(state: State, config: AbInitioConfig, restart: int) -> State:
    """New random maps, nothing known of poses or shares."""
    first, diameter_px = resolutions(config, state.pixel_size)[0], config.diameter / state.pixel_size
    count = len(state.halves[0].direction_prior_D)
    flat_D = torch.full((count,), 1 / count / config.classes, dtype=torch.float64)
    models = []
    for k in range(config.classes):
        seed = config.seed + 1000 * (restart * config.classes + k)
        blobs_ZYX = low_pass(random_blobs(state.box, diameter_px, seed), first, state.pixel_size)
        map_ZYX = flatten(blobs_ZYX, diameter_px / 2, config.mask_edge)
        models.append(replace(state.halves[0], map_ZYX=map_ZYX, direction_prior_D=flat_D))
    poses = copied(state.poses)
    poses.origin_B2.zero_()
    size = 2 * state.shell_of(first)
    return replace(state, halves=models, poses=poses, running=[], current_resolution=first, current_size=size)


def _expect(state: State, data: Dataset, config: AbInitioConfig, on: Computing, step: Step, number: int) -> HalfExpectation:
    """The expectation of a step, ready to run: a randomly turned grid, with children once the images tell more than it."""
    radius = min(max(state.shell_of(step.resolution), 3), state.box // 2)
    once = replace(state.schedule, oversampling=1)
    coarse = min(sampling.coarse_size(once, config, state.box, state.pixel_size, 2 * radius) // 2, radius)
    twice = int(coarse < radius and bool(state.running))  # what the coarse grid cannot tell is left to a finer one
    turn = random.Random(config.seed + number).uniform(-0.5, 0.5)
    reach, spacing = offset_grid(config, step.resolution * 2**twice, state.pixel_size)
    schedule = replace(state.schedule, oversampling=twice, perturbation=turn, offset_range=reach, offset_step=spacing)
    grid = OrientationGrid.build(schedule.healpix_order, twice, "C1", turn)
    offsets = OffsetGrid.build(reach, spacing, twice, turn)
    model_grid = ModelGrid(state.box, state.pixel_size, radius, coarse if twice else radius, GRADIENT_PADDING)
    plan = Plan(grid, offsets, model_grid, schedule, correlate=not state.running)
    own = replace(config, correct_norm=False, correct_scale=False, adaptive_fraction=GRADIENT_MASS)
    models = [replace(one, sigma2_noise_GS=one.sigma2_noise_GS * step.temperature) for one in state.halves]
    origin_B2 = torch.zeros_like(state.poses.origin_B2)
    return HalfExpectation(models, data, replace(state.poses, origin_B2=origin_B2), plan, own, on)


def _shares(state: State, direction_D: Tensor, first: bool) -> Tensor:
    """Shares of the classes after a batch, none much smaller than an equal one [C]."""
    n = len(state.halves)
    seen_C = direction_D.view(n, -1).sum(1)
    seen_C = seen_C / seen_C.sum()
    if first:
        return torch.full_like(seen_C, 1 / n)
    old_C = torch.stack([model.direction_prior_D.sum() for model in state.halves]).to(seen_C)
    share_C = torch.lerp(seen_C, old_C, KEPT).clamp_min(SMALLEST_SHARE / n)
    return share_C / share_C.sum()


def _all_candidates(state: State) -> list[HalfModel]:
    """The maps of all restarts as so many classes."""
    models, n = state.halves, len(state.candidates)
    size = len(models[0].direction_prior_D)
    flat_D = torch.full((size,), 1 / size / n, dtype=torch.float64)
    like = [models[i % len(models)] for i in range(n)]
    return [replace(one, map_ZYX=map_ZYX, direction_prior_D=flat_D) for one, map_ZYX in zip(like, state.candidates)]


def _best_restart(state: State, config: AbInitioConfig) -> tuple[State, list[str]]:
    """The classes of the restart that most particles prefer."""
    share_RC = torch.stack([model.direction_prior_D.sum() for model in state.halves]).view(config.restarts, -1)
    share_R = share_RC.sum(1)
    best = int(share_R.argmax())
    chosen = state.halves[best * config.classes : (best + 1) * config.classes]
    models = [replace(model, direction_prior_D=model.direction_prior_D / share_R[best]) for model in chosen]
    poses = copied(state.poses)
    poses.class_B %= config.classes
    text = ", ".join(f"{100 * float(share):.0f} %" for share in share_R)
    note = f"Restarts explain {text} of the particles best: number {best + 1} is kept."
    return replace(state, halves=models, poses=poses), [note]
