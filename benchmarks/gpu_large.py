"""EMPIAR-10028's size on a GPU: 105,247 x 360 px of 1.34 Å with its real defoci, float16 (27 GB), of eight copies of 5A1A.

    python -m benchmarks.gpu_large all --model 5a1a_D2.npz --defocus defocus_u_v_angle_105247.npy --work DIR [--out FIGURES.json]

--job refine: auto-refinement to convergence; --job classify: 3-D classification, K=6, 25 iterations, order 2; --gpus: how many
share it. `all` is simulate, start, wait, leaving out what is done already: where a call may last a few minutes only, repeat it
with --seconds. Single steps:
    simulate    make the set, unless DIR holds it
    start       drop the page cache and begin the job (or go on: --continue) in a process that outlives this one
    wait        follow it for --seconds; the figures once it has ended. Wall times of all attempts are summed
    kinds       instead of a refinement: one pass through the samplings, two iterations on each, and the sum with usual counts
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.eight_copies import write_eight
from benchmarks.figures import publish
from benchmarks.gpu_busy import utilisation
from benchmarks.iteration_kinds import process_age, summed
from benchmarks.refinement_run import Run, events, iterations_of, mean_fsc
from benchmarks.simulated import simulated
from verglas.refinement.config import RefineConfig

PARTICLES, BOX, PIXEL, DIAMETER = 105_247, 360, 1.34, 320.0  # px, Å, Å


COMMANDS = {
    "refine": ("refine", "--initial-resolution", "40"),
    "classify": ("classify3d", "--classes", "6", "--iterations", "25", "--healpix-order", "2", "--initial-resolution", "60"),
}


@dataclass
class Attempt:
    """One process of the refinement, from its first to its last moment. busy: seconds in which the GPU computed (NVML), of `span`
    seconds between the first batch and the last map; caches: how the page cache was dropped."""

    seconds: float
    code: int
    caches: str
    busy: float = 0.0
    span: float = 0.0


def simulate(options: argparse.Namespace) -> Path:
    """The folder of the set."""
    model = options.work / "eight.npz"
    options.work.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        print(f"complex of {write_eight(options.model, model):.0f} Å")
    defocus = options.work / "defocus.npy"
    np.save(defocus, np.load(options.defocus)[: options.particles])
    words = ["--snr", "0.05", "--cs", "2.0", "--defocus-file", str(defocus), "--float16", "--method", "slices",
             "--seed", "1", "--device", options.device]  # fmt: skip
    return simulated(options.work / "large", str(model), options.particles, BOX, PIXEL, words)


def drop_caches(folder: Path) -> str:
    """Have the next reading of the stacks in `folder` come from the disk; says how that was done."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "page cache dropped"
    except OSError as error:
        for stack in folder.glob("*.mrcs"):
            with stack.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return f"stacks dropped from the page cache one by one ({error.strerror} for all of it)"


def folder_of(options: argparse.Namespace) -> Path:
    """What the job writes."""
    return Path(options.work) / str(options.job)


def start(options: argparse.Namespace) -> None:
    """Begin, or go on, in a process of its own session, unless it runs or has ended; it notes its attempt in JOB.attempts."""
    out = folder_of(options)
    if running(out) or (out / "result.json").exists():
        return
    note_killed(out)
    words = [sys.executable, "-m", "benchmarks.gpu_large", "attempt", "--work", str(options.work), "--job", options.job,
             "--device", options.device, "--gpus", str(options.gpus)]  # fmt: skip
    with out.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    out.with_suffix(".pid").write_text(str(process.pid))


def attempt(options: argparse.Namespace) -> None:
    """One process of verglas, timed and watched from outside."""
    data, out = options.work / "large", folder_of(options)
    caches = drop_caches(data)
    for sign in (".begun", ".alive"):
        out.with_suffix(sign).touch()
    words = ["--continue", str(out)]
    if not out.exists():
        words = [*COMMANDS[options.job][1:], "--particles", str(data / "particles.star"), "--reference", str(data / "start.mrc"),
                 "--out", str(out), "--diameter", f"{DIAMETER:g}"]  # fmt: skip
    if options.gpus > 1:
        words += ["--gpus", str(options.gpus)]
    with utilisation() as watch:
        begun, begin = time.time(), time.perf_counter()
        command = [sys.executable, "-m", "verglas", COMMANDS[options.job][0], *words, "--device", options.device]
        code = followed(subprocess.Popen(command), out.with_suffix(".alive"))
        made = Attempt(time.perf_counter() - begin, code, caches)
    here = iterations_of(out)
    if here and watch is not None and "--continue" not in words:  # the clock of a run that goes on began with its first attempt
        first, last = Run(out, made.seconds, begun, here).computing_span()
        made.span = last - first
        made.busy = made.span * watch.share(begun + first, begun + last)
    note(out, made)
    out.with_suffix(".begun").unlink()


def followed(process: subprocess.Popen[bytes], sign: Path) -> int:
    """Wait for a process, touching `sign` every second while it runs; its exit code."""
    while True:
        sign.touch()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)


def note(out: Path, made: Attempt) -> None:
    """Add to the attempts of the job that writes `out`."""
    with out.with_suffix(".attempts").open("a") as file:
        file.write(json.dumps(asdict(made)) + "\n")


def note_killed(out: Path) -> None:
    """Count an attempt that was killed before it could note itself: until its last sign of life."""
    begun, alive = out.with_suffix(".begun"), out.with_suffix(".alive")
    if begun.exists():
        note(out, Attempt(alive.stat().st_mtime - begun.stat().st_mtime + 1.0, -1, "killed"))
        begun.unlink()


def attempts(out: Path) -> list[Attempt]:
    """Attempts that have ended, of the job that writes `out`."""
    path = out.with_suffix(".attempts")
    return [Attempt(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def running(out: Path) -> bool:
    """Whether the process of the last `start` is there and not a zombie."""
    note = out.with_suffix(".pid")
    status = Path("/proc") / (note.read_text().strip() if note.exists() else "none") / "stat"
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait(options: argparse.Namespace) -> dict[str, float] | None:
    """Follow the job until it ends or the time is over; its figures, None while it goes on. SystemExit if it failed."""
    begin, told, out = time.monotonic(), 0, folder_of(options)
    while running(out) and time.monotonic() - begin < options.seconds:
        time.sleep(1.0)
        told = tell(out, told)
    if running(out):
        return None
    tell(out, told)
    made = attempts(out)
    if not (out / "result.json").exists():
        log = out.with_suffix(".log").read_text(errors="replace")
        raise SystemExit(f"after {len(made)} attempts the job has not ended:\n{log[-3000:]}\n`start` would go on with it")
    print("; ".join(one.caches for one in made))
    run = Run(out, sum(one.seconds for one in made), 0.0, iterations_of(out))
    found = {"whole s": run.seconds, "attempts": len(made), "iterations": len(run.iterations), **run.stages()}
    if options.job == "refine":
        found["mean FSC"] = mean_fsc(out / "run_class001.mrc", options.work / "large" / "truth.mrc")
    if len(made) == 1 and made[0].span:
        found["busy share"] = made[0].busy / made[0].span
    return found


def tell(folder: Path, told: int) -> int:
    """Print the iterations from number `told` on; how many there are."""
    if not (folder / "events.jsonl").exists():
        return told
    done = [one for one in events(folder) if one["event"] == "iteration"]
    for one in done[told:]:
        print(f"{one['seconds']:7.1f} s: iteration {one['iteration']}, order {one['healpix_order']}, size {one['current_size']} "
              f"px, significant {one['significant']:.1f}, {one['resolution']:.2f} Å, took {one['took']}", flush=True)  # fmt: skip
    return len(done)


def parsed() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["all", "simulate", "start", "attempt", "wait", "kinds"])
    parser.add_argument("--job", choices=list(COMMANDS), default="refine")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--defocus", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=PARTICLES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="`wait`: at most so long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options, age = parsed(), process_age()
    if options.step in ("all", "simulate", "kinds"):
        simulate(options)
    if options.step in ("all", "start"):
        start(options)
    if options.step == "attempt":
        attempt(options)
    if options.step == "kinds":
        print(drop_caches(options.work / "large"))
        config = RefineConfig(diameter=DIAMETER, initial_resolution=40.0)
        publish(summed(options.work / "large", config, torch.device(options.device), age), options.out)
    if options.step in ("all", "wait"):
        found = wait(options)
        if found is None:
            print("still running: `wait` again")
        else:
            publish(found, options.out)


if __name__ == "__main__":
    main()
