"""2-D classification: all particles against K class averages, turned and shifted (RELION facts 5.6, 6.1).

It starts from one average of random particles at random in-plane angles (a few, where there are few iterations), and the largest
classes are divided until there are all: from K averages of random particles some views get several classes, others share one.
Until three fifths of the iterations are over, classes that have nearly died out, or that show what a larger one shows, are given
up for one more division; after that a class that loses its last particle stays empty: it keeps its average and is reported.

Iterations see all particles (EM), or batches of them until the last few (the gradient, see `classify2d_schedule`). A batch
moves the sums of every class, from which its average is made, a step towards the batch's (`maximization.running`); both parts
of a class that is divided forget the sums, which say nothing of how they differ.

The sampling stays fixed; a class's prior is the power of the average that its particles were compared with, times tau2_fudge.
`prepare` a session, then take `iterations` from it. Nothing is written or printed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2, centred_rfft2, half_plane_pixels
from verglas.core.masks import soft_circle
from verglas.distributed.ranks import ALONE, Ranks
from verglas.expectation.classes import ClassGrid
from verglas.expectation.images import ModelGrid
from verglas.expectation.in_plane import InPlaneGrid
from verglas.expectation.sampling import OffsetGrid
from verglas.maximization.planes import (
    PlaneShells,
    PlaneSolution,
    centring_shifts,
    low_pass_planes,
    moved_planes,
    plane_spectra,
    solve_planes,
)
from verglas.maximization.running import NOTHING, stepped_planes
from verglas.particles.table import ParticleTable
from verglas.projection.planes import FourierPlanes
from verglas.refinement import schedule as sampling
from verglas.refinement.class_fit import class_fits
from verglas.refinement.class_quality import central, class_qualities
from verglas.refinement.classes import changes, empty_classes, last_shell
from verglas.refinement.classify2d_schedule import (
    DIVIDING,
    Step,
    coarse_radius,
    first_count,
    mode_notice,
    next_count,
    step_of,
)
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import Classify2dConfig
from verglas.refinement.dataset import Dataset, Progress, micrograph_groups
from verglas.refinement.driver import Session, computing, first_noise, initial_poses, quiet, repeated
from verglas.refinement.model_fit import model_fits
from verglas.refinement.plan import RunPlan
from verglas.refinement.plane_expect import PlaneExpectation
from verglas.refinement.residency import Residency
from verglas.refinement.state import HalfModel, State, flat_spectrum, same_everywhere
from verglas.refinement.step import Iteration, ParticleSet, Stopwatch, expect, updated_model

__all__ = ["Session", "iterations", "prepare"]
SAMPLES_PER_CLASS = 1  # significant coarse samples of a particle, at most (facts 3.6): early posteriors are broad
DEAD = 0.1  # of the mean share of a class
SETTLING, ALIKE = 3, 0.65  # iterations between looks for twins; likeness of twins (0.55 to 0.85; of other views 0.2 to 0.5)
FEWEST_SAMPLES = 20
PER_START = 300  # particles at most in one of the averages that it starts from


def prepare(
    table: ParticleTable, config: Classify2dConfig, device: torch.device | str = "cpu", threads: int | None = None,
    progress: Progress | None = None, planned: RunPlan | None = None, ranks: Ranks = ALONE,
) -> Session:  # fmt: skip
    """Read the images, estimate their noise, draw the first averages. Arguments and errors as of `driver.prepare`."""
    on, chosen = computing(torch.device(device), config, threads)
    on, residency = replace(on, ranks=ranks), Residency()
    if planned is not None:
        on, residency = replace(on, memory=planned.working_memory), planned.residency
    data = Dataset.read(table, on.device, residency, progress, ranks)
    state = initial_state(table, first_noise(data, config, ranks), config)
    state = same_everywhere(with_first_averages(state, data, config, on), ranks)
    chosen["residency"] = residency.reason
    return Session(state, data, config, on, None, [residency.reason, mode_notice(config, len(table))], chosen)


def initial_state(table: ParticleTable, sigma2_noise_GS: Tensor, config: Classify2dConfig) -> State:
    """The state before there are averages."""
    group, count = table.groups[0], first_count(config)
    micrograph_B, micrographs = micrograph_groups(table)
    flat_S = flat_spectrum(group.box // 2 + 1)
    model = HalfModel(
        torch.zeros(group.box, group.box), sigma2_noise_GS, torch.full((1,), 1 / count, dtype=torch.float64),
        config.initial_offset_sigma, 1.0, torch.ones(len(micrographs), dtype=torch.float64), flat_S, flat_S, flat_S, flat_S,
    )  # fmt: skip
    poses = initial_poses(table, torch.ones(len(table), dtype=torch.int64), micrograph_B)
    schedule = replace(sampling.initial_schedule(config, group.pixel_size), psi_step=360.0 / _grid(config).n_psi, local_sigma=0.0)
    return State(
        0, [model] * count, poses, schedule, group.box, group.pixel_size, config.initial_resolution, group.box, flat_S,
        micrographs, classified=True,
    )  # fmt: skip


def with_first_averages(state: State, data: Dataset, config: Classify2dConfig, on: Computing) -> State:
    """The state with averages of particles drawn at random, at random in-plane angles, low-passed."""
    sized = replace(state, current_size=sampling.image_size(state, config))
    half = PlaneExpectation(sized.halves, data, sized.poses, plan_of(sized, config), config, on)
    draw = torch.Generator().manual_seed(config.seed)
    rows = torch.randperm(len(data), generator=draw)[: PER_START * len(state.halves)]
    half.add_at_random(rows, config.seed)
    image_CYX = low_pass_planes(solve_planes(half.averages, None).image_CYX, config.initial_resolution, state.pixel_size)
    image_CYX *= _mask(state, config, on)
    return replace(state, halves=[replace(state.halves[0], map_ZYX=image_YX) for image_YX in image_CYX])


def iterations(session: Session, progress: Progress | None = None) -> Iterator[Iteration]:
    """As many iterations as the configuration asks for, from the session's state on."""
    config = session.config
    assert isinstance(config, Classify2dConfig)
    return repeated(session, lambda state: iterate(state, session.data, config, session.on, progress or quiet))


def iterate(state: State, data: Dataset, config: Classify2dConfig, on: Computing, progress: Progress) -> Iteration:
    """The iteration after `state`; `state` itself stays as it is."""
    watch = Stopwatch(on)
    number = state.iteration + 1
    state, notes = grown(state, config)
    schedule = sampling.perturb(state.schedule, config, number)
    state = replace(state, iteration=number, schedule=schedule, current_size=sampling.image_size(state, config))
    plan = plan_of(state, config)
    step = step_of(number, len(data), config)
    own = config if step.whole else replace(config, correct_norm=False, correct_scale=False)
    with watch("expectation"):
        everyone = [ParticleSet(state.halves, step.rows)]
        (half,), poses = expect(everyone, state.poses, data, own, on, plan, progress, PlaneExpectation)
        assert isinstance(half, PlaneExpectation)
    with watch("maximization"):
        new = maximise(replace(state, poses=poses), half, own, step)
        best = max(last_shell(model, new) for model in new.halves)
        new = sampling.update_resolution(new, new.resolution_of(best))
        batch = replace(new, poses=new.poses.of(step.rows))
        new = replace(new, schedule=changes(state.poses.of(step.rows), batch, config, on.device))
    if number == config.max_iterations:
        with watch("fit"):
            new = replace(new, fit_B2=class_fits(new, data, plan, config, on))
        if config.select == "auto":
            with watch("model"):
                good = central(class_qualities(new, config.diameter), new).nonzero().squeeze(1)
                new = replace(new, model_fit_B2=model_fits(good, data, config, on, progress))
    notes += [*half.notices, *empty_classes(state, new)]
    return Iteration(new, watch.seconds, notes, plan.grid.direction_D2)


def grown(state: State, config: Classify2dConfig) -> tuple[State, list[str]]:
    """The state with more classes until there are all, the largest divided; and, in the first part of the run, with one divided
    for every class that has nearly died out or shows what another one shows. What was done, too.

    Both parts of a class begin with its average plus and minus noise of its own strength, as if each were the average of a
    random part of its particles.
    """
    count = len(state.halves)
    if state.iteration == 0:
        return state, []
    share_C = torch.stack([model.direction_prior_D.sum() for model in state.halves])
    more = next_count(count, config) - count
    if more == 0 and state.iteration > DIVIDING * config.max_iterations:
        return state, []
    free = [k for k in range(count) if float(share_C[k]) * count < DEAD]
    notes = [f"{len(free)} classes had nearly no particles any more: the largest were divided instead."] if free else []
    if more == 0 and state.iteration % SETTLING == 0:
        twins = [k for k in twin_classes(state, config, share_C) if k not in free]
        notes += [f"{len(twins)} classes showed what others show: the largest were divided instead."] if twins else []
        free += twins
    models, running = list(state.halves) + [state.halves[0]] * more, state.running + [NOTHING] * (more if state.running else 0)
    largest = [k for k in torch.argsort(share_C, descending=True, stable=True).tolist() if k not in free]
    for old, new in zip(largest, free + list(range(count, count + more))):
        models[old], models[new] = divided(models[old], config.seed + 1000 * state.iteration + new)
        if running:
            running[old] = running[new] = NOTHING
    return replace(state, halves=models, running=running), notes


def twin_classes(state: State, config: Classify2dConfig, share_C: Tensor) -> list[int]:
    """Classes that look like a larger one."""
    like_CC = likeness(state, config)
    twins: list[int] = []
    for k in torch.argsort(share_C, stable=True).tolist():
        larger_C = share_C > share_C[k]
        larger_C[twins] = False
        if bool((like_CC[k][larger_C] > ALIKE).any()):
            twins.append(k)
    return twins


def likeness(state: State, config: Classify2dConfig) -> Tensor:
    """Largest correlation of every two class averages over in-plane turns [C, C], 0 on the diagonal; every shell up to the
    present resolution counts by its coefficients, as far as it stands out of the noise of both."""
    image_CYX = torch.stack([model.map_ZYX.cpu() for model in state.halves])
    radius = min(state.shell_of(state.current_resolution), state.box // 2)
    pixels = half_plane_pixels(state.box, radius, order="rows")
    planes = FourierPlanes.from_images(image_CYX, radius, config.padding, "cpu")
    grid = ClassGrid(InPlaneGrid.build(config.psi_step / 2, 0), len(image_CYX))
    orientation_O = torch.arange(grid.count)
    turned_O2K = planes.slices(grid.rotations(orientation_O), grid.class_of(orientation_O), pixels.coordinates_K3())
    turned_O2K *= (pixels.shell_K > 0) / turned_O2K.square().sum(1).mean(0).sqrt().clamp_min(1e-20)
    ssnr_CS = torch.stack([model.ssnr_S for model in state.halves])
    weight_CK = (ssnr_CS / (1 + ssnr_CS)).sqrt()[:, pixels.shell_K].float()
    turned_OK = (turned_O2K * weight_CK[grid.class_of(orientation_O)][:, None]).flatten(1)
    turned_OK /= turned_OK.norm(dim=1, keepdim=True).clamp_min(1e-20)
    upright_CK = turned_OK[:: grid.count // len(image_CYX)]
    like_CC = (upright_CK @ turned_OK.T).unflatten(1, (len(image_CYX), -1)).amax(2)
    return like_CC.fill_diagonal_(0)


def divided(model: HalfModel, seed: int) -> tuple[HalfModel, HalfModel]:
    """A class as two: its average plus and minus the noise that is in it (see `grown`)."""
    box = model.map_ZYX.shape[-1]
    draw = torch.Generator().manual_seed(seed)
    white_YX = torch.randn(box, box, generator=draw)
    amplitude_S = (model.sigma2_S * 2 * box**2 * model.ssnr_S / (1 + model.ssnr_S)).sqrt()
    shell_YX = PlaneShells(box, box, box // 2, "cpu").shell_YX
    noise_YX = centred_irfft2(centred_rfft2(white_YX) * amplitude_S.float()[shell_YX], box).to(model.map_ZYX)
    prior_D = model.direction_prior_D / 2
    first, second = (replace(model, map_ZYX=model.map_ZYX + sign * noise_YX, direction_prior_D=prior_D) for sign in (1, -1))
    return first, second


def plan_of(state: State, config: Classify2dConfig) -> Plan:
    """Grids and sizes of the coming iteration."""
    schedule = state.schedule
    coarse = coarse_radius(state.box * state.pixel_size, config, schedule.offset_step)
    coarse = min(coarse if schedule.oversampling else state.box, state.current_size // 2)
    offsets = OffsetGrid.build(schedule.offset_range, schedule.offset_step, schedule.oversampling, schedule.perturbation)
    model_grid = ModelGrid(state.box, state.pixel_size, state.current_size // 2, coarse, config.padding)
    most = max(SAMPLES_PER_CLASS * len(state.halves), FEWEST_SAMPLES)
    return Plan(_grid(config, schedule.perturbation), offsets, model_grid, schedule, correlate=False, most=most)


def maximise(state: State, half: PlaneExpectation, config: Classify2dConfig, step: Step) -> State:
    """New averages, noise and priors; an empty class keeps its average."""
    shared = updated_model(state.halves[0], half.sums, state, state.poses, 1, False, config)
    total_3CYX, running = half.averages.totals(), list[Tensor]()
    if not step.whole:
        shared = _stepped(state, shared, step.size)
        running = stepped_planes(state.running or [NOTHING] * len(state.halves), total_3CYX, len(step.rows), step.size)
        total_3CYX = torch.stack(running, 1).double() * (len(step.rows) / step.size)
    old_CYX = torch.stack([model.map_ZYX.to(half.on.device) for model in state.halves])
    solution = solve_planes(half.averages, plane_spectra(old_CYX, config.padding), config.tau2_fudge, total_3CYX)
    image_CYX = solution.image_CYX
    if config.centre:
        shift_C2 = centring_shifts(image_CYX, config.offset_range)
        image_CYX = moved_planes(image_CYX, shift_C2)
    image_CYX = image_CYX * _mask(state, config, half.on)
    empty_C = total_3CYX[2].sum((1, 2)) <= 0
    image_CYX = torch.where(empty_C[:, None, None], old_CYX, image_CYX)
    return replace(state, halves=_models(shared, state.halves, image_CYX, solution, empty_C.tolist()), running=running)


def _stepped(state: State, batch: HalfModel, size: float) -> HalfModel:
    """What all classes share after a step: noise, spread of offsets and shares of the classes, between the old and a batch's."""
    old = state.halves[0]
    old_C = torch.cat([model.direction_prior_D for model in state.halves]).to(batch.direction_prior_D)
    return replace(
        batch, sigma2_noise_GS=torch.lerp(old.sigma2_noise_GS, batch.sigma2_noise_GS.to(old.sigma2_noise_GS), size),
        offset_sigma=(1 - size) * old.offset_sigma + size * batch.offset_sigma,
        direction_prior_D=torch.lerp(old_C, batch.direction_prior_D, size),
    )  # fmt: skip


def _models(
    shared: HalfModel, old: list[HalfModel], image_CYX: Tensor, solution: PlaneSolution, empty_C: list[bool]
) -> list[HalfModel]:
    """One model per class: what all share, its own share of the particles, average and spectra (of an empty class the old)."""
    spectra = [one.cpu() for one in (solution.tau2_CS, solution.sigma2_CS, solution.ssnr_CS, solution.coverage_CS)]
    share_C = shared.direction_prior_D.clone()
    models = []
    for k, (before, empty) in enumerate(zip(old, empty_C, strict=True)):
        own = [one[k] for one in spectra]
        if empty:
            own = [before.tau2_S, before.sigma2_S, before.ssnr_S, before.coverage_S]
        tau2_S, sigma2_S, ssnr_S, coverage_S = own
        models.append(replace(
            shared, map_ZYX=image_CYX[k], direction_prior_D=share_C[k : k + 1], tau2_S=tau2_S, sigma2_S=sigma2_S,
            ssnr_S=ssnr_S, coverage_S=coverage_S,
        ))  # fmt: skip
    return models


def _grid(config: Classify2dConfig, perturbation: float = 0.0) -> InPlaneGrid:
    return InPlaneGrid.build(config.psi_step, config.oversampling, perturbation)


def _mask(state: State, config: Classify2dConfig, on: Computing) -> Tensor:
    """Soft circle of the particle's diameter."""
    return soft_circle(state.box, config.diameter / 2 / state.pixel_size, config.mask_edge, on.device)
