"""2-D classification: all particles against K class averages, turned and shifted (RELION facts 5.6, 6.1).

It starts from averages of random particles at random in-plane angles. The sampling stays fixed; a class's prior is the power of
the average that its particles were compared with, times tau2_fudge. A class that loses its last particle stays empty: it keeps
its average and is reported. `prepare` a session, then take `iterations` from it. Nothing is written or printed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from verglas.core.masks import soft_circle
from verglas.expectation.images import ModelGrid
from verglas.expectation.in_plane import InPlaneGrid
from verglas.expectation.initial_noise import first_rows, initial_noise
from verglas.expectation.sampling import OffsetGrid
from verglas.maximization.planes import (
    PlaneSolution,
    centring_shifts,
    low_pass_planes,
    moved_planes,
    plane_spectra,
    solve_planes,
)
from verglas.particles.table import ParticleTable
from verglas.refinement import schedule as sampling
from verglas.refinement.classes import changes, empty_classes, last_shell
from verglas.refinement.config import Classify2dConfig
from verglas.refinement.dataset import Dataset, Progress, micrograph_groups
from verglas.refinement.driver import Session, computing, initial_poses, quiet
from verglas.refinement.expect import Computing, Plan
from verglas.refinement.plan import RunPlan
from verglas.refinement.plane_expect import PlaneExpectation
from verglas.refinement.residency import Residency
from verglas.refinement.state import HalfModel, State, flat_spectrum
from verglas.refinement.step import Iteration, ParticleSet, Stopwatch, expect, updated_model

__all__ = ["Session", "iterations", "prepare"]
KEEP_SAFE = 1.5  # a coarse search sees details of the arc between two angles over this (facts 3.3)
SAMPLES_PER_CLASS = 1  # significant coarse samples of a particle, at most (facts 3.6): early posteriors are broad
PER_START = 300  # particles at most in one of the averages that it starts from


def prepare(
    table: ParticleTable, config: Classify2dConfig, device: torch.device | str = "cpu", threads: int | None = None,
    progress: Progress | None = None, planned: RunPlan | None = None,
) -> Session:  # fmt: skip
    """Read the images, estimate their noise, draw the first averages. Arguments and errors as of `driver.prepare`."""
    on, chosen = computing(torch.device(device), config, threads)
    residency = Residency()
    if planned is not None:
        on, residency = replace(on, memory=planned.working_memory), planned.residency
    data = Dataset.read(table, on.device, residency, progress)
    group = table.groups[0]
    noise = initial_noise(
        data.batches(first_rows(table)), len(table.groups), group.box, group.pixel_size, config.diameter, config.mask_edge
    )
    state = with_first_averages(initial_state(table, noise.sigma2_noise_GS, config), data, config, on)
    chosen["residency"] = residency.reason
    return Session(state, data, config, on, None, [residency.reason], chosen)


def initial_state(table: ParticleTable, sigma2_noise_GS: Tensor, config: Classify2dConfig) -> State:
    """The state before there are averages."""
    group, k = table.groups[0], config.classes
    micrograph_B, micrographs = micrograph_groups(table)
    flat_S = flat_spectrum(group.box // 2 + 1)
    model = HalfModel(
        torch.zeros(group.box, group.box), sigma2_noise_GS, torch.full((1,), 1 / k, dtype=torch.float64),
        config.initial_offset_sigma, 1.0, torch.ones(len(micrographs), dtype=torch.float64), flat_S, flat_S, flat_S, flat_S,
    )  # fmt: skip
    poses = initial_poses(table, torch.ones(len(table), dtype=torch.int64), micrograph_B)
    schedule = replace(sampling.initial_schedule(config, group.pixel_size), psi_step=360.0 / _grid(config).n_psi, local_sigma=0.0)
    return State(
        0, [model] * k, poses, schedule, group.box, group.pixel_size, config.initial_resolution, group.box, flat_S, micrographs,
        classified=True,
    )  # fmt: skip


def with_first_averages(state: State, data: Dataset, config: Classify2dConfig, on: Computing) -> State:
    """The state with averages of particles drawn at random, at random in-plane angles, low-passed."""
    sized = replace(state, current_size=sampling.image_size(state, config))
    half = PlaneExpectation(sized.halves, data, sized.poses, plan_of(sized, config), config, on)
    draw = torch.Generator().manual_seed(config.seed)
    rows = torch.randperm(len(data), generator=draw)[: PER_START * config.classes]
    half.add_at_random(rows, config.seed)
    image_CYX = low_pass_planes(solve_planes(half.averages, None).image_CYX, config.initial_resolution, state.pixel_size)
    image_CYX *= _mask(state, config, on)
    return replace(state, halves=[replace(state.halves[0], map_ZYX=image_YX) for image_YX in image_CYX])


def iterations(session: Session, progress: Progress | None = None) -> Iterator[Iteration]:
    """As many iterations as the configuration asks for, from the session's state on."""
    state, config = session.state, session.config
    assert isinstance(config, Classify2dConfig)
    while state.iteration < config.max_iterations:
        if session.on.device.type == "cuda":  # what the last iteration has freed would not fit the arrays of this one
            torch.cuda.empty_cache()
        done = iterate(state, session.data, config, session.on, progress or quiet)
        state = done.state
        yield done


def iterate(state: State, data: Dataset, config: Classify2dConfig, on: Computing, progress: Progress) -> Iteration:
    """The iteration after `state`; `state` itself stays as it is."""
    watch = Stopwatch(on.device)
    number = state.iteration + 1
    schedule = sampling.perturb(state.schedule, config, number)
    state = replace(state, iteration=number, schedule=schedule, current_size=sampling.image_size(state, config))
    plan = plan_of(state, config)
    everyone = [ParticleSet(state.halves, torch.arange(len(data)))]
    with watch("expectation"):
        (half,), poses = expect(everyone, state.poses, data, config, on, plan, progress, PlaneExpectation)
        assert isinstance(half, PlaneExpectation)
    with watch("maximization"):
        new = maximise(replace(state, poses=poses), half, config)
        best = max(last_shell(model, new) for model in new.halves)
        new = sampling.update_resolution(new, new.resolution_of(best))
        new = replace(new, schedule=changes(state.poses, new, config))
    notes = [*half.notices, *empty_classes(state, new)]
    return Iteration(new, watch.seconds, notes, plan.grid.direction_D2)


def plan_of(state: State, config: Classify2dConfig) -> Plan:
    """Grids and sizes of the coming iteration."""
    schedule = state.schedule
    coarse = sampling.coarse_size(schedule, config, state.box, state.pixel_size, state.current_size, KEEP_SAFE)
    offsets = OffsetGrid.build(schedule.offset_range, schedule.offset_step, schedule.oversampling, schedule.perturbation)
    model_grid = ModelGrid(state.box, state.pixel_size, state.current_size // 2, coarse // 2, config.padding)
    most = SAMPLES_PER_CLASS * config.classes
    return Plan(_grid(config, schedule.perturbation), offsets, model_grid, schedule, correlate=False, most=most)


def maximise(state: State, half: PlaneExpectation, config: Classify2dConfig) -> State:
    """New averages, noise and priors; an empty class keeps its average."""
    shared = updated_model(state.halves[0], half.sums, state, state.poses, 1, False, config)
    old_CYX = torch.stack([model.map_ZYX.to(half.on.device) for model in state.halves])
    solution = solve_planes(half.averages, plane_spectra(old_CYX, config.padding), config.tau2_fudge)
    image_CYX = solution.image_CYX
    if config.centre:
        shift_C2 = centring_shifts(image_CYX, config.offset_range)
        image_CYX = moved_planes(image_CYX, shift_C2)
    image_CYX = image_CYX * _mask(state, config, half.on)
    share_C = shared.direction_prior_D
    image_CYX = torch.where(share_C.to(image_CYX)[:, None, None] > 0, image_CYX, old_CYX)
    return replace(state, halves=_models(shared, state.halves, image_CYX, solution))


def _models(shared: HalfModel, old: list[HalfModel], image_CYX: Tensor, solution: PlaneSolution) -> list[HalfModel]:
    """One model per class: what all share, its own share of the particles, average and spectra (of an empty class the old)."""
    spectra = [one.cpu() for one in (solution.tau2_CS, solution.sigma2_CS, solution.ssnr_CS, solution.coverage_CS)]
    share_C = shared.direction_prior_D.clone()
    models = []
    for k, before in enumerate(old):
        own = [one[k] for one in spectra]
        if share_C[k] == 0:
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
