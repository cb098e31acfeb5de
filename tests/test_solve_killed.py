"""verglas solve, killed without warning in every one of its stages: it goes on where it was and ends with the same result."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verglas.cli.main import main

pytestmark = pytest.mark.slow

STAGES = ("1_classify2d", "3_abinitio", "4_symmetry", "5_classify3d", "6_refine", "7_postprocess", "8_localres")
OPTIONS = ("--diameter", "150", "--classes2d", "4", "--classes3d", "2", "--device", "cpu")


def started(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "verglas", "solve", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_in(stage: Path, process: subprocess.Popen[bytes], after: float) -> bool:
    """Kill the process so many seconds after the folder of a stage was there; whether it was still in that stage."""
    while not stage.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {stage.name}"
        time.sleep(0.01)
    time.sleep(after)
    process.kill()
    process.wait()
    return not (stage / "result.json").exists()


def result_of(out: Path) -> dict[str, bytes]:
    """The final maps and the decisions; the figures of the resolution."""
    names = ("6_refine/run_class001.mrc", "6_refine/run_half1_class001_unfil.mrc", "7_postprocess/map.mrc", "decisions.json")
    found = {name: (out / name).read_bytes() for name in names}
    figures = json.loads((out / "result.json").read_text())["figures"]
    return found | {"figures": json.dumps(figures, sort_keys=True).encode()}


def test_solve_killed_in_every_stage(tmp_path: Path) -> None:
    simulate = ["--n", "160", "--box", "24", "--pixel", "8", "--snr", "1", "--seed", "1", "--device", "cpu", "--model", "demo"]
    assert main(["simulate", *simulate, "--out", str(tmp_path / "set")]) == 0
    given = ("--particles", "set/particles.star", *OPTIONS)
    assert started(tmp_path, *given, "--out", "whole").wait() == 0
    draw, killed = random.Random(7), []
    process = started(tmp_path, *given, "--out", "killed")
    for name in STAGES:
        took = json.loads((tmp_path / "whole" / name / "result.json").read_text())["seconds"]
        inside = killed_in(tmp_path / "killed" / name, process, draw.uniform(0, 0.3 * took))
        killed += [name] if inside else []
        made = {stage: (tmp_path / "killed" / stage / "result.json") for stage in STAGES[: STAGES.index(name)]}
        before = {stage: path.stat().st_mtime_ns for stage, path in made.items()}
        process = started(tmp_path, "--continue", "killed", "--device", "cpu")
        if name == STAGES[-1]:
            assert process.wait() == 0
        assert {stage: path.stat().st_mtime_ns for stage, path in made.items()} == before  # nothing was made twice
    assert len(killed) >= 3  # at least the long ones; others may be over sooner than it takes to kill them
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
