"""verglas solve by several processes: the lead decides, all share the long commands; it may go on with another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from verglas.cli.main import main
from verglas.io.mrc import Stack, read_map

FINAL = ("6_refine/run_class001.mrc", "7_postprocess/map.mrc", "8_localres/localres.mrc")
OPTIONS = ("--diameter", "150", "--classes2d", "2", "--classes3d", "1", "--device", "cpu")


def started(folder: Path, ranks: int, *words: object) -> subprocess.Popen[str]:
    """verglas solve in as many processes; what they say goes to the file said.txt."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with open(folder / "said.txt", "w") as said:
        command = [*torchrun, "-m", "verglas", "solve", *map(str, words)]
        return subprocess.Popen(command, cwd=folder, stderr=said, env=environment, text=True)


def simulated(folder: Path, snr: str) -> Path:
    words = ["simulate", "--n", "120", "--box", "24", "--pixel", "8", "--snr", snr, "--seed", "1", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--out", str(folder)]) == 0
    return folder / "particles.star"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process; its particles lie beside it."""
    folder = tmp_path_factory.mktemp("solve")
    particles = simulated(folder / "set", "1")
    assert main(["solve", "--particles", str(particles), *OPTIONS, "--out", str(folder / "whole")]) == 0
    return folder / "whole"


def assert_same(one: Path, other: Path) -> None:
    """The same decisions, figures and maps."""
    assert (one / "decisions.json").read_text() == (other / "decisions.json").read_text()
    figures = [json.loads((out / "result.json").read_text())["figures"] for out in (one, other)]
    assert figures[0] == figures[1]
    for name in FINAL:
        maps = [read_map(out / name).data_ZYX for out in (one, other)]
        assert np.abs(maps[0] - maps[1]).max() < 1e-3 * maps[0].std()


def test_two_processes_go_on_with_what_one_began(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")  # with the times of its files
    for name in ("6_refine", "7_postprocess", "8_localres"):
        shutil.rmtree(tmp_path / "out" / name)
    assert started(tmp_path, 2, "--continue", "out", "--device", "cpu").wait() == 0
    said = (tmp_path / "said.txt").read_text()
    assert "3_abinitio: its results are there" in said and "2 processes share the work" in said
    assert [said.count(f"{name}: done") for name in ("refine", "postprocess", "localres", "solve")] == [1, 1, 1, 1]
    assert_same(whole, tmp_path / "out")


def test_noise_becomes_no_map_and_is_told_once(tmp_path: Path) -> None:
    simulated(tmp_path / "set", "1e-6")
    assert started(tmp_path, 2, "--particles", "set/particles.star", *OPTIONS, "--out", "out").wait() != 0
    said = (tmp_path / "said.txt").read_text()
    assert said.count("No map.") == 1 and "crash" not in said and "exitcode  : 2 " in said
    assert "No map" in (tmp_path / "out" / "report.html").read_text()


def averages(out: Path, iteration: int) -> np.ndarray:
    """2-D class averages [C, Y, X] after an iteration of a run's first stage."""
    stack = Stack.open(out / "1_classify2d" / f"run_it{iteration:03d}_classes.mrcs")
    return stack.read(slice(0, len(stack)))


def stages(out: Path) -> list[str]:
    """Stages in which something was decided, in order."""
    return [one["stage"] for one in json.loads((out / "decisions.json").read_text())["decisions"]]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_more_processes(whole: Path, tmp_path: Path) -> None:
    """What three processes make of a killed run is what one makes of it.

    A run of two processes from the start need not have the results of `whole`: sums in another order differ by 1e-6 at first,
    25 iterations of two 2-D classes with so few particles make 5e-3 of that, and one particle is as near as that to the limit
    from which particles are kept. So these two are compared while they differ by rounding, and then by what they go through.
    """
    particles, out = whole.parent / "set" / "particles.star", tmp_path / "out"
    process = started(tmp_path, 2, "--particles", particles, *OPTIONS, "--out", "out")
    while not (out / "6_refine" / "run_it002_data.star").exists():
        assert process.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun ends its processes
    assert process.wait() != 0
    assert not (out / "6_refine" / "result.json").exists()
    early = [averages(one, 5) for one in (whole, out)]
    assert np.abs(early[0] - early[1]).max() < 1e-4 * early[0].std()

    shutil.copytree(out, tmp_path / "killed")  # with the times of its files
    for processes in (1, 3):  # in the same place: stages know their particles by path
        if processes == 3:
            out.rename(tmp_path / "one")
            (tmp_path / "killed").rename(out)
        assert started(tmp_path, processes, "--continue", "out", "--device", "cpu").wait() == 0
        assert "going on after iteration" in (tmp_path / "said.txt").read_text()
    assert_same(tmp_path / "one", out)
    assert stages(out) == stages(whole)
