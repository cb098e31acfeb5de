"""One process among those that `python -m benchmarks.scaling` starts: single iterations from given states, timed and compared.

    torchrun --standalone --nproc-per-node P -m benchmarks.scaling_rank --data DIR --states DIR --diameter Å --out FILE

Who comes first finds no states: it goes through the samplings, one iteration on each, and keeps the state before each iteration
and what was found from it (sums of slices, poses). All others begin their iterations from these states and compare their finds.
Each iteration is done a few times from its state, and the middle one of their times counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_busy import traced, union
from benchmarks.iteration_kinds import kind_of, pushed
from benchmarks.scaling_tables import HEADING, lines, texts
from benchmarks.stage_times import StageTimes
from verglas.cli.common import resolve_device, set_threads
from verglas.cli.plan import this_machine
from verglas.core.rows import RowTable
from verglas.distributed.meeting import joined
from verglas.distributed.place import place_of
from verglas.distributed.ranks import Ranks
from verglas.io.mrc import read_map
from verglas.maximization.accumulate import table_of
from verglas.maximization.gather import BatchResult
from verglas.maximization.slabs import Slabs
from verglas.maximization.solvers import Solvers
from verglas.particles.table import ParticleTable
from verglas.projection.volume import coordinate_chunks, padded_size, radius2
from verglas.refinement import checkpoint, driver, step
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Problem
from verglas.refinement.state import Poses, State
from verglas.refinement.step import Iteration

SAME_ANGLE, SAME_OFFSET = 1e-4, 1e-3  # of matrix elements; Å: the same sample of the grid
NUMBER_BYTES, VOXEL_NUMBERS, REFERENCE_NUMBERS = 4, 3, 2  # float32; data (re, im) and weight; a reference's coefficient (re, im)


@dataclass
class Found:
    """What an expectation found, before maps were solved from it. sums: (re, im, weight) [V, 3] of each half-set, `rows` says
    where, `padding` of which transform; poses of all particles. slabs: which part of the sums of all ranks a rank has here, None:
    all. solvers: the rank that has all sums of each half-set, where others have none of them."""

    sums: list[Tensor]
    rows: RowTable
    padding: float
    poses: Poses
    slabs: Slabs | None = None
    solvers: Solvers | None = None

    def moved(self, device: torch.device) -> Found:
        """The same, on `device`."""
        return replace(self, sums=[one.to(device) for one in self.sums], rows=self.rows.to(device))

    def whole(self) -> Found:
        """All of it; all ranks ask for it."""
        if self.solvers is not None:
            pairs = zip(self.solvers.of_half, self.sums, strict=True)
            ranks, room = self.solvers.ranks, (self.rows.count, 3)
            sums = [ranks.of_rank(rank, one if len(one) else one.new_empty(room), "found") for rank, one in pairs]
            return replace(self, sums=sums, solvers=None)
        if self.slabs is None:
            return self
        return replace(self, sums=[self.slabs.joined(one) for one in self.sums], rows=self.slabs.whole, slabs=None)

    def beside(self, whole: Found) -> Found:
        """Of what others found, the part that this rank has, where this rank has it."""
        if self.solvers is not None:
            sums = [one[: len(mine)].to(mine.device) for one, mine in zip(whole.sums, self.sums, strict=True)]
            return replace(whole, sums=sums, rows=self.rows)
        if self.slabs is None:
            return whole.moved(self.rows.device)
        sums = [self.slabs.cut(one).to(self.rows.device) for one in whole.sums]
        return replace(whole, sums=sums, rows=self.rows)


@dataclass
class Timed:
    """One iteration from a state, of several repetitions the middle one. seconds: whole, of the lead; all_seconds: of every
    repetition; took: by stage, of the lead; communication: as `Ranks.communication` tells it, None for a process alone;
    least_bytes: the fewest that a rank could send for it; voxel_bytes: the fewest if maps travel as voxels inside the mask;
    apart_bytes: the fewest where each rank has sums of its own half-sets alone, and one rank solves for each."""

    number: int
    kind: str
    count: int
    seconds: float
    took: dict[str, float]
    communication: dict[str, Any] | None
    least_bytes: float
    voxel_bytes: float
    apart_bytes: float
    size_px: int
    significant: float
    all_seconds: list[float] = field(default_factory=list)
    against_first: dict[str, float] = field(default_factory=dict)
    again: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)


@contextmanager
def recorded(found: list[Found]) -> Iterator[None]:
    """Append what every expectation within the `with` finds: solving uses the sums up."""
    expect = step.expect

    def recording(*arguments: Any, **options: Any) -> Any:
        halves, poses = expect(*arguments, **options)
        solvers, plan = halves[0].solvers, halves[0].plan
        have = [number for number in range(len(halves)) if solvers is None or solvers.mine == number]
        of = {number: halves[number].accumulators[0] for number in have}
        nothing = torch.empty(0, 3, device=halves[0].on.device)
        sums = [of[number].total()[:, :3].float().clone() if number in of else nothing for number in range(len(halves))]
        grid = plan.model_grid
        rows = table_of(grid.box, grid.radius, grid.padding, nothing.device) if solvers else of[0].rows
        padding, slabs = padded_size(grid.box, grid.padding) / grid.box, None if solvers else of[0].slabs
        found.append(Found(sums, rows, padding, poses, slabs, solvers))
        return halves, poses

    with patch.object(step, "expect", recording):
        yield


def compared(one: Found, other: Found, ranks: Ranks) -> dict[str, float]:
    """Largest relative difference over shells of data and of weights, and the share of particles with the same pose. other: of
    the same voxels; all ranks compare."""
    squares_H2S2 = torch.stack([shell_squares(a, b, one.rows, one.padding) for a, b in zip(one.sums, other.sums, strict=True)])
    if one.slabs is not None or one.solvers is not None:
        ranks.add_up(squares_H2S2, "comparison")
    difference_S2, norm_S2 = squares_H2S2.unbind(1)
    share = torch.where(norm_S2 > 0, difference_S2 / norm_S2.clamp_min(1e-300), 0).sqrt()
    data, weight = share.amax((0, 1)).tolist()
    turned_B = (one.poses.rotation_B33 - other.poses.rotation_B33).abs().amax((1, 2))
    moved_B = (one.poses.origin_B2 - other.poses.origin_B2).abs().amax(1)
    same = (turned_B < SAME_ANGLE) & (moved_B < SAME_OFFSET)
    return {"data": data, "weight": weight, "same poses": float(same.double().mean())}


def shell_squares(one_V3: Tensor, other_V3: Tensor, rows: RowTable, padding: float) -> Tensor:
    """|one - other|^2 and |other|^2 of every shell of the map, each of the data and of the weights: float64 [2, S, 2]."""
    shells = int(rows.radius / padding + 0.5) + 1
    total_2S2 = torch.zeros(2, shells, 2, dtype=torch.float64, device=one_V3.device)
    for part, coordinates in coordinate_chunks(rows) if len(one_V3) else ():
        radius = radius2(coordinates).double().sqrt()
        shell = (radius / padding + 0.5).long().clamp_max(shells - 1)
        for total_S2, value_V3 in zip(total_2S2, (one_V3[part] - other_V3[part], other_V3[part]), strict=True):
            square_V3 = value_V3.double().square()
            total_S2.index_add_(0, shell, torch.stack([square_V3[:, :2].sum(1), square_V3[:, 2]], 1))
    return total_2S2.cpu()


def least_bytes(
    rows: RowTable, padding: float, ranks: int, voxels: int, kept: int = 0, sets: float = 2.0
) -> tuple[float, float, float]:
    """The fewest bytes that each rank must send in an iteration of two half-sets: its part of the sums within the radius to
    whoever adds them up (float32), the new references that it solved to all others, as coefficients of the unpadded map
    within the radius or as voxels inside the mask (so many), whichever is less, and what it found of its particles; then with
    maps as voxels, which they are sent as; and as the first, but with sums of so many half-sets alone that a rank has where these
    are apart (`sets`, the mean): those of each half-set come together at one rank, and averages of one half go to the other's,
    if that is less.
    kept: bytes of what is kept of all particles. The first two are for ranks that all have both."""
    sums, coefficients = VOXEL_NUMBERS * half_ball(rows.radius), REFERENCE_NUMBERS * half_ball(rows.radius / padding)
    each, fewest = NUMBER_BYTES * (ranks - 1) / ranks, 2 * min(coefficients, voxels)
    found = kept * (ranks - 1) / ranks
    apart = min(each * sets * sums, NUMBER_BYTES * ((sets * ranks - 2) * sums + coefficients) / ranks)
    return each * (2 * sums + fewest) + found, each * 2 * (sums + voxels) + found, apart + each * fewest + found


def bytes_of_poses(poses: Poses) -> int:
    """Of what an iteration finds of all particles, in double precision."""
    numbers = sum(getattr(poses, name)[:1].numel() for name in BatchResult.__dataclass_fields__)
    return 8 * numbers * len(poses.half_B)


def half_ball(radius: float) -> float:
    """Points of a grid in half a ball."""
    return 2 / 3 * math.pi * radius**3


def iteration(session: driver.Session, state: State) -> tuple[float, Iteration]:
    """(seconds, the iteration after a state), begun by all ranks together."""
    session.on.ranks.everyones(0)
    session.on.ranks.communication()  # what was sent until now is not of this iteration
    begin = time.perf_counter()
    done = next(driver.iterations(driver.resume(session, state)))
    if session.on.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, done


def kernels_of(session: driver.Session, state: State) -> dict[str, float]:
    """Seconds of one more iteration under CUPTI, mean over ranks: whole, with kernels of computing, with those of NCCL (which
    wait for other ranks, too), with these alone; by stage, of the host and those in which the GPU did nothing. The lead prints
    its longest kernels."""
    times = StageTimes()

    def watched() -> None:
        session.on.ranks.everyones(0)
        with times.watching():
            iteration(session, state)

    trace = traced(watched)
    sending = [(begin, end) for name, begin, end in trace.kernels if "nccl" in name.lower()]
    computing = union((begin, end) for name, begin, end in trace.kernels if "nccl" not in name.lower())
    mine = {"wall s": trace.wall, "computing s": computing, "NCCL s": union(sending), "NCCL alone s": trace.busy - computing}
    idle = times.idle([(begin, end) for _, begin, end in trace.kernels])
    mine |= {f"in {name}": seconds for name, seconds in times.seconds.items()}
    mine |= {f"idle in {name}": seconds for name, seconds in idle.items()}
    everyones = session.on.ranks.everyones(mine)
    if session.on.ranks.is_lead:
        for name, count, seconds in trace.longest(14):
            print(f"  {1000 * seconds:8.2f} ms {count:6d} x {name[:100]}", flush=True)
    return {name: sum(one[name] for one in everyones) / len(everyones) for name in mine}


def stages_of(session: driver.Session, state: State) -> dict[str, float]:
    """Seconds by stage of one more iteration, mean over ranks (benchmarks/stage_times.py)."""
    session.on.ranks.everyones(0)  # the lead may have been at files
    times = StageTimes()
    with times.watching():
        iteration(session, state)
    everyones = session.on.ranks.everyones(times.seconds)
    return {name: sum(one[name] for one in everyones) / len(everyones) for name in times.seconds}


def measured(session: driver.Session, state: State, number: int, options: argparse.Namespace) -> tuple[Timed, Iteration]:
    """An iteration from a state, done once, as kernels may be compiled in it, and then a few times, of which the middle one
    counts. What the first one found is compared with the last one's, and with what is kept of this number, or kept itself."""
    ranks, found, times = session.on.ranks, list[Found](), list[tuple[float, Iteration]]()
    with recorded(found):
        iteration(session, state)
        for _ in range(options.times):
            times.append(iteration(session, state))
            del found[1:-1]
    middle = sorted(range(len(times)), key=lambda turn: times[turn][0])[(len(times) - 1) // 2]
    seconds, done = times[ranks.agreed(middle)]
    kind, count = kind_of(done)
    significant = float(done.state.poses.significant_B.double().mean())
    voxels = int((step.reference_mask(state, session.config, None, session.on.device) > 0).sum())
    kept, shares = bytes_of_poses(done.state.poses), session.data.shares
    sets = 2.0 if shares is None or shares.half_B is None else float(shares.starts_of(shares.owner_B).mean())
    least = least_bytes(found[0].rows, found[0].padding, ranks.size, voxels, kept, sets)
    timed = Timed(number, kind, count, seconds, done.seconds, done.communication, *least, done.state.current_size, significant)
    timed.all_seconds = [one for one, _ in times]
    timed.again = compared(found[1], found[0], ranks)
    path = options.states / f"found_{number:02d}.pt"
    if number in options.compare:
        if not ranks.agreed(path.exists()):
            whole = found[0].whole()
            if ranks.is_lead:
                torch.save(whole.moved(torch.device("cpu")), path)
        elif same_particles(kept := torch.load(path, weights_only=False), found[0]):
            timed.against_first = compared(found[0], found[0].beside(kept), ranks)
    if number in options.trace:
        timed.kernels = kernels_of(session, state)
    if number in options.stages:
        timed.stages = stages_of(session, state)
    if ranks.is_lead:
        print(*lines(ranks.size, len(session.data), asdict(timed)), sep="\n", flush=True)  # kept if a later one does not end
    return timed, done


def same_particles(one: Found, other: Found) -> bool:
    """Whether both are of as many particles."""
    return len(one.poses.half_B) == len(other.poses.half_B)


def through_samplings(session: driver.Session, options: argparse.Namespace) -> list[Timed]:
    """Every sampling once, from coarse to fine, those that are asked for measured; the state before each iteration is kept."""
    state, found, number = session.state, list[Timed](), 0
    while not state.solved and number < options.most:
        if session.on.ranks.is_lead:
            checkpoint.save(state_path(options.states, number), state, session.config, "")
        if number in options.numbers:
            timed, done = measured(session, state, number, options)
            found.append(timed)
        else:
            _, done = iteration(session, state)
        state, number = pushed(done.state, done.state.iteration > 1), number + 1
    return found


def from_states(session: driver.Session, options: argparse.Namespace, every: int) -> list[Timed]:
    """The same iterations from the states that are kept; every: with one of so many particles."""
    found = list[Timed]()
    for number in options.numbers:
        path = state_path(options.states, number)
        if path.exists():
            found.append(measured(session, thinned(loaded(path, session.on.device), every), number, options)[0])
    return found


def loaded(path: Path, device: torch.device) -> State:
    """A state that was kept, its maps on the device, as an iteration leaves them."""
    state, _, _ = checkpoint.load(path)
    return replace(state, halves=[replace(half, map_ZYX=half.map_ZYX.to(device)) for half in state.halves])


def state_path(folder: Path, number: int) -> Path:
    """Where the state before an iteration is kept."""
    return folder / f"state_{number:02d}.checkpoint"


def thinned(state: State, every: int) -> State:
    """The state of every so-manieth particle."""
    return state if every == 1 else replace(state, poses=state.poses.of(torch.arange(0, len(state.poses.half_B), every)))


def prepared(
    options: argparse.Namespace, device: torch.device, ranks: Ranks, every: int, order: int = RefineConfig.healpix_order
) -> driver.Session:
    """Every so-manieth particle, read and planned for as a command of verglas would; order: of the first grid."""
    table = ParticleTable.read(options.data / "particles.star")
    config = RefineConfig(diameter=options.diameter, initial_resolution=40.0, healpix_order=order)
    if every > 1:
        table = table.with_columns(rlnRandomSubset=table.half_sets(config.seed))  # not drawn anew for fewer
        table = table.select(slice(0, None, every))
    planned = plan(Problem.of(table, ranks.size), config, replace(this_machine(device, ranks.local_size), ranks=ranks.size))
    planned.check()
    start = read_map(options.data / "start.mrc")
    return driver.prepare(table, start, config, device, planned=planned, ranks=ranks)


def passes(options: argparse.Namespace, device: torch.device, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """What is published of every pass."""
    for every in options.passes:
        begin = time.perf_counter()
        session = prepared(options, device, ranks, every)
        preparing = time.perf_counter() - begin
        made = ranks.agreed(state_path(options.states, 0).exists())
        options.trace = options.trace if every == 1 else []
        found = from_states(session, options, every) if made else through_samplings(session, options)
        yield {"ranks": ranks.size, "particles": len(session.data), "preparing s": preparing,
               "iterations": [asdict(one) for one in found]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--diameter", type=float, required=True)
    parser.add_argument("--passes", type=lambda text: [int(one) for one in text.split(",")], default=[1],
                        help="one of how many particles each pass takes")  # fmt: skip
    parser.add_argument("--numbers", type=lambda text: [int(one) for one in text.split(",")], default=list(range(99)),
                        help="iterations that are measured")  # fmt: skip
    parser.add_argument("--times", type=int, default=3, help="repetitions of each, after one that is not timed")
    parser.add_argument("--compare", type=lambda text: [int(one) for one in text.split(",") if one], default=[],
                        help="iterations whose sums and poses are kept and compared")  # fmt: skip
    parser.add_argument("--trace", type=lambda text: [int(one) for one in text.split(",") if one], default=[],
                        help="numbers of iterations that are done once more under CUPTI")  # fmt: skip
    parser.add_argument("--stages", type=lambda text: [int(one) for one in text.split(",") if one], default=[],
                        help="numbers of iterations that are done once more, their stages timed")  # fmt: skip
    parser.add_argument("--most", type=int, default=99, help="iterations")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--begun", type=float, default=time.time(), help="time.time() when this was started")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started = time.time() - options.begun
    options.states.mkdir(parents=True, exist_ok=True)
    set_threads(None)
    place = place_of(os.environ)
    device, _ = resolve_device(options.device, place)
    begin = time.perf_counter()
    with joined(place, device) as ranks:
        ranks.everyones(0)
        setup = {"process start s": started, "joining s": time.perf_counter() - begin}
        if ranks.links is not None:
            ranks.connected(device)
            setup["connecting GPUs s"] = ranks.links.seconds
        if ranks.is_lead:
            print(f"{ranks.size} ranks: {texts(setup)}", HEADING, sep="\n", flush=True)
        found = []
        for one in passes(options, device, ranks):
            found.append(one | setup)
            if ranks.is_lead:
                options.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
