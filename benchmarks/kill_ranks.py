"""A rank of `verglas refine` killed with SIGKILL at random moments; the run is then continued on one rank less, or on as many.

    python -m benchmarks.kill_ranks [--ranks 2] [--kills 10] [--device cuda|cpu] [--together 5] [--seed 0]
        [--particles STAR --reference MRC --diameter D] [--keep DIR]

Moments are drawn from the time until the ranks of an undisturbed run had met, for one of four kills; for the others some time
after any of its iterations has ended, the last one included. `--together` runs share the device, and what is found is printed as
they end. Of each kill is printed whether all other processes ended, how soon, with which exit code and message, and how far the
map that came out in the end is from the first undisturbed one: root mean square of the difference over that of the map, and the
largest 1 - FSC up to its resolution. Those of a second undisturbed run are the measure: sums of GPUs, and of another number of
ranks, are added in another order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verglas.core.shells import fsc
from verglas.io.mrc import read_map

MAP = "run_class001.mrc"
SIMULATED = {"box": 64, "pixel": 3, "snr": 0.3, "seed": 1}
SIMULATED_DIAMETER = 150.0
LONGEST, SOON = 600.0, 60.0  # s of a run; until all processes have ended after a kill
LOOK = 0.02  # s between two looks how far a run is
ON_CPU = "import sys; from verglas.cli.launch import run; sys.exit(run(lambda: int(sys.argv[1]), sys.argv[2:], 0))"


@dataclass(frozen=True)
class Case:
    """How runs are started: words of a new one without --out; each writes into a folder of its own below `folder`."""

    words: list[str]
    folder: Path
    device: str
    ranks: int

    def start(self, name: str, ranks: int, resumed: bool = False) -> subprocess.Popen[bytes]:
        """The launcher of the run `name`, new or continued."""
        given = ["--continue", str(self.out(name))] if resumed else [*self.words, "--out", str(self.out(name))]
        words = ["refine", *given, "--device", self.device]
        if self.device == "cuda":
            command = [sys.executable, "-m", "verglas", *words, "--gpus", str(ranks)]
        else:
            command = [sys.executable, "-c", ON_CPU, str(ranks), *words, "--threads", "1"]
        with self.said(name).open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output)

    def finish(self, name: str, ranks: int, resumed: bool = False) -> float:
        """Run to the end; seconds. SystemExit with the last words of a run that fails."""
        begin = time.monotonic()
        if self.start(name, ranks, resumed).wait(LONGEST):
            raise SystemExit(f"run {name} failed:\n{self.said(name).read_text(errors='replace')[-3000:]}")
        return time.monotonic() - begin

    def out(self, name: str) -> Path:
        return self.folder / name

    def said(self, name: str) -> Path:
        return self.folder / f"{name}.txt"


@dataclass(frozen=True)
class Moment:
    """So many seconds after that many iterations have ended; iterations -1: after the start."""

    iterations: int
    seconds: float

    def wait(self, launcher: subprocess.Popen[bytes], out: Path) -> None:
        """Until it has come, or the run is over."""
        events = out / "events.jsonl"
        while launcher.poll() is None and self.iterations >= 0:
            if events.exists() and sum(one["event"] == "iteration" for one in lines_of(events)) >= self.iterations:
                break
            time.sleep(LOOK)
        until = time.monotonic() + self.seconds
        while launcher.poll() is None and time.monotonic() < until:
            time.sleep(min(LOOK, max(0.0, until - time.monotonic())))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's events."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()]


def moments(out: Path, first: float, kills: int, draw: random.Random) -> list[Moment]:
    """So many, from a finished run whose ranks had met after `first` seconds."""
    took = [sum(one["took"].values()) for one in lines_of(out / "events.jsonl") if one["event"] == "iteration"]
    longest = sorted(took)[len(took) // 2]  # the first ones compile kernels
    return [
        Moment(-1, draw.uniform(0, first)) if number % 4 == 0 else Moment(draw.randrange(len(took)), draw.uniform(0, longest))
        for number in range(kills)
    ]  # fmt: skip


def met(out: Path, begun: float) -> float:
    """Seconds from the start of a run (time.time()) until its ranks had met, and the first one opened its folder."""
    return max(0.0, (out / "config.json").stat().st_mtime - begun)


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process of the ranks that a launcher has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != launcher:
                continue
            words = dict(one.split("=", 1) for one in (entry / "environ").read_text(errors="replace").split("\0") if "=" in one)
        except (OSError, IndexError, ValueError):  # no process, or it has ended since
            continue
        if "RANK" in words:
            found[int(words["RANK"])] = int(entry.name)
    return found


def kill_one(case: Case, number: int, at: Moment, victim: int, again: int) -> str:
    """One kill, and the run's end on `again` ranks; a line of the table."""
    name, begin = f"killed{number}", time.monotonic()
    launcher = case.start(name, case.ranks)
    at.wait(launcher, case.out(name))
    while len(processes := ranks_of(launcher.pid)) < case.ranks and launcher.poll() is None:
        time.sleep(0.05)
    if launcher.poll() is not None:
        return f"{number:4d}  it was over after {time.monotonic() - begin:.1f} s"
    moment = time.monotonic()
    os.kill(processes[victim], signal.SIGKILL)
    code = launcher.wait(SOON)
    ended = time.monotonic() - moment
    left = [rank for rank, process in processes.items() if Path(f"/proc/{process}").exists()]
    errors = [line for line in case.said(name).read_text(errors="replace").splitlines() if line.startswith("error: ")]
    named = bool(errors) and f"Rank {victim} " in errors[0]
    begun = (case.out(name) / "config.json").exists()  # else nothing was done that could go on
    seconds = case.finish(name, again, resumed=begun)
    stage = errors[0].partition(" died in ")[2].partition(". ")[0] if errors else "before the ranks had met"
    state = f"exit {code}, {ended:4.1f} s, named {'yes' if named else 'no '}, left over {left or 'none'}"
    apart = "  ".join(f"{one:.1e}" for one in distance(case.out("whole"), case.out(name)))
    where = "start" if at.iterations < 0 else f"{at.iterations} done"
    more = f"{seconds:.1f} s more with {again}"
    return f"{number:4d}  {victim}  {moment - begin:6.1f} s ({where})  {state}  {more}  {apart}  {stage}"


def distance(one: Path, two: Path) -> tuple[float, float]:
    """(rms of the difference of two runs' maps over that of the map, largest 1 - FSC up to the resolution)."""
    first, second = (torch.from_numpy(read_map(path / MAP).data_ZYX.copy()).double() for path in (one, two))
    result = json.loads((one / "result.json").read_text())["figures"]
    shell = int(first.shape[0] * result["pixel_size"]["value"] / result["resolution"]["value"])
    same_S = fsc(first, second)[1 : shell + 1]
    return float((first - second).norm() / first.norm()), float(1 - same_S.min())


def case_of(options: argparse.Namespace, folder: Path) -> Case:
    """The given particles, or simulated ones."""
    limits = ["--max-iterations", str(options.iterations), "--memory", str(options.memory)]
    if options.particles is not None:
        words = ["--particles", options.particles, "--reference", options.reference, "--diameter", str(options.diameter)]
        return Case(words + limits, folder, options.device, options.ranks)
    given = [word for name, value in {"n": options.count, **SIMULATED}.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "verglas", "simulate", *given, "--model", "demo", "--out", str(folder / "set")]
    subprocess.run([*command, "--device", options.device], check=True, capture_output=True)
    words = ["--particles", str(folder / "set/particles.star"), "--reference", str(folder / "set/start.mrc")]
    words += ["--diameter", str(SIMULATED_DIAMETER)]
    return Case(words + limits, folder, options.device, options.ranks)


def main() -> None:
    """Read the options, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"ranks": 2, "kills": 10, "together": 5, "seed": 0, "iterations": 12, "memory": 8.0, "count": 2000}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    for name in ("particles", "reference"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--diameter", type=float, default=SIMULATED_DIAMETER)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        case = case_of(options, folder)
        begun = time.time()
        seconds = case.finish("whole", options.ranks)
        first = met(case.out("whole"), begun)
        print(f"undisturbed run on {options.ranks} ranks: {seconds:.1f} s, met after {first:.1f} s", flush=True)
        with ThreadPoolExecutor(options.together) as several:
            again: Future[Any] = several.submit(case.finish, "again", options.ranks)
            goes_on = max(1, options.ranks - 1), options.ranks  # with, by turns
            drawn = enumerate(moments(case.out("whole"), first, options.kills, draw))
            lines: list[Future[Any]] = [
                several.submit(kill_one, case, number, at, draw.randrange(options.ranks), goes_on[number % 2])
                for number, at in drawn
            ]  # fmt: skip
            print("kill  rank  after  how it ended  ...  rms and 1 - FSC from the undisturbed run  where", flush=True)
            for line in as_completed([again, *lines]):
                if (error := line.exception()) is not None:  # one that failed says nothing of the others
                    print(error, flush=True)
                    continue
                if line is not again:
                    print(line.result(), flush=True)
                    continue
                apart = "  ".join(f"{one:.1e}" for one in distance(case.out("whole"), case.out("again")))
                print(f"two undisturbed runs are apart (rms, 1 - FSC): {apart}", flush=True)


if __name__ == "__main__":
    main()
