"""One iteration of auto-refinement: state and images in, the next state out (RELION facts 5.1)."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from verglas.core.masks import soft_sphere
from verglas.core.memory import in_host_memory, uploaded
from verglas.core.transfers import to_device, to_host
from verglas.distributed.arrivals import Arrivals
from verglas.expectation.sampling import OrientationGrid
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.gather import BatchResult
from verglas.maximization.halves import Solution, solve_halves, solve_joined
from verglas.maximization.reference import low_pass
from verglas.maximization.solvent import corrected_fsc
from verglas.maximization.solvers import solve_by_ranks
from verglas.maximization.sums import (
    Sums,
    half_plane_counts,
    updated_direction_prior,
    updated_noise,
    updated_offset_sigma,
    updated_scale,
)
from verglas.maximization.waiting import Waiting
from verglas.refinement import schedule as sampling
from verglas.refinement.accuracy import measure_accuracy, plan_of
from verglas.refinement.adding import add_up, frame_of
from verglas.refinement.ahead import in_order
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset, Progress
from verglas.refinement.expect import Finished, HalfExpectation
from verglas.refinement.state import HalfModel, Poses, State

MINIMUM_SHELL = 5  # the resolution is never taken to be worse than this shell


@dataclass(frozen=True)
class Final:
    """What the last iteration leaves: joined: the map of all particles; unfil_halves: half maps without prior or mask."""

    joined: Solution
    unfil_halves: list[Tensor]


@dataclass
class Iteration:
    """One finished iteration. state: after it, not to be changed; seconds per stage; notes: what was decided and why;
    directions_D2: the grid's directions (rot, tilt, degrees); final: of the last iteration only;
    communication: what travelled between ranks (`Ranks.communication`), None without any.
    """

    state: State
    seconds: dict[str, float]
    notes: list[str]
    directions_D2: Tensor
    final: Final | None = None
    communication: dict[str, Any] | None = None


class Stopwatch:
    """Seconds per stage, and other ranks told of it; `with watch("expectation"): ...`."""

    def __init__(self, on: Computing) -> None:
        self.seconds: dict[str, float] = {}
        self.on = on

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.on.ranks.doing(stage)
        start = time.perf_counter()
        yield
        if self.on.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def iterate(
    state: State, data: Dataset, config: RefineConfig, on: Computing, mask_ZYX: Tensor | None, progress: Progress
) -> Iteration:
    """The iteration after `state`; `state` itself stays as it is. mask_ZYX: the user's, None for a sphere."""
    watch, notes = Stopwatch(on), []
    number = state.iteration + 1
    state = replace(
        state, iteration=number, schedule=replace(state.schedule, converged=sampling.is_converged(state.schedule, config))
    )
    correlate = number == 1 and not config.absolute_greyscale
    size = sampling.image_size(state, config)
    if state.schedule.converged:
        why = "Sampling, resolution and poses have settled" if number <= config.max_iterations else "--max-iterations is reached"
        notes.append(f"{why}: last iteration, all shells, halves joined.")
    with watch("accuracy"):
        state = replace(state, schedule=sampling.perturb(state.schedule, config, number), current_size=size)
        if not correlate:
            state = replace(state, schedule=measure_accuracy(state, data, config, on))
        if number > 1 and not state.schedule.converged:
            notes.append(sampling.explain_sampling(state, config))
            state = resampled(state, config)
    plan = plan_of(state, config, correlate)
    with watch("expectation"):
        found, poses = expect(particle_sets(state), state.poses, data, config, on, plan, progress, HalfSetExpectation)
    halves = [half for half in found if isinstance(half, HalfSetExpectation)]
    notes += [notice for half in halves for notice in half.notices]
    with watch("maximization"):
        models = [updated_model(model, half.sums, state, poses, number_of, correlate, config)
                  for number_of, (model, half) in enumerate(zip(state.halves, halves), 1)]  # fmt: skip
        new = replace(state, halves=models, poses=poses)
        new, final = maximise(new, halves, config, mask_ZYX, notes)
        if correlate:
            new = restarted(new, config)
        elif not state.schedule.converged:
            new = with_resolution(new, config, notes)
        if not correlate:
            new = replace(new, schedule=sampling.monitor_changes(state.poses, poses, new, config, on.device))
    return Iteration(new, watch.seconds, notes, plan.grid.direction_D2, final)


class HalfSetExpectation(HalfExpectation):
    """Of a half-set: what its slices were cut from is asked for no more once it is through; its sums may wait on the host."""

    waiting: Waiting | None = None

    def release(self) -> HalfExpectation:
        """As that of any set; the memory of references, too."""
        self.__dict__.pop("volumes", None)  # made anew should they be needed once more
        return super().release()

    def make_way(self) -> None:
        """After `release`: have the sums wait on the host, if half-sets do."""
        if self.on.turns == "waiting":
            self.waiting = Waiting.of_accumulator(self.accumulators.pop(), self.config.symmetry)

    @property
    def solvable(self) -> Accumulator | Waiting:
        """What the map is solved from."""
        return self.accumulators[0] if self.waiting is None else self.waiting


def resampled(state: State, config: RefineConfig) -> State:
    """The state with the sampling that the schedule asks for; direction priors start flat on a new grid."""
    schedule = sampling.update_sampling(state, config)
    if schedule.healpix_order == state.schedule.healpix_order:
        return replace(state, schedule=schedule)
    count = OrientationGrid.build(schedule.healpix_order, schedule.oversampling, config.symmetry, 0.0).n_directions
    flat_D = torch.full((count,), 1 / count, dtype=torch.float64)
    return replace(state, schedule=schedule, halves=[replace(half, direction_prior_D=flat_D) for half in state.halves])


@dataclass(frozen=True)
class ParticleSet:
    """Particles (rows of the table) that are compared with the same models: a half-set, or all of a classification."""

    models: list[HalfModel]
    rows: Tensor


def particle_sets(state: State) -> list[ParticleSet]:
    """The half-sets; one of all particles where there are none."""
    if not state.split:
        return [ParticleSet(state.halves, torch.arange(len(state.poses.half_B)))]
    return [
        ParticleSet([model], (state.poses.half_B == number).nonzero().squeeze(1)) for number, model in enumerate(state.halves, 1)
    ]


def expect(
    sets: list[ParticleSet], poses: Poses, data: Dataset, config: RefineConfig, on: Computing, plan: Plan, progress: Progress,
    kind: type[HalfExpectation] = HalfExpectation,
) -> tuple[list[HalfExpectation], Poses]:  # fmt: skip
    """The expectation of all sets: their sums, and the new poses of all particles. kind: what works through a set.

    Ranks that have half-sets apart go through them in an order of their own (`Shares.turns`). Else the sums of one set travel to
    the ranks that solve with them while the next set is worked on, if that is wanted.
    """
    done, total, halves = 0, sum(len(one.rows) for one in sets), dict[int, HalfExpectation]()
    found, under_way = list[tuple[Tensor, BatchResult]](), deque[Arrivals]()
    notices = data.follow_speed(poses.significant_B)
    if not on.in_layers:
        on.helpers.lend(kind, [(one.models, one.rows) for one in sets], poses, data, plan, config)
    apart, rows_of = data.shares is not None and data.shares.half_B is not None, [one.rows for one in sets]
    number_of = next(on.ranks.sequence) if apart else 0

    def begun(some: list[tuple[int, bool]]) -> Iterator[Callable[[], Finished | HalfExpectation]]:
        for number, helps in some:
            if number not in halves:
                halves[number] = kind(sets[number].models, data, poses, plan, config, on)
                halves[number].name = f"{number_of}.{number}" if apart else None
            yield from on.helpers.begun(halves[number], rows_of[number], helps)
            if (number, helps) == turns[-1] if apart else on.helpers.help_with(rows_of[number]):
                yield from on.helpers.rest([(halves[one], rows_of[one]) for one in (sorted(halves) if apart else [number])])
            yield halves[number].release

    turns = [(number, True) for number in range(len(sets))] if data.shares is None else data.shares.turns(rows_of)
    for some in [turns] if on.turns == "overlapping" else [[turn] for turn in turns]:
        for what in in_order(begun(some), on.device, on.memory, on.ranks):
            if isinstance(what, HalfExpectation):
                under_way += [] if apart else what.begin_adding()
                continue
            for batch, result in what:
                found.append((batch, result))
                done += len(batch)
                progress("expectation", done, total)
            advance(under_way)
        half = halves[some[-1][0]]
        if some[-1] != turns[-1] and isinstance(half, HalfSetExpectation):
            half.make_way()
    if on.ranks.size > 1 and on.device.type == "cuda":
        torch.cuda.synchronize(on.device)  # so that who still computes is waited for here, not where sums are sent
    on.ranks.meet("expectation", partial(advance, under_way))
    finished = [halves[number] for number in range(len(sets))]
    solvers = add_up(finished, plan, config, on, apart and kind is HalfSetExpectation)
    for half in finished:
        half.solvers = solvers
    on.ready.clear()  # of a set that another rank has worked on
    finished[0].notices[:0] = notices
    return finished, stored(poses, found, on)


def advance(under_way: deque[Arrivals]) -> None:
    """Take in what has arrived of the first sums under way; those that have arrived as a whole make room for the next."""
    while under_way:
        under_way[0].advance()
        if under_way[0].left:
            return
        under_way.popleft()


def stored(poses: Poses, found: Finished, on: Computing) -> Poses:
    """Poses with the results of batches of all ranks. If these are of all particles they are where they came from the device:
    nothing is copied on the host, nor when they go to a device again."""
    row_n, new = _gathered(poses, found, on)
    if len(row_n) == len(poses.half_B):  # all, in their order
        return replace(poses, **{name: value_n.to(getattr(poses, name).dtype) for name, value_n in new.items()})
    poses = copied(poses)
    _put(poses, row_n, new)
    return poses


def store(poses: Poses, found: Finished, on: Computing) -> None:
    """Put the results of batches of all ranks into `poses`."""
    _put(poses, *_gathered(poses, found, on))


def _put(poses: Poses, row_n: Tensor, new: dict[str, Tensor]) -> None:
    for name, value_n in new.items():
        one = getattr(poses, name)
        one[row_n] = value_n.to(one.dtype)


def _gathered(poses: Poses, found: Finished, on: Computing) -> tuple[Tensor, dict[str, Tensor]]:
    """(rows, ascending, int64; new values of each field, float64) of all ranks. They are gathered and put in order on the device,
    which the host waits for only here."""
    names = list(BatchResult.__dataclass_fields__)
    like = [getattr(poses, name) for name in names]
    widths = [1, *(one[:1].numel() for one in like)]
    mine_nF = torch.zeros(0, sum(widths), dtype=torch.float64, device=on.device)
    if found:
        columns = [uploaded(torch.cat([rows for rows, _ in found]), on.device)]
        columns += [torch.cat([getattr(result, name) for _, result in found]) for name in names]
        mine_nF = torch.cat([column.double().reshape(len(column), -1) for column in columns], 1)
    all_nF = on.ranks.gathered(mine_nF, "poses")
    parts = all_nF[all_nF[:, 0].argsort()].split(widths, 1)
    flat = in_host_memory(torch.cat([part.flatten() for part in parts]))
    row_n, *values = flat.split([part.numel() for part in parts])
    shaped = [value.view(-1, *one.shape[1:]) for one, value in zip(like, values, strict=True)]
    return row_n.long(), dict(zip(names, shaped, strict=True))


def copied(poses: Poses) -> Poses:
    """Poses in memory of their own."""
    return Poses(**{name: getattr(poses, name).clone() for name in poses.__dataclass_fields__})


def updated_model(
    model: HalfModel, sums: Sums, state: State, poses: Poses, number: int, correlate: bool, config: RefineConfig
) -> HalfModel:
    """Noise, scales and priors of one half-set from its sums; the first iteration by correlation leaves noise, norm, scales."""
    average: dict[str, Any] = {"average_pmax": sums.pmax / sums.particles, "log_likelihood": sums.log_likelihood}
    priors: dict[str, Any] = {
        "direction_prior_D": updated_direction_prior(sums), "offset_sigma": updated_offset_sigma(sums, model.offset_sigma),
    }  # fmt: skip
    if correlate:
        return replace(model, **average, **priors)
    mine = poses.half_B == number if state.split else torch.ones_like(poses.half_B, dtype=torch.bool)
    particles_M = torch.bincount(poses.micrograph_B[mine], minlength=len(model.scale_M)).double()
    return replace(
        model, **average, **priors,
        sigma2_noise_GS=updated_noise(sums, model.sigma2_noise_GS, half_plane_counts(state.box)),
        norm_average=sums.norm / sums.particles if config.correct_norm else model.norm_average,
        scale_M=updated_scale(sums, particles_M) if config.correct_scale and len(model.scale_M) > 1 else model.scale_M,
    )  # fmt: skip


def maximise(
    state: State, halves: list[HalfSetExpectation], config: RefineConfig, mask_ZYX: Tensor | None, notes: list[str]
) -> tuple[State, Final | None]:
    """New maps from the sums; the joint one and the unfiltered halves if the refinement has converged. Maps stay on the device,
    unless sums have to wait."""
    on, solvers = halves[0].on, halves[0].solvers
    join = math.ceil(state.box * state.pixel_size / max(config.join_resolution, state.current_resolution))
    curve = None
    if config.solvent_corrected_fsc and mask_ZYX is not None and state.current_resolution < config.join_resolution:

        def curve(maps: list[Tensor]) -> Tensor:  # type: ignore[no-redef]
            found = corrected_fsc([to_device(one, on.device) for one in maps], mask_ZYX, state.current_size)
            if found.notice:
                notes.append(found.notice)
            return found.fsc_S

    if solvers is not None:
        sphere = reference_mask(state, config, mask_ZYX, on.device)
        mine = None if solvers.mine is None else halves[solvers.mine].accumulators[0]
        asked = mine, frame_of(halves[0].plan, on), solvers, config.symmetry, join, config.tau2_fudge, sphere > 0
        solutions, fsc_S = solve_by_ranks(*asked)
        models = [with_map(model, solution, sphere) for model, solution in zip(state.halves, solutions)]
        return replace(state, halves=models, fsc_S=fsc_S.cpu()), None
    sums = halves[0].solvable, halves[1].solvable
    if state.schedule.converged:
        joined, unfil, fsc_S = solve_joined(sums, config.symmetry, curve, config.tau2_fudge, join)
        joined = replace(joined, map_ZYX=to_host(joined.map_ZYX))
        return replace(state, fsc_S=fsc_S.cpu(), solved=True), Final(joined, [to_host(half) for half in unfil])
    waits = on.turns == "waiting" or on.in_layers  # then there is no room for maps and mask beside what is solved with
    mask = None if waits else reference_mask(state, config, mask_ZYX, on.device)
    support_ZYX = None if mask is None else mask > 0
    solutions, fsc_S = solve_halves(sums, config.symmetry, join, config.tau2_fudge, curve, support_ZYX)
    mask = reference_mask(state, config, mask_ZYX, on.device) if mask is None else mask
    models = [with_map(model, solution, mask) for model, solution in zip(state.halves, solutions)]
    if waits:
        models = [replace(model, map_ZYX=to_host(model.map_ZYX)) for model in models]
    return replace(state, halves=models, fsc_S=fsc_S.cpu()), None


def reference_mask(state: State, config: RefineConfig, mask_ZYX: Tensor | None, device: torch.device) -> Tensor:
    """The user's mask, or a soft sphere of the particle's diameter, on a device."""
    if mask_ZYX is not None:
        return mask_ZYX.to(device)
    return soft_sphere(state.box, config.diameter / 2 / state.pixel_size, config.mask_edge, device)


def with_map(model: HalfModel, solution: Solution, mask_ZYX: Tensor) -> HalfModel:
    """The model with its new map, masked, and the map's spectra."""
    spectra = {name: getattr(solution, name).cpu() for name in ("tau2_S", "sigma2_S", "ssnr_S", "coverage_S")}
    return replace(model, map_ZYX=(to_device(solution.map_ZYX, mask_ZYX.device) * mask_ZYX).float(), **spectra)


def restarted(state: State, config: RefineConfig) -> State:
    """After scoring by correlation the maps are on the right grey scale but no better than the reference: low-passed again."""
    halves = [replace(half, map_ZYX=low_pass(half.map_ZYX, config.initial_resolution, state.pixel_size)) for half in state.halves]
    return replace(state, halves=halves, current_resolution=config.initial_resolution)


def with_resolution(state: State, config: RefineConfig, notes: list[str]) -> State:
    """The resolution that the map's signal-to-noise ratio implies: the shell before it first falls below 1 (facts 4.8)."""
    ssnr_S = state.halves[0].ssnr_S[1 : state.current_size // 2 + 1]
    low = (ssnr_S < 1).nonzero().squeeze(1)
    shell = int(low[0]) if len(low) else len(ssnr_S)
    strong = (ssnr_S >= 1).nonzero().squeeze(1)
    highest = int(strong[-1]) + 1 if len(strong) else 0
    if highest > shell + 3:  # a dip of the curve, not its end
        notes.append(
            f"The FSC dips near {state.resolution_of(shell + 1):.1f} Å and rises again to {state.resolution_of(highest):.1f} Å."
        )
        shell = highest
    return sampling.update_resolution(state, state.resolution_of(max(shell, MINIMUM_SHELL)))
