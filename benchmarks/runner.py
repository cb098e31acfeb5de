"""Runs benchmarks as processes of their own, takes medians, and makes records of them."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.process_tree import end_all
from benchmarks.record import ROOT, Record, Source, flat, machine
from benchmarks.registry import Benchmark

PATIENCE = 3.0  # times the expected seconds, after which a benchmark is stopped


class Failed(Exception):
    """A benchmark that left no figures."""


def data_folder() -> Path | None:
    """Folder of real inputs, $VERGLAS_SHARED/data; None where there is none."""
    from verglas.testing import shared_data

    shared = shared_data()
    return shared / "data" if shared else None


def missing(one: Benchmark) -> str | None:
    """Why a benchmark cannot run here, None if it can."""
    data = data_folder()
    if one.files and data is None:
        return "needs real inputs: name their folder with VERGLAS_SHARED"
    for name in one.files:
        if data and not (data / name).exists():
            return f"needs {name} in the folder of real inputs"
    for program in one.programs:
        if shutil.which(program) is None:
            return f"{program} is not installed"
    for package in one.packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if one.device == "gpu":
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA device"
    return None


def run(
    one: Benchmark, source: Source, tests: str, limit: float | None = None, words: Sequence[str] = (), work: Path | None = None
) -> Record:
    """Run a benchmark `one.repeat` times. limit: seconds that it may take in all (default: three times what is expected);
    words: further arguments for its module; work: scratch folder to be kept. Raises Failed if a run leaves no figures."""
    begin = time.perf_counter()
    found: list[Mapping[str, float]] = []
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    limit = limit or PATIENCE * one.seconds * one.repeat
    with tempfile.TemporaryDirectory(prefix="verglas-benchmark-") as scratch:
        command = [sys.executable, "-m", f"benchmarks.{one.module}", *filled(one.words, work or Path(scratch)), *words]
        for _ in range(one.repeat):
            found.append(figures_of(command, Path(scratch) / "figures.json", limit - (time.perf_counter() - begin)))
    from verglas.io.provenance import versions

    shown = ["python", "-m", f"benchmarks.{one.module}", *one.words, *words]
    return Record(
        one.name, source, date, machine(one.device), versions(), tests, shlex.join(shown).replace("'", ""), medians(found),
        found if len(found) > 1 else [], round(time.perf_counter() - begin, 1),
    )  # fmt: skip


def filled(words: Sequence[str], work: Path) -> list[str]:
    """Arguments with {data} and {work} filled in."""
    return [word.format(data=data_folder() or "", work=work) for word in words]


def figures_of(command: Sequence[str], out: Path, limit: float) -> dict[str, float]:
    """Run a command with `--out FILE`; the numbers in that file. What it prints goes to the terminal.

    A command that exits with an error but left figures (as one does that misses its own bar) counts as run.
    """
    out.unlink(missing_ok=True)
    process = subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(timeout=max(limit, 1))
    except BaseException as error:  # the time is over or the user has had enough: its own children end with it
        end_all(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"stopped after {limit:.0f} s") from error
        raise
    if not out.is_file():
        raise Failed(f"ended with exit code {code} and left no figures")
    return dict(flat(json.loads(out.read_text(encoding="utf-8"))))


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median over runs of every figure that any run has."""
    names = dict.fromkeys(name for one in runs for name in one)
    return {name: statistics.median(one[name] for one in runs if name in one) for name in names}
