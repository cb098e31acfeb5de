"""Refinements on several GPUs of one host where time on it is short: `python -m benchmarks.side_by_side --model 5a1a_D2.npz`.

    python -m benchmarks.side_by_side --model MODEL [--ranks 4] [--particles 105247] [--box 360] [--pixel 1.34] [--diameter 320]
        [--warm 2000] [--seconds 240] [--kept 45] [--everything] [--work DIR] [--logs DIR] [--out FIGURES.json] [--device cuda]

One set (of eight copies of MODEL, unless it is `demo`) is simulated while a small one warms the compiler's cache. It is refined
by all ranks, which leave --kept seconds; then, side by side on GPUs of their own, by half of the ranks, and by one rank each with
1 / RANKS and (of more than two ranks) a half of the particles (--everything: by one rank with all of them), until --seconds are
over. What each iteration took is printed when
it ends: strong scaling from those that all did alike, and a model fitted to them (benchmarks/scaling_model.py).
Cores are shared among runs by their ranks.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import scaling_model
from benchmarks.eight_copies import write_eight
from benchmarks.figures import publish
from benchmarks.process_tree import TRACED, end_all
from benchmarks.refinement_run import iterations_of, mean_fsc
from benchmarks.scaling import several
from benchmarks.scaling_rank import NUMBER_BYTES, REFERENCE_NUMBERS, VOXEL_NUMBERS, half_ball
from benchmarks.simulated import simulated
from verglas.cli.launch import visible_names
from verglas.particles.table import ParticleTable

PADDING = 2  # of references
LAST = 3000  # characters of what a run said, shown where it did not end well
LOOK = 2.0  # s between two looks what has ended
NEARLY = 0.1  # share by which sizes may differ in iterations that the model is fitted to: fewer particles, fewer shells
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A refinement of a STAR file on some GPUs of the host, by one rank each."""

    name: str
    star: Path
    gpus: Sequence[int]
    particles: int

    @property
    def ranks(self) -> int:
        return len(self.gpus)

    def done(self, options: argparse.Namespace, until: float) -> list[Event]:
        """The events of its iterations; it is stopped at `until` (time.monotonic())."""
        out = options.work / self.name
        words = ["refine", "--particles", self.star, "--reference", self.star.parent / "start.mrc", "--out", out,
                 "--diameter", options.diameter, "--initial-resolution", 40, "--device", options.device,
                 "--max-iterations", options.max_iterations]  # fmt: skip
        program = ["-m", "verglas"]
        if options.device == "cuda" and self.ranks > 1:
            words += ["--gpus", self.ranks]
        elif self.ranks > 1:
            program = [*several(self.ranks), "verglas"]
        cores = max(1, len(os.sched_getaffinity(0)) // options.ranks)
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(visible_names(list(map(str, self.gpus))))} if options.device == "cuda" else {}
        here = os.environ | visible | {"OMP_NUM_THREADS": str(cores)} | TRACED
        begin, log = time.monotonic(), options.logs / f"{self.name}.txt"
        with log.open("wb") as said:
            command = [sys.executable, *program, *map(str, words)]
            process = subprocess.Popen(command, stdout=said, stderr=said, env=here, start_new_session=True)
            code = ended(process, until, partial(self.tell, options, [0]))
        seconds, events = time.monotonic() - begin, known(out)
        print(f"{self.name}: {self.particles} particles, {self.ranks} ranks: {seconds:.1f} s, exit code {code}", flush=True)
        if code != 0:
            print(log.read_text(errors="replace")[-LAST:], flush=True)
        return events

    def tell(self, options: argparse.Namespace, told: list[int]) -> None:
        """Print the iterations that have ended since; told: of how many that was done."""
        for event in known(options.work / self.name)[told[0] :]:
            print(f"{self.name:5s}{shown(event, options.box)}", flush=True)
            told[0] += 1


def known(out: Path) -> list[Event]:
    """The iterations that a run has ended until now."""
    return list(iterations_of(out)) if (out / "events.jsonl").exists() else []


def ended(process: subprocess.Popen[bytes], until: float, look: Callable[[], None]) -> int | None:
    """The exit code of a process; None of one that is stopped when it is time, with all its ranks. look: is called now and then,
    and when it has ended."""
    try:
        while time.monotonic() < until:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(max(0.0, min(LOOK, until - time.monotonic())))
            look()
        end_all(process, traced=True)
        return None
    finally:
        look()


def seconds_of(event: Event) -> float:
    """Seconds of an iteration."""
    return sum(value for stage, value in event["took"].items() if stage != "total")


def shown(event: Event, box: int) -> str:
    """A line about an iteration: where its time went, megabytes sent and the fewest possible."""
    took, sent, size = event["took"], event.get("communication"), event["current_size"]
    text = (f"  {event['iteration']:3d} order {event['healpix_order']} {size:4d} px {event['resolution']:6.2f} Å "
            f"{seconds_of(event):7.2f} s  accur. {took['accuracy']:.2f} expect. {took['expectation']:.2f} "
            f"maxim. {took['maximization']:.2f}")  # fmt: skip
    if sent:
        ranks, stood = sent["ranks"], sum(sent["seconds_of_ranks"]) / sent["ranks"]
        waited, hidden = (sum(sent[f"{name}_seconds_of_ranks"]) / ranks for name in ("waiting", "hidden"))
        reference = min(REFERENCE_NUMBERS * half_ball(size / 2), box**3)
        least = 2 * NUMBER_BYTES * (VOXEL_NUMBERS * half_ball(size / 2 * PADDING) + reference) * (ranks - 1) / ranks
        text += (f"  sending {stood:.3f} hidden {hidden:.3f} waiting {waited:.3f} s"
                 f"  {max(sent['bytes_of_ranks']) / 1e6:.0f} MB of {least / 1e6:.0f}")  # fmt: skip
        text += f"  computing {', '.join(format(work['seconds'], '.2f') for work in sent['work'])} s"
    return text


def alike(one: Event, other: Event, size: float = 0.0) -> bool:
    """Whether two runs did the same in an iteration; size: by what share the sizes of images may differ."""
    apart = abs(one["current_size"] - other["current_size"])
    return bool(one["healpix_order"] == other["healpix_order"] and apart <= size * one["current_size"])


def compared(found: Mapping[str, tuple[Job, list[Event]]]) -> dict[str, float]:
    """Strong scaling between runs of as many particles, and the fitted model of all iterations that every run did alike."""
    runs = [run for run in found.values() if run[1]]
    figures: dict[str, float] = {}
    together = zip(*(events for _, events in runs), strict=False)
    same = [pair for pair in together if all(alike(pair[0], one, NEARLY) for one in pair)]
    for job, events in runs:
        figures[f"{job.name}, iterations"] = len(events)
        figures[f"{job.name}, iterations s"] = sum(map(seconds_of, events))
        sent = [one for one in events if one.get("communication")]
        if sent:
            stood = sum(sum(one["communication"]["seconds_of_ranks"]) / job.ranks for one in sent)
            figures[f"{job.name}, share of sending, not hidden"] = stood / sum(map(seconds_of, sent))
    most = max(runs, key=lambda run: run[0].ranks)
    for job, events in runs:
        if job is not most[0] and job.particles == most[0].particles:
            pairs = [(a, b) for a, b in zip(events, most[1], strict=False) if alike(a, b)][1:]  # the first also begins things
            title = f"{job.ranks} to {most[0].ranks} ranks, efficiency, {len(pairs)} iterations"
            for name, took in (("all", seconds_of), ("expectation", lambda event: event["took"]["expectation"])):
                few, many = (sum(map(took, side)) for side in zip(*pairs)) if pairs else (0.0, 1.0)
                figures[f"{title}, {name}"] = job.ranks * few / (most[0].ranks * many)
    if len(runs) < 2:
        return figures
    points = [(job.particles, job.ranks, sum(seconds_of(pair[at]) for pair in same[1:])) for at, (job, _) in enumerate(runs)]
    print(f"iterations alike in all runs: {[one[0]['iteration'] for one in same]}, points {points}", flush=True)
    return figures | (scaling_model.figures(f"{len(same) - 1} iterations", points) if len(same) > 1 else {})


def sets(options: argparse.Namespace) -> tuple[Path, Path]:
    """(particles.star of all, of the first ones of a small set that has warmed the cache)."""
    model, words = options.model, ["--snr", "0.05", "--cs", "2.0", "--float16", "--method", "slices", "--seed", "1"]
    if model != "demo":
        model = str(options.work / "eight.npz")
        write_eight(Path(options.model), Path(model))

    def made(name: str, n: int, parts: int = 1) -> Path:
        return simulated(options.work / name, model, n, options.box, options.pixel, [*words, "--device", options.device], parts)

    def warmed() -> Path:
        folder = made("few", options.warm)
        gpus = range(1, options.ranks) if options.ranks > 2 else range(options.ranks)
        Job("warm", folder / "particles.star", gpus, options.warm).done(options, time.monotonic() + options.warming)
        return folder

    with ThreadPoolExecutor(2) as pool:
        few, whole = pool.submit(warmed), pool.submit(made, "whole", options.particles, options.ranks)
        return whole.result() / "particles.star", few.result() / "particles.star"


def thinned(star: Path, every: int) -> tuple[Path, int]:
    """A STAR file of every so-manieth particle beside another one, and how many they are."""
    table = ParticleTable.read(star).select(slice(0, None, every))
    path = star.with_name(f"every_{every}.star")
    table.write(path, overwrite=True)
    return path, len(table)


def main(words: Sequence[str] | None = None) -> None:
    """Simulate, refine, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    sizes = {"ranks": 4, "particles": 105_247, "box": 360, "pixel": 1.34, "diameter": 320.0, "warm": 2000, "warming": 60.0,
             "seconds": 240.0, "kept": 45.0, "max_iterations": 60}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--everything", action="store_true", help="one rank has all particles, too")
    parser.add_argument("--device", default="cuda")
    for name in ("work", "logs", "out"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args(words)
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as scratch:
        options.work = options.work or Path(scratch)
        options.logs = options.logs or options.work
        for folder in (options.work, options.logs):
            folder.mkdir(parents=True, exist_ok=True)
        whole, _ = sets(options)
        print(f"simulated and warmed, {until - time.monotonic():.0f} s are left", flush=True)
        every, half = options.ranks, options.ranks // 2
        jobs = [Job("all", whole, range(options.ranks), options.particles), Job("half", whole, range(half), options.particles)]
        if options.everything:
            jobs.append(Job("one", whole, [options.ranks - 1], options.particles))
        else:
            jobs.append(Job("weak", *with_gpus(thinned(whole, every), [half])))
            if every > 2:
                jobs.append(Job("one", *with_gpus(thinned(whole, 2), [options.ranks - 1])))
        found = {"all": (jobs[0], jobs[0].done(options, until - options.kept))}
        publish(compared(found), options.out)  # kept, should there be no time for the others
        if (options.work / "all" / "run_class001.mrc").exists():
            fsc = mean_fsc(options.work / "all" / "run_class001.mrc", whole.parent / "truth.mrc")
            print(f"mean FSC with the truth {fsc:.3f}", flush=True)
        with ThreadPoolExecutor(3) as pool:
            rest = [(job, pool.submit(job.done, options, until)) for job in jobs[1:]]
            for job, one in rest:
                found[job.name] = job, one.result()
        publish(compared(found), options.out)


def with_gpus(star: tuple[Path, int], gpus: list[int]) -> tuple[Path, list[int], int]:
    """The last words of a job."""
    return star[0], gpus, star[1]


if __name__ == "__main__":
    main()
