"""What makes an iteration slower than the same one before: `torchrun ... benchmarks.stalls --data DIR --states DIR --diameter Å`.

Iterations from kept states (those of `benchmarks.scaling_rank`; made here if there are none), each several times. While one runs,
a thread of each rank looks every few milliseconds where the main thread is. For the slowest repetition the lines are told in
which each rank was longer than it usually is, and for all of them seconds, the particles that each rank began with, the speeds
that ranks were taken to have (and those measured last), time of Python's garbage collector, memory asked of the GPU and pinned,
time for which the system held the process's cores back.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import scaling_rank
from benchmarks.iteration_kinds import kind_of, pushed
from verglas.cli.common import resolve_device, set_threads
from verglas.distributed.meeting import joined
from verglas.distributed.place import place_of
from verglas.distributed.shares import Shares
from verglas.refinement import checkpoint
from verglas.refinement.state import State

PERIOD = 0.004  # s between two looks
DEPTH = 4  # lines of verglas that are told, innermost first
SHOWN, LEAST = 7, 0.01  # lines of a rank; s that are worth one
BESIDE, IDLE = ("verglas-taken-over", "verglas-ahead"), " _worker"  # threads that read images; where they wait for work
THROTTLED = (Path("/sys/fs/cgroup/cpu.stat"), Path("/sys/fs/cgroup/cpu/cpu.stat"))


@dataclass
class Watched:
    """One repetition of a rank. seconds: whole; lines: seconds of the main thread in each place; counts: what else happened."""

    seconds: float = 0.0
    lines: Counter[str] = field(default_factory=Counter)
    counts: dict[str, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    owned: int = 0


def place(frame: FrameType | None) -> str:
    """The innermost function, and lines of verglas that it was called from."""
    found: list[str] = []
    while frame is not None and len(found) < DEPTH:
        path = Path(frame.f_code.co_filename)
        if "verglas" in path.parts or not found:
            found.append(f"{path.stem}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


@contextmanager
def sampled(lines: Counter[str]) -> Iterator[None]:
    """Within, a thread adds up where this one is. A look counts for the time since the last one: who keeps Python's lock keeps
    the looking thread waiting, too."""
    main, ended = threading.get_ident(), threading.Event()

    def look() -> None:
        last = time.perf_counter()
        while not ended.wait(PERIOD):
            now = time.perf_counter()
            frames = sys._current_frames()
            lines[place(frames.get(main))] += now - last  # type: ignore[assignment]
            for thread in threading.enumerate():
                beside = place(frames.get(thread.ident or 0)) if thread.name.startswith(BESIDE) else IDLE
                if IDLE not in beside:
                    lines[f"beside: {beside}"] += now - last  # type: ignore[assignment]
            last = now

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def collected(counts: dict[str, float]) -> Iterator[None]:
    """Within, seconds of Python's garbage collector are added up."""
    begun = 0.0

    def heard(phase: str, _: dict[str, int]) -> None:
        nonlocal begun
        if phase == "start":
            begun = time.perf_counter()
        else:
            counts["collector ms"] = counts.get("collector ms", 0.0) + 1e3 * (time.perf_counter() - begun)

    gc.callbacks.append(heard)
    try:
        yield
    finally:
        gc.callbacks.remove(heard)


def totals() -> dict[str, float]:
    """What was asked of the GPU and of the system since the process began."""
    found: dict[str, float] = {}
    if torch.cuda.is_available():
        memory = torch.cuda.memory_stats()
        found["retries"] = memory.get("num_alloc_retries", 0)
        for name, key in (("GB mapped", "allocated"), ("GB unmapped", "freed")):
            found[name] = memory.get(f"reserved_bytes.all.{key}", 0) / 1e9
        pinned = getattr(torch.cuda, "host_memory_stats", dict[str, Any])()
        found["pinned buffers"] = pinned.get("num_host_alloc", 0)
        found["pinning ms"] = pinned.get("host_alloc_time.total", 0) / 1e3
    for path in THROTTLED:
        if path.exists():
            entries = dict(line.split() for line in path.read_text().splitlines())
            found["held back ms"] = int(entries.get("throttled_usec", int(entries.get("throttled_time", 0)) // 1000)) / 1e3
    return found


def watched(session: scaling_rank.driver.Session, state: State) -> Watched:
    """One iteration after a state."""
    one, before = Watched(), totals()
    session.on.ranks.everyones(0)
    with sampled(one.lines), collected(one.counts):
        one.seconds, done = scaling_rank.iteration(session, state)
    one.counts |= {name: value - before[name] for name, value in totals().items()}
    one.counts |= {f"{stage} ms": 1e3 * seconds for stage, seconds in done.seconds.items()}
    if done.communication is not None:
        one.counts["MB sent"] = done.communication["bytes_of_ranks"][session.on.ranks.rank] / 1e6
        one.counts["waiting ms"] = 1e3 * done.communication["waiting_seconds_of_ranks"][session.on.ranks.rank]
        work = done.communication["work"][session.on.ranks.rank]
        one.counts |= {"worked": work["worked"], "helped": work["helped"], "working ms": 1e3 * work["seconds"]}
    shares: Shares | None = session.data.shares
    if shares is not None:
        one.speeds = shares.pace.speed_R.tolist() + shares._log_R.exp().tolist()
        one.owned = int((shares.owner_B == session.on.ranks.rank).sum())
    return one


def surplus(slow: Watched, others: list[Watched]) -> list[tuple[float, str]]:
    """Lines in which a repetition was longer than the median of others, s, longest first."""
    usual = {line: statistics.median(one.lines.get(line, 0.0) for one in others) for line in slow.lines}
    found = sorted(((slow.lines[line] - usual[line], line) for line in slow.lines), reverse=True)
    return [one for one in found[:SHOWN] if one[0] > LEAST]


def told(session: scaling_rank.driver.Session, number: int, state: State, options: argparse.Namespace) -> State:
    """Repeat an iteration and tell what was different; the state after it."""
    ranks, lead = session.on.ranks, session.on.ranks.is_lead
    done = None
    for _ in range(options.warm):
        _, done = scaling_rank.iteration(session, state)
    assert done is not None
    everyones = ranks.everyones([watched(session, state) for _ in range(options.times)])
    seconds = [one.seconds for one in everyones[0]]
    if lead:
        print(f"== iteration {number}, {kind_of(done)[0]}, {done.state.current_size} px: "
              f"{' '.join(f'{one:.3f}' for one in seconds)} s, median {statistics.median(seconds):.3f}", flush=True)  # fmt: skip
        for turn, several in enumerate(zip(*everyones, strict=True)):
            for rank, one in enumerate(several):
                counts = ", ".join(f"{name} {value:.3g}" for name, value in one.counts.items() if value)
                speeds = " ".join(f"{speed:.2f}" for speed in one.speeds)
                print(f"  {turn} rank {rank}: {one.seconds:.3f} s; owns {one.owned}, speeds, measured {speeds}; {counts}",
                      flush=True)  # fmt: skip
        slowest = seconds.index(max(seconds))
        for rank, mine in enumerate(everyones):
            others = [one for turn, one in enumerate(mine) if turn != slowest] or [Watched()]
            print(f"  repetition {slowest} on rank {rank}, longer than usual:")
            for more, line in surplus(mine[slowest], others):
                print(f"    {1e3 * more:6.0f} ms of {1e3 * mine[slowest].lines[line]:6.0f}  {line}", flush=True)
        middle = sorted(range(len(seconds)), key=seconds.__getitem__)[len(seconds) // 2]
        for rank, mine in enumerate(everyones):
            print(f"  repetition {middle} on rank {rank}, longest places:")
            for line, took in mine[middle].lines.most_common(SHOWN):
                print(f"    {1e3 * took:6.0f} ms  {line}", flush=True)
    return done.state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--diameter", type=float, required=True)
    parser.add_argument("--numbers", type=lambda text: [int(one) for one in text.split(",")], default=[1, 2, 4, 6])
    parser.add_argument("--warm", type=int, default=1, help="times that an iteration is done before it is watched")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.states.mkdir(parents=True, exist_ok=True)
    set_threads(None)
    place_here = place_of(os.environ)
    device, _ = resolve_device(options.device, place_here)
    with joined(place_here, device) as ranks:
        session = scaling_rank.prepared(options, device, ranks, 1)
        made = ranks.agreed(scaling_rank.state_path(options.states, 0).exists())
        state = session.state
        for number in range(max(options.numbers) + 1):
            path = scaling_rank.state_path(options.states, number)
            if made:
                state = scaling_rank.loaded(path, device) if number in options.numbers else state
            elif ranks.is_lead:
                checkpoint.save(path, state, session.config, "")
            if number in options.numbers:
                after = told(session, number, state, options)
            elif not made:
                after = scaling_rank.iteration(session, state)[1].state
            if not made:
                state = pushed(after, after.iteration > 1)


if __name__ == "__main__":
    main()
