"""Where the host lets a GPU wait: `python -m benchmarks.host_idle --data DIR --states DIR --diameter Å` (see `scaling_rank`).

Iterations from kept states: seconds of the stages, the time in which the GPU computes (CUPTI), and the lines of verglas that were
running while its stream was empty. For these a thread looks every half millisecond whether the stream is empty, and which line
of verglas every other thread is in; it slows the iteration by some per cent.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from benchmarks import scaling_rank
from benchmarks.gpu_busy import traced
from verglas.cli.common import resolve_device, set_threads
from verglas.distributed.meeting import joined
from verglas.distributed.place import place_of

PERIOD = 0.0005  # s
WATCHED = ("MainThread", "verglas-finish")  # beginnings of names of threads whose lines are told


def lines_of(frame: FrameType | None, depth: int) -> str:
    """The innermost lines of verglas below a frame, innermost first."""
    found: list[str] = []
    while frame is not None and len(found) < depth:
        path = Path(frame.f_code.co_filename)
        if "verglas" in path.parts:
            found.append(f"{path.parent.name}/{path.stem}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def sampled(work: Callable[[], object], depth: int) -> tuple[int, Counter[str]]:
    """(samples, how many of them found the stream empty with each pair of lines)."""
    stream, idle, ended, samples = torch.cuda.current_stream(), Counter[str](), threading.Event(), 0

    def watch() -> None:
        nonlocal samples
        torch.cuda.set_device(stream.device)
        while not ended.is_set():
            samples += 1
            if stream.query():
                frames = sys._current_frames()
                told = [
                    f"{thread.name[:4]} {lines_of(frames[thread.ident], depth)}"
                    for thread in threading.enumerate() if thread.name.startswith(WATCHED) and thread.ident in frames
                ]  # fmt: skip
                idle[" | ".join(told)] += 1
            time.sleep(PERIOD)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return samples, idle


def told(number: int, session: scaling_rank.driver.Session, options: argparse.Namespace) -> None:
    """Print what is known of the iteration from one state."""
    state = scaling_rank.loaded(scaling_rank.state_path(options.states, number), session.on.device)
    found: list[scaling_rank.Found] = []
    with scaling_rank.recorded(found):
        scaling_rank.iteration(session, state)
    seconds, done = min((scaling_rank.iteration(session, state) for _ in range(options.times)), key=lambda pair: pair[0])
    busy = traced(lambda: scaling_rank.iteration(session, state))
    samples, idle = sampled(lambda: scaling_rank.iteration(session, state), options.depth)
    stages = "  ".join(f"{name} {took:.3f}" for name, took in done.seconds.items())
    held = torch.cuda.memory_reserved() / 1e9
    print(f"state {number}: {seconds:.3f} s  ({stages}); GPU computes {busy.busy:.3f} of {busy.wall:.3f} s; holds {held:.1f} GB; "
          f"stream empty in {sum(idle.values())} of {samples} samples", flush=True)  # fmt: skip
    for line, count in idle.most_common(options.lines):
        print(f"  {1e3 * seconds * count / samples:6.1f} ms  {line}", flush=True)
    kept = options.states / f"idle_{number:02d}.pt"
    mine = found[0].moved(torch.device("cpu"))
    if kept.exists():
        before = torch.load(kept, weights_only=False)
        print("  from the kept one:", scaling_rank.compared(mine, before, session.on.ranks), flush=True)
    else:
        torch.save(mine, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--diameter", type=float, required=True)
    parser.add_argument("--numbers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--times", type=int, default=3, help="iterations of which the shortest is told")
    parser.add_argument("--lines", type=int, default=14)
    parser.add_argument("--depth", type=int, default=2, help="lines of each thread")
    options = parser.parse_args()
    set_threads(None)
    place = place_of(os.environ)
    device, _ = resolve_device("cuda", place)
    with joined(place, device) as ranks:
        session = scaling_rank.prepared(options, device, ranks, 1)
        for number in options.numbers:
            told(number, session, options)


if __name__ == "__main__":
    main()
