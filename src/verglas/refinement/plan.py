"""What a refinement will take, before it starts: memory of host and device by item, time by stage, batch sizes.

The figures follow from what the engine allocates (expectation/, maximization/) and from the constants in `costs`. A run that
cannot fit is refused by `RunPlan.check`, which names the nearest setting that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from verglas.core.symmetry import order as group_order
from verglas.errors import InputError
from verglas.refinement import costs
from verglas.refinement.config import RefineConfig
from verglas.refinement.costs import GB
from verglas.refinement.plan_memory import (
    Item,
    batch_items,
    reference_items,
    resident,
    share_of_volumes,
    solution_phases,
    waiting_bytes,
)  # fmt: skip
from verglas.refinement.plan_sizes import (
    Machine,
    Problem,
    Sizes,
    Turns,
    Where,
    all_sizes,
    classes_of,
    fine_shifts,
    map_pixels,
    operand_bytes,
    particles_at_once,
    reference_voxels,
    references_of,
    sets_of,
    slices_in_use,
    sum_bytes,
    transform_size,
)  # fmt: skip
from verglas.refinement.residency import Residency, images_at_once, residences

SMALLEST_WORKING, LARGEST_WORKING = 0.1 * GB, {"cpu": 1.5 * GB, "cuda": 16 * GB}
COMFORTABLE = {"cpu": 0.0, "cuda": 2 * GB}  # left for batches, else images take less precision or move to the host
KEPT_FREE = 0.05  # of the memory there is


@dataclass(frozen=True)
class IterationPlan:
    """One kind of iteration: how often it comes, particles at once, memory items at its peak, seconds of each stage."""

    sizes: Sizes
    times: int
    batch: int
    items: list[Item]
    seconds: dict[str, float]

    def peak(self, where: Where) -> float:
        """Bytes at the peak."""
        return sum(item.bytes for item in self.items if item.where == where)


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. working_memory: bytes that the arrays of a batch may take, and as many a table of slices (what the
    engine is told); residency: where the images stay; cells: references in half precision are stored as cells, too; in_layers:
    ranks have layers of references and sums, not whole ones; turns: how half-sets follow one another.
    """

    problem: Problem
    config: RefineConfig
    machine: Machine
    working_memory: float
    residency: Residency
    iterations: list[IterationPlan]
    cells: bool = True
    in_layers: bool = False
    turns: Turns = "overlapping"

    def peak(self, where: Where) -> float:
        """Largest memory over all iterations, bytes."""
        return max(one.peak(where) for one in self.iterations)

    def memory(self, where: Where) -> float:
        """Bytes that may be used there."""
        return self.machine.limited(self.config.memory_gb).memory(where)

    def worst(self, where: Where) -> IterationPlan:
        """The iteration with the largest peak."""
        return max(self.iterations, key=lambda one: one.peak(where))

    @property
    def seconds(self) -> float:
        """Whole run."""
        iterations = sum(one.times * sum(one.seconds.values()) for one in self.iterations)
        read = 0 if self.residency.home == "disk" else reading_seconds(self.problem, self.machine)
        return costs.STARTING_SECONDS[self.machine.kind] + read + iterations

    @property
    def disk_bytes(self) -> float:
        """What the run folder takes at its end: STAR files and maps of all iterations, two checkpoints and one being written."""
        n, times = self.machine.ranks * self.problem.n_particles, sum(one.times for one in self.iterations)
        spectra = costs.SHELL_BYTES * (self.problem.box // 2 + 1)
        maps = classes_of(self.config) * (4.0 * map_pixels(self.problem, self.config) + spectra)
        return times * (costs.STAR_BYTES * n + maps) + 3 * (costs.POSE_BYTES * n + maps)

    @property
    def references(self) -> str:
        """How references are stored, and why."""
        last = self.iterations[-1]
        size = next(one.bytes for one in batch_items(self, last.sizes, last.batch) if one.name == "reference, packed") / GB
        several = self.machine.ranks > 1
        where = f"whole on each of {self.machine.ranks} ranks (slices of any orientation cross all of it)" if several else "whole"
        if self.in_layers:
            return (
                f"References of one set of particles at a time, and sums of slices, are in layers, one on each of "
                f"{self.machine.ranks} ranks ({size:.2g} GB of the reference), which make slices together: whole ones do not fit"
            )
        if operand_bytes(self.config, self.machine.kind) != 2:
            how = "in the precision of the comparison"
        elif self.cells:
            how = "in half precision with neighbours side by side, beside single precision"
        else:
            how = "in single precision alone: half precision beside it, from which slices are cut twice as fast, does not fit"
        return f"References of one set of particles at a time ({size:.2g} GB) are {where}, {how}"

    @property
    def half_sets(self) -> str:
        """How half-sets follow one another, and why; empty where nothing is to be said."""
        if self.turns == "overlapping" or sets_of(self.config) == 1 or self.machine.kind == "cpu":
            return ""
        if self.turns == "apart":
            return "The second half-set begins when the first one is through"
        size = waiting_bytes(self, self.iterations[-1].sizes) / GB
        return f"Sums of the half-set that is through wait in the memory of the host ({size:.2g} GB): both do not fit the device"

    @property
    def places(self) -> list[Where]:
        """Memories that the run uses."""
        return ["host", "device"] if self.machine.kind == "cuda" else ["host"]

    @property
    def fits(self) -> bool:
        """Whether every peak leaves a little free."""
        return all(self.peak(where) <= (1 - KEPT_FREE) * self.memory(where) for where in self.places)

    def check(self) -> None:
        """Raise InputError if the run cannot fit; it names the item that is largest and the nearest setting that fits."""
        if self.fits:
            return
        where = next(w for w in self.places if self.peak(w) > (1 - KEPT_FREE) * self.memory(w))
        worst = self.worst(where)
        largest = max((item for item in worst.items if item.where == where), key=lambda item: item.bytes)
        there = self.memory(where)
        limit = "given with --memory" if there < self.machine.memory(where) else "free"
        raise InputError(
            f"memory of the {where}",
            f"{self.peak(where) / GB:.1f} GB needed in '{worst.sizes.title}' ({largest.name}: {largest.bytes / GB:.1f} GB)",
            f"at most {(1 - KEPT_FREE) * there / GB:.1f} GB of the {there / GB:.1f} GB {limit}",
            next((f"It fits with {text}." for text, other in self._alternatives() if other.fits), "No setting of it fits here."),
        )  # fmt: skip

    def _alternatives(self) -> Iterator[tuple[str, RunPlan]]:
        """Settings that take less memory, from the one that costs least to the one that costs most."""
        config, problem, machine = self.config, self.problem, self.machine
        if config.memory_gb is not None:
            more = math.ceil(10 * self.peak(machine.works_on) / (1 - KEPT_FREE) / GB) / 10
            yield f"--memory {more:g}", plan(problem, replace(config, memory_gb=more), machine)
        if config.precision == "double":
            yield "--precision single", plan(problem, replace(config, precision="single"), machine)
        fits, too_large = 14, problem.box
        while too_large - fits > 2:  # the largest even box that fits
            box = (fits + too_large) // 4 * 2
            fits, too_large = (box, too_large) if plan(_downsampled(problem, box), config, machine).fits else (fits, box)
        if fits > 14:
            resolution = 2 * _downsampled(problem, fits).pixel_size
            text = f"images of {fits} px (`verglas stack --box {fits}`, resolution to {resolution:.3g} Å at best)"
            yield text, plan(_downsampled(problem, fits), config, machine)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes and seconds."""
        return {
            "particles": self.problem.n_particles, "box_px": self.problem.box, "pixel_size_angstrom": self.problem.pixel_size,
            "symmetry": self.config.symmetry, "diameter_angstrom": self.config.diameter, "device": self.machine.kind,
            "ranks": self.machine.ranks,
            "working_memory_bytes": self.working_memory, "images_on": self.residency.home, "images": self.residency.reason,
            "half_sets": self.turns, "volumes_in_layers": self.in_layers, "fits": self.fits,
            "peak_bytes": {where: self.peak(where) for where in self.places}, "seconds": self.seconds,
            "disk_bytes": self.disk_bytes, "iterations": [self._iteration_dict(one) for one in self.iterations],
        }  # fmt: skip

    def _iteration_dict(self, one: IterationPlan) -> dict[str, Any]:
        sizes = one.sizes
        return {
            "kind": sizes.title, "times": one.times, "particles_at_once": one.batch, "current_size_px": 2 * sizes.radius,
            "orientations": sizes.orientations, "offsets": sizes.offsets, "seconds": one.seconds,
            "peak_bytes": {where: one.peak(where) for where in self.places},
            "memory": [{"item": item.name, "where": item.where, "bytes": item.bytes} for item in one.items],
        }  # fmt: skip


def plan(problem: Problem, config: RefineConfig, machine: Machine) -> RunPlan:
    """Plan a refinement: memory, time, batches, where images stay. Nothing is allocated; raises nothing (see `RunPlan.check`)."""
    sizes, works_on = all_sizes(problem, config), machine.works_on
    # With the least working memory a plan says everything but what the working memory bounds.
    drafts = [
        with_iterations(RunPlan(problem, config, machine, SMALLEST_WORKING, residency, [], cells, in_layers, turns), sizes)
        for cells, turns, in_layers in _ways(config, machine)
        for residency in residences(problem, config, machine)
    ]
    usable = (1 - KEPT_FREE) * drafts[0].memory(works_on)
    fitting = [draft for draft in drafts if draft.fits] or drafts[-1:]
    draft = next((one for one in fitting if one.peak(works_on) + COMFORTABLE[machine.kind] <= usable), fitting[0])
    free = usable - draft.peak(works_on)
    working = LARGEST_WORKING[machine.kind]
    while working > max(free / 3, SMALLEST_WORKING):  # by halves: a little more or less memory free leaves results the same
        working /= 2
    made = with_iterations(replace(draft, working_memory=working), sizes)
    where: Where = "host" if made.residency.home == "host" else works_on
    room = max(0.0, (1 - KEPT_FREE) * made.memory(where) - made.peak(where))
    return replace(made, residency=replace(made.residency, room=room))


def _ways(config: RefineConfig, machine: Machine) -> list[tuple[bool, Turns, bool]]:
    """(references as cells, how half-sets follow one another, volumes in layers), quickest first. Sums wait where one GPU works
    on all of them; of several each has layers."""
    cells = operand_bytes(config, machine.kind) == 2
    whole: list[tuple[bool, Turns, bool]] = [(True, "apart", False)]
    if cells:
        whole.append((False, "apart", False))
    if machine.ranks > 1 and sets_of(config) == 2:
        return [*whole, (False, "apart", True)]
    if machine.kind == "cpu" or sets_of(config) == 1 or machine.ranks > 1:
        return whole
    return [(True, "overlapping", False), *whole, (not cells, "waiting", False)]


def with_iterations(run: RunPlan, sizes: list[Sizes]) -> RunPlan:
    """The same run with its kinds of iteration planned."""
    return replace(run, iterations=[_iteration(run, one) for one in sizes])


def _downsampled(problem: Problem, box: int) -> Problem:
    """The same field of view on `box` px."""
    return replace(problem, box=box, pixel_size=problem.pixel_size * problem.box / box)


def _iteration(run: RunPlan, sizes: Sizes) -> IterationPlan:
    """Memory and time of one kind of iteration."""
    batch = particles_at_once(run.problem, run.config, run.machine.kind, sizes, run.working_memory)
    batch = min(batch, images_at_once(run.residency.budget, run.problem.one_image))
    phases = [reference_items(run, sizes), batch_items(run, sizes, batch), *solution_phases(run, sizes)]
    where = run.machine.works_on
    largest = max(phases, key=lambda items: sum(item.bytes for item in items if item.where == where))
    items = [*resident(run, sizes), *largest]
    fixed = ("images", "images read ahead", "program and libraries", "particle table and poses")
    arrays = sum(item.bytes for item in items if item.where == where and item.name not in fixed)
    items.append(Item("held between arrays", where, (costs.HELD_SHARE[run.machine.kind] - 1) * arrays))
    if run.machine.kind == "cuda":
        items.append(Item("context of CUDA", "device", costs.CONTEXT_BYTES))
    return IterationPlan(sizes, sizes.times, batch, items, _seconds(run, sizes, batch))


def _seconds(run: RunPlan, sizes: Sizes, batch: int) -> dict[str, float]:
    """Seconds of each stage of an iteration, all particles together."""
    problem, config, kind = run.problem, run.config, run.machine.kind
    rates, n, local = costs.RATES[kind], round(sizes.share * problem.n_particles), sizes.searches_locally
    cores = max(1, run.machine.cores) if kind == "cpu" else 1
    k, coarse_k = sizes.coefficients, sizes.coarse_coefficients
    orientations = sizes.listed or sizes.orientations
    batches = -(-n // batch)
    needed, weighted = slices_in_use(sizes, batch, config)
    sets, maps = sets_of(config), classes_of(config)
    coarse_slices = costs.LOCAL_OWN * references_of(config) * n if local else sets * sizes.orientations
    coarse_slices = 0 if sizes.kind == "given" and sizes.offsets == 1 else coarse_slices  # nothing is searched
    solved = (1 if sizes.classes else maps) * (1 + group_order(config.symmetry) / 8) * 2 * transform_size(problem, config)
    made_ready = 2 * transform_size(problem, config) / costs.MADE_READY[kind]
    solved /= 1 if sizes.classes else run.machine.ranks  # each rank its slab of a map
    sliced = coarse_slices * coarse_k + (batches if sizes.listed else sets) * needed * k
    seconds = {
        "prepare": n * problem.box**2 / rates.pixels / cores,
        "slices": sliced / rates.samples / cores,
        "coarse": n * sizes.offsets * orientations * (4 * coarse_k / rates.flops + 1 / rates.scores) / cores,
        "fine": n * (3 * fine_shifts(sizes, config) * 2 * k / rates.shifted + 3 * sizes.samples * 4 * k / rates.compared) / cores,
        "map": batches * weighted * k / rates.added / cores,
        "other": costs.ITERATION_SECONDS[kind] + (1 if sizes.classes else maps) * made_ready,
        "solve": solved / rates.transformed / cores,
    }  # fmt: skip
    if run.machine.ranks > 1:
        slices = 2.0 * sliced * operand_bytes(config, kind) + 3.0 * batches * weighted * k * sum_bytes(config)
        seconds["ranks"] = _seconds_between_ranks(run, sizes, sum(seconds.values()), slices)
    if run.residency.home == "disk":  # images are read meanwhile
        seconds["wait"] = max(0.0, reading_seconds(problem, run.machine) - sum(seconds.values()))
    return seconds


def _seconds_between_ranks(run: RunPlan, sizes: Sizes, computing: float, slices: float) -> float:
    """Ranks exchange sums, and of maps, whose solving they share, transforms and new maps (docs/clusters.md); who is done waits
    for the others. computing: seconds of the rest of the iteration; slices: bytes of a rank's slices, which the others make with
    it where volumes are in layers."""
    problem, config, machine = run.problem, run.config, run.machine
    sums = reference_voxels(sizes, config) * 3 * sum_bytes(config)
    each = 2 * sums  # an all-reduce, of planes that all solve for
    if not sizes.classes:
        lines = math.pi / 2 * (sizes.radius * config.padding) ** 2  # of a transform, along y
        in_layers = share_of_volumes(run, sizes) < 1
        each = sums / machine.ranks + slices / classes_of(config) if in_layers else sums
        each += lines * problem.box * 16 / machine.ranks + 4.0 * map_pixels(problem, config)
    payload = classes_of(config) * each
    sent = payload * (machine.ranks - 1) / machine.ranks
    return sent / costs.LINK[machine.kind] + costs.MEETING_SECONDS[machine.kind] + costs.WAITING_SHARE * computing


def reading_seconds(problem: Problem, machine: Machine) -> float:
    """To read all images once from disk."""
    return problem.n_particles * problem.one_image / costs.RATES[machine.kind].read
