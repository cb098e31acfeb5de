"""One rank slowed: `python -m benchmarks.slow_rank [--ranks 2] [--factor 0.5] [--device cpu|cuda] [--out FIGURES.json]`.

Refines a simulated set on several ranks, once as they are and once with the last rank made slower, and compares the seconds of
whole iterations with the ideal: those of equal ranks times n / (n - 1 + factor). The ranks are processes of this module, which
runs the command of verglas that it is given; VERGLAS_SLOW_RANK=RANK:FACTOR makes that rank sleep after every block of particles,
so long that the block took 1 / FACTOR of its time, the GPU's included. On CPUs every rank has a core of its own.
"""

from __future__ import annotations

import argparse
import json
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
    if hasattr(os, "sched_setaffinity") and "cpu" in words:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    if "VERGLAS_SLOW_RANK" in os.environ:
        rank, factor = os.environ["VERGLAS_SLOW_RANK"].split(":")
        slowed(int(rank), float(factor))
    return verglas(words)


def refined(options: argparse.Namespace, data: Path, out: Path, slow: str | None) -> list[dict[str, Any]]:
    """The events of the iterations of a refinement on several ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    words = ["refine", "--particles", str(data / "particles.star"), "--reference", str(data / "start.mrc"),
             "--diameter", str(0.85 * options.box * options.pixel),
             "--initial-resolution", "40", "--max-iterations", str(options.iterations), "--healpix-order", str(options.order),
             "--device", options.device, "--threads", "1" if options.device == "cpu" else "8", "--out", str(out)]  # fmt: skip
    environment = os.environ | ({} if slow is None else {"VERGLAS_SLOW_RANK": slow})
    subprocess.run([*start, "-m", __spec__.name, "as-rank", *words], env=environment, check=True)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "iteration"]


def work_text(event: dict[str, Any]) -> str:
    """Particles and seconds of every rank in an iteration, and how long each waited."""
    sent = event["communication"]
    worked = ", ".join(f"{one['worked']} in {one['seconds']:.2f} s" for one in sent["work"])
    return f"{worked}, waited {', '.join(f'{one:.2f}' for one in sent['waiting_seconds_of_ranks'])} s"


def main() -> None:
    """Simulate, refine twice, compare."""
    if sys.argv[1:2] == ["as-rank"]:
        sys.exit(as_rank(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"n": 1000, "box": 64, "pixel": 4.0, "ranks": 2, "factor": 0.5, "iterations": 5, "order": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, help="set of `verglas simulate` of that box and pixel, in place of one made here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "set"
        words = ["simulate", "--n", str(options.n), "--box", str(options.box), "--pixel", str(options.pixel), "--snr", "0.3",
                 "--model", options.model, "--device", options.device, "--method", "slices", "--out", str(data)]  # fmt: skip
        if options.data is None:
            subprocess.run([sys.executable, "-m", "verglas", *words], check=True)
        equal = refined(options, data, Path(folder) / "equal", None)
        slow = refined(options, data, Path(folder) / "slow", f"{options.ranks - 1}:{options.factor}")
    ideal = options.ranks / (options.ranks - 1 + options.factor)
    found = {}
    for number, pair in enumerate(zip(equal, slow, strict=False), 1):
        seconds = [sum(value for stage, value in event["took"].items() if stage != "total") for event in pair]
        found[f"iteration {number} relative to the ideal"] = seconds[1] / seconds[0] / ideal
        print(f"iteration {number}: {seconds[0]:.2f} s, with a slow rank {seconds[1]:.2f} s, "
              f"{seconds[1] / seconds[0] / ideal:.3f} of the ideal; {work_text(pair[1])}", flush=True)  # fmt: skip
    found["one slow rank relative to the ideal"] = statistics.median(found.values())
    found["one slow rank relative to the ideal, worst"] = max(found.values())
    publish(found, options.out)


if __name__ == "__main__":
    main()
