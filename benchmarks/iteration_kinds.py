"""A refinement in small: every sampling once, two iterations on each, and what a whole one would take by their counts.

After each pair the schedule is told that resolution and poses have settled, so that it refines the grid as it would later; where
it finds the grid fine enough, the last iteration follows. The second of a pair counts: the first one after a change may compile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from verglas.cli.plan import this_machine
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import driver
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Problem
from verglas.refinement.state import State
from verglas.refinement.step import Iteration, iterate

GLOBAL_COUNT, LOCAL_COUNT = 5, 3  # iterations on one grid in a usual run: the resolution still grows on global ones
FILES_SECONDS = 0.3  # of an iteration: files, report (written beside the next iteration where that is implemented)


def pushed(state: State, on: bool) -> State:
    """The state told that it has settled (`on`), or that it still gains: the grid is refined next, or kept."""
    count = 1 if on else 0
    schedule = replace(state.schedule, iterations_without_gain=count, iterations_without_changes=count)
    return replace(state, schedule=schedule)


def hurried(session: driver.Session) -> Iterator[tuple[float, Iteration]]:
    """(seconds, iteration): the first, then pairs on finer and finer grids, then the last."""
    state, second = session.state, False
    while not state.solved:
        torch.cuda.empty_cache()
        begin = time.perf_counter()
        done = iterate(state, session.data, session.config, session.on, session.mask_ZYX, driver.quiet)
        yield time.perf_counter() - begin, done
        state = pushed(done.state, second)
        second = not second if done.state.iteration > 1 else True


def process_age() -> float:
    """Seconds since this process was started, imports included (Linux)."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def summed(data: Path, config: RefineConfig, device: torch.device, age: float = 0.0) -> dict[str, float]:
    """Seconds of each kind, their counts, and the sum. data: folder of a simulated set; age: seconds that starting took."""
    begin = time.perf_counter()
    table = ParticleTable.read(data / "particles.star")
    planned = plan(Problem.of(table), config, this_machine(device))
    session = driver.prepare(table, read_map(data / "start.mrc"), config, device, planned=planned)
    found = {"before the first iteration s": age + time.perf_counter() - begin}
    total = found["before the first iteration s"]
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    for took, done in hurried(session):
        kind, count = kind_of(done)
        seconds[kind], counts[kind] = took, count
        state = done.state
        print(f"{kind}: {took:.2f} s {done.seconds}, size {state.current_size} px, {state.current_resolution:.2f} Å, significant "
              f"{float(state.poses.significant_B.double().mean()):.1f}", flush=True)  # fmt: skip
    for kind, value in seconds.items():
        found |= {f"{kind} s": value, f"{kind} count": counts[kind]}
        total += counts[kind] * (value + FILES_SECONDS)
    return found | {"summed s": total}


def kind_of(done: Iteration) -> tuple[str, int]:
    """Name of an iteration's kind, and how often it comes in a usual run."""
    schedule = done.state.schedule
    if done.final is not None:
        return "last", 1
    if done.state.iteration == 1:
        return "first", 1
    if schedule.local_sigma:
        return f"local order {schedule.healpix_order}", LOCAL_COUNT
    return f"global order {schedule.healpix_order}", GLOBAL_COUNT
