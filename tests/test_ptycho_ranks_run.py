"""`verglas ptycho reconstruct` in several processes: its files, and a run that loses one of them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from test_ranks_commands import together
from test_ranks_killed import SOON, Started
from verglas.cli.main import main
from verglas.distributed.beat import LOST
from verglas.ptychography.files_result import read_result

PASSES = "60"
FIT = ["--passes", PASSES, "--checkpoint-every", "2", "--double", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan ('star'), and its reconstruction by one process ('one')."""
    folder = tmp_path_factory.mktemp("ptycho")
    words = ["ptycho", "simulate", "--window", "32", "--positions", "60", "--photons", "1e6", "--spokes", "8", "--with-probe"]
    assert main([*words, "--out", str(folder / "star")]) == 0
    assert main(command(folder, folder / "one")) == 0
    return folder


def command(folder: Path, out: Path) -> list[str]:
    return ["ptycho", "reconstruct", "--scan", str(folder / "star" / "scan.cxi"), "--out", str(out), *FIT]


def check_same(folder: Path, out: Path) -> None:
    one, other = (read_result(path / "result.cxi")[0] for path in (folder / "one", out))
    assert np.allclose(one.error_P, other.error_P, rtol=1e-4)
    for name in ("object_OLYX", "probe_MYX"):
        first, second = getattr(one, name), getattr(other, name)
        assert float((first - second).abs().max()) < 1e-4 * float(first.abs().max())


def test_two_processes_write_what_one_writes(star: Path, tmp_path: Path) -> None:
    done = together(command(star, tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.count("ptycho reconstruct: done in") == 1 and "2 processes share the work" in done.stderr
    check_same(star, tmp_path / "two")
    assert {path.name for path in (star / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    events = [json.loads(line) for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    sent = [event for event in events if event["event"] == "communication"]
    assert sent and all(one["ranks"] == 2 and min(one["bytes_of_ranks"]) > 0 for one in sent)


def wait_for_checkpoint(out: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not any(out.glob("all_pass*.checkpoint")):
        assert process.poll() is None and time.monotonic() < until, "ended before it could be killed"
        time.sleep(0.01)


def test_a_run_that_lost_a_process_goes_on(star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = Started(2, ["-m", "verglas", *command(star, out)], tmp_path / "said")
    wait_for_checkpoint(out, started.processes[0])
    started.processes[1].kill()
    assert started.codes(SOON, without=1) == [LOST], started.said
    assert "error: Rank 1 " in started.said[0] and "verglas ptycho reconstruct --continue" in started.said[0]
    assert main([*command(star, out), "--elastic"]) == 0  # the same command again, as who starts lost runs again gives it
    assert "going on after pass" in (out / "run.log").read_text()
    check_same(star, out)
