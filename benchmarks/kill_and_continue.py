"""`verglas refine` killed with SIGKILL at random moments and continued, beside runs that nobody disturbed.

    python -m benchmarks.kill_and_continue [--kills 20] [--device cpu|cuda] [--seed 0]
        [--particles STAR --reference MRC --sym S --diameter D] [--keep DIR]

Two undisturbed runs of one seed come first; every file of theirs is compared. Then runs are killed until `--kills` kills
have met a living process. A run is killed at most twice: first at a moment drawn from the whole time of an undisturbed run
(process start and last iteration included), then, continued, at one drawn from the time that it still needs; the second kill
of every other run is aimed: it waits, from its moment on, for a temporary file of a certain kind (AIMS, in turn), so that it
falls into the writing of that file.
After each kill every file must be whole; at the end the maps are compared with those of the first undisturbed run.

On a CPU all must be the same, bit by bit: anything else is an error. On a GPU the order of sums is not fixed: printed is how far
apart the maps are, beside the distance of the two undisturbed runs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.run_folders import differences, faults, leftovers, same_voxels
from verglas.cli.refine_watch import read_history
from verglas.core.shells import fsc
from verglas.io.mrc import read_map

MAPS = ("run_class001.mrc", "run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc")
LONGEST = 1800.0  # s of one run
KILLS_PER_RUN = 2
SIMULATED = {"n": 160, "box": 32, "pixel": 5, "snr": 1, "sym": "D2", "seed": 1}
SIMULATED_DIAMETER, SIMULATED_OPTIONS = 140, ["--offset-range", "3"]
TEMPORARY = (".part.", ".partial-")
AIMS = ("unfil", "checkpoint", "_data", "class001", "report", "optimiser", "result")


@dataclass(frozen=True)
class Case:
    """How runs are started: options without --out; each run has a working folder of its own below `folder`."""

    words: list[str]
    folder: Path
    device: str
    threads: int

    def start(self, name: str, resumed: bool) -> subprocess.Popen[bytes]:
        """The process of the run `name`: a new one, or --continue."""
        (self.folder / name).mkdir(exist_ok=True)
        words = ["--continue", "out"] if resumed else [*self.words, "--out", "out"]
        words += ["--device", self.device, "--threads", str(self.threads)]
        threads = {f"{library}_NUM_THREADS": str(self.threads) for library in ("OMP", "MKL", "NUMBA")}
        with open(self.folder / name / "terminal.txt", "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "verglas", "refine", *words], cwd=self.folder / name, env=os.environ | threads,
                stdout=output, stderr=output,
            )  # fmt: skip

    def finish(self, name: str, resumed: bool = False) -> float:
        """Run to the end; seconds. SystemExit with the last words of a run that fails."""
        begin = time.monotonic()
        if self.start(name, resumed).wait(LONGEST):
            said = (self.folder / name / "terminal.txt").read_text(errors="replace")[-2000:]
            raise SystemExit(f"run {name}{' (continued)' if resumed else ''} failed:\n{said}")
        return time.monotonic() - begin

    def out(self, name: str) -> Path:
        return self.folder / name / "out"


@dataclass
class Kill:
    """One kill that met a living process. continued: of a process that was itself going on after a kill."""

    run: str
    seconds: float
    continued: bool
    during: str
    faults: list[str]

    def text(self) -> str:
        state = "; ".join(self.faults) or "all files whole"
        return f"  {self.run:8s} {'continued' if self.continued else 'new':9s} {self.seconds:7.2f} s  {self.during:42s} {state}"


@dataclass
class Found:
    """What all kills showed."""

    kills: list[Kill] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [f"{kill.run}, killed at {kill.seconds:.2f} s: {fault}" for kill in self.kills for fault in kill.faults]


def temporary_files(folder: Path, kind: str = "") -> list[str]:
    """Names of files that are being written; kind: what must be in them."""
    with suppress(FileNotFoundError):
        names = [name for name in os.listdir(folder) if name.startswith(".") and kind in name]
        return [name for name in names if any(part in name for part in TEMPORARY)]
    return []


def during(out: Path) -> str:
    """What a killed run was doing, from what it left."""
    if not out.exists():
        return "start of the process"
    history = read_history(out / "events.jsonl", 10**6)
    writing = [name.lstrip(".").split(".")[0] for name in temporary_files(out)]
    if (out / "result.json").exists():
        return "end of the process"
    stage = f"iteration {history[-1]['iteration'] + 1}" if history else "reading or iteration 1"
    if history and (history[-1]["final"] or history[-1]["iterations_left"] == 1):
        stage = "after the final iteration" if history[-1]["final"] else f"{stage}, final"
    return stage + (f", writing {', '.join(writing)}" if writing else "")


def kill_once(case: Case, name: str, after: float, resumed: bool, aim: str | None) -> Kill | None:
    """Start or continue a run and kill it `after` seconds (aim: when it next writes such a file). None if it was quicker."""
    out, begin = case.out(name), time.monotonic()
    process = case.start(name, resumed)
    with suppress(subprocess.TimeoutExpired):
        process.wait(after)
    while aim is not None and process.poll() is None and not temporary_files(out, aim):
        time.sleep(0.0002)
    seconds = time.monotonic() - begin
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        raise SystemExit(f"run {name} failed by itself, see {case.folder / name / 'terminal.txt'}")
    return Kill(name, seconds, resumed, during(out), faults(out) if out.exists() else [])


def disturb(case: Case, wanted: int, whole: float, draw: random.Random) -> Iterator[Found]:
    """Runs killed and continued until `wanted` kills have been made; yields after each run. whole: s of an undisturbed one."""
    found = Found()
    runs = -(-wanted // KILLS_PER_RUN)
    shares = [(i + draw.random()) / runs for i in range(runs)]  # first moments cover the whole time evenly
    draw.shuffle(shares)
    while len(found.kills) < wanted:
        name = f"killed{len(found.runs) + 1:02d}"
        share = shares.pop() if shares else draw.random()
        left = whole
        for number in range(min(KILLS_PER_RUN, wanted - len(found.kills))):
            after = share * whole if number == 0 else draw.random() * left
            aim = AIMS[len(found.runs) // 2 % len(AIMS)] if number == 1 and len(found.runs) % 2 == 1 else None
            kill = kill_once(case, name, after, case.out(name).exists(), aim)
            if kill is None:
                break
            found.kills.append(kill)
            if (case.out(name) / "result.json").exists():  # killed on its way out: nothing is left to be continued
                break
            left -= min(after, left * 0.9)  # what a continued run needs, about: its start costs as much as it redoes
        if not (case.out(name) / "result.json").exists():
            case.finish(name, resumed=case.out(name).exists())
        found.runs.append(name)
        yield found


def distance(first: Path, second: Path) -> tuple[float, float]:
    """(largest difference in units of the map's standard deviation, smallest mean FSC) over the three maps."""
    largest, lowest = 0.0, 1.0
    for name in MAPS:
        a, b = (torch.from_numpy(read_map(folder / name).data_ZYX.astype(np.float64)) for folder in (first, second))
        largest = max(largest, float((a - b).abs().max() / a.std()))
        lowest = min(lowest, float(fsc(a, b)[1:].mean()))
    return largest, lowest


def text_of(first: Path, second: Path) -> str:
    """How far apart two runs are, in one line."""
    largest, lowest = distance(first, second)
    return f"largest difference {largest:.3g} standard deviations, mean FSC {lowest:.6f}"


def not_the_same(first: Path, second: Path) -> list[str]:
    """Which of the results differ in any bit (headers of maps aside)."""
    wrong = [name for name in MAPS if not same_voxels(first / name, second / name)]
    texts = [(folder / "run_data.star").read_bytes() for folder in (first, second)]
    return wrong + (["run_data.star"] if texts[0] != texts[1] else [])


def compare_undisturbed(case: Case) -> list[str]:
    """Print in what two runs of one seed differ; for the CPU, what should not."""
    first, second = case.out("whole1"), case.out("whole2")
    found = differences(first, second)
    n_files = len(list(first.iterdir()))
    print(f"two undisturbed runs of one seed: {n_files - len(found)} of {n_files} files identical; {text_of(first, second)}")
    wrong = []
    for name, lines in found.items():
        print(f"  {name}: {'; '.join(lines[:3]) or 'dates, times and memory only'}")
        wrong += [f"two undisturbed runs differ in {name}: {line}" for line in lines]
    return wrong if case.device == "cpu" else []


def check_end(case: Case, name: str) -> list[str]:
    """Print how the continued run ended beside the undisturbed one; what is wrong with it."""
    whole, out = case.out("whole1"), case.out(name)
    differing = not_the_same(whole, out)
    missing = sorted({path.name for path in whole.iterdir()} ^ {path.name for path in out.iterdir()})
    wrong = [f"{name}: {fault}" for fault in faults(out)] + [f"{name}: left behind {file}" for file in leftovers(out)]
    if case.device == "cpu":
        wrong += [f"{name}: {file} is not the same" for file in differing] + [f"{name}: file set: {file}" for file in missing]
    print(f"  {name}: {'identical' if not differing else text_of(whole, out)}")
    return wrong


def words_of(options: argparse.Namespace, folder: Path) -> list[str]:
    """The options of the refinement; without --particles a small set is simulated."""
    if options.particles is not None:
        paths = ["--particles", str(options.particles.absolute()), "--reference", str(options.reference.absolute())]
        return [*paths, "--sym", options.sym, "--diameter", str(options.diameter), "--seed", "1"]
    settings = [word for name, value in SIMULATED.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "verglas", "simulate", *settings, "--device", "cpu", "--out", str(folder / "set")]
    subprocess.run(command, check=True, capture_output=True)
    paths = ["--particles", str(folder / "set/particles.star"), "--reference", str(folder / "set/start.mrc")]
    return [*paths, "--sym", str(SIMULATED["sym"]), "--diameter", str(SIMULATED_DIAMETER), "--seed", "1", *SIMULATED_OPTIONS]


def run(options: argparse.Namespace, folder: Path) -> int:
    """Number of things that are wrong; all is printed."""
    case = Case(words_of(options, folder), folder, options.device, options.threads)
    seconds = [case.finish(name) for name in ("whole1", "whole2")]
    history = read_history(case.out("whole1") / "events.jsonl", 10**6)
    print(f"undisturbed: {len(history)} iterations, {history[-1]['resolution']:.3g} Å, {seconds[0]:.1f} and {seconds[1]:.1f} s")
    wrong = compare_undisturbed(case)
    print(
        f"{options.kills} kills (SIGKILL), seed {options.seed}; each run, continued to its end, beside the first undisturbed one:"
    )
    shown = 0
    for found in disturb(case, options.kills, min(seconds), random.Random(options.seed)):
        for kill in found.kills[shown:]:
            print(kill.text())
        shown = len(found.kills)
        wrong += check_end(case, found.runs[-1])
        sys.stdout.flush()
    wrong += found.faults
    print(f"{len(found.kills)} kills, {len(found.runs)} runs: {len(wrong)} faults")
    for line in wrong:
        print(f"  {line}")
    return len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--sym", default="C1")
    parser.add_argument("--diameter", type=float)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep the runs in this new folder")
    options = parser.parse_args()
    if options.particles is not None and (options.reference is None or options.diameter is None):
        parser.error("--particles needs --reference and --diameter")
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        raise SystemExit(bool(run(options, options.keep.absolute())))
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(bool(run(options, Path(folder))))


if __name__ == "__main__":
    main()
