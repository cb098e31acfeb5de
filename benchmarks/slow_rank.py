"""One rank slowed: `python -m benchmarks.slow_rank [--ranks 2] [--factor 0.5] [--device cpu|cuda] [--out FIGURES.json]`.

Several ranks refine a simulated set for a few iterations (--before), then do the next one again and again from the same state: as
they are (the middle one of --times counts), and with the last rank made slower. Seconds are compared with the ideal: those of
equal ranks times n / (n - 1 + factor). The rank that is slowed sleeps after every block of particles, so long that the block took
1 / factor of its time, the GPU's included. A rank's speed counts once two iterations agree on it, so the median and the worst
are of those after them. On CPUs every rank has a core of its own. `as-rank WORDS` runs a command of verglas as a rank that
VERGLAS_SLOW_RANK=RANK:FACTOR slows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import publish

UNKNOWN = 2  # iterations until the ranks' speeds are taken to be what they are


def slowed(rank: int, factor: float) -> None:
    """Make blocks of particles take 1 / factor of their time, if this process is that rank."""
    if int(os.environ["RANK"]) != rank:
        return
    import torch

    from verglas.refinement.expect import HalfExpectation

    plain = HalfExpectation._block

    def slow(self: HalfExpectation, *words: Any) -> Iterator[Any]:
        begin = time.perf_counter()
        yield from plain(self, *words)
        if self.on.device.type == "cuda":
            torch.cuda.synchronize()
        time.sleep((time.perf_counter() - begin) * (1 / factor - 1))

    HalfExpectation._block = slow  # type: ignore[method-assign]


def as_rank(words: list[str]) -> int:
    """Run a command of verglas as one of several ranks."""
    from verglas.cli.main import main as verglas
    from verglas.refinement import ahead

    ahead.room_ahead = lambda *_: False  # one block after the other: then it is known how long each takes
    own_core("cpu" if "cpu" in words else "cuda")
    if "VERGLAS_SLOW_RANK" in os.environ:
        rank, factor = os.environ["VERGLAS_SLOW_RANK"].split(":")
        slowed(int(rank), float(factor))
    return verglas(words)


def repeated(words: list[str]) -> None:
    """As one of several ranks: an iteration again and again from one state, ranks as they are, then the last one slower."""
    import torch

    from benchmarks.scaling_rank import iteration, prepared
    from verglas.cli.common import resolve_device, set_threads
    from verglas.distributed.meeting import joined
    from verglas.distributed.place import place_of
    from verglas.refinement import ahead

    options = parser_of().parse_args(words)
    options.diameter = 0.85 * options.box * options.pixel
    ahead.room_ahead = lambda *_: False
    own_core(options.device)
    set_threads(1 if options.device == "cpu" else None)
    place = place_of(os.environ)
    device, _ = resolve_device(options.device, place)
    with joined(place, device) as ranks:
        session = prepared(options, torch.device(device), ranks, 1, options.order)
        state = session.state
        for _ in range(options.before):
            state = iteration(session, state)[1].state
        seconds = list[float]()
        for _ in range(1 + options.times):
            took, done = iteration(session, state)
            seconds.append(took)
            if ranks.is_lead:
                what = f"order {options.order}, {state.current_size} px, equal"
                print(f"{what}: {took:.3f} s; {work_text(done.communication)}", flush=True)
        equal = statistics.median(seconds[1:])
        slowed(ranks.size - 1, options.factor)
        ideal, found = equal * ranks.size / (ranks.size - 1 + options.factor), dict[str, float]()
        for number in range(1, options.iterations + 1):
            took, done = iteration(session, state)
            found[f"iteration {number} relative to the ideal"] = took / ideal
            if ranks.is_lead:
                print(f"slow, iteration {number}: {took:.3f} s, {took / ideal:.3f} of the ideal; "
                      f"{work_text(done.communication)}", flush=True)  # fmt: skip
        everything = list(found.values())
        later = everything[UNKNOWN:]
        found["one slow rank relative to the ideal"] = statistics.median(later)
        found["one slow rank relative to the ideal, worst"] = max(later)
        found["one slow rank relative to the ideal, worst of all"] = max(everything)
        found["all with a slow rank relative to the ideal"] = statistics.mean(everything)
        if ranks.is_lead:
            publish(found | {"equal ranks s": equal}, options.out)


def work_text(sent: dict[str, Any] | None) -> str:
    """Particles and seconds of every rank in an iteration, and how long each waited."""
    assert sent is not None
    worked = ", ".join(f"{one['worked']} ({one['helped']} of others) in {one['seconds']:.2f} s" for one in sent["work"])
    reading = ", ".join(f"{one['reading']:.2f}" for one in sent["work"])
    return f"{worked}, waited {', '.join(f'{one:.2f}' for one in sent['waiting_seconds_of_ranks'])}, for images {reading} s"


def own_core(device: str) -> None:
    """On CPUs: a core for this rank alone."""
    if hasattr(os, "sched_setaffinity") and device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})


def parser_of() -> argparse.ArgumentParser:
    """The options, of whoever starts and of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"particles": 1000, "box": 64, "pixel": 4.0, "ranks": 2, "factor": 0.5, "before": 3, "times": 3, "iterations": 7,
             "order": 2}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, help="set of `verglas simulate` of that box and pixel, in place of one made here")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    """Simulate, start the ranks."""
    if sys.argv[1:2] == ["as-rank"]:
        sys.exit(as_rank(sys.argv[2:]))
    if sys.argv[1:2] == ["repeated"]:
        repeated(sys.argv[2:])
        return
    options = parser_of().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "set"
        words = ["simulate", "--n", str(options.particles), "--box", str(options.box), "--pixel", str(options.pixel),
                 "--snr", "0.3", "--model", options.model, "--device", options.device, "--method", "slices",
                 "--out", str(data)]  # fmt: skip
        if options.data is None:
            subprocess.run([sys.executable, "-m", "verglas", *words], check=True)
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        given = [] if options.data else ["--data", str(data)]
        subprocess.run([*start, "-m", __spec__.name, "repeated", *sys.argv[1:], *given], check=True)


if __name__ == "__main__":
    main()
