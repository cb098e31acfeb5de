"""Ranks that die, hang or fail: all others end by themselves, the first one left says who it was, and the run can go on."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from verglas.cli.main import main
from verglas.core.processes import birth
from verglas.distributed.beat import LOST, NOBODY, SILENCE, Beat, Judge
from verglas.io.mrc import read_map

SOON = 60.0  # s in which all have to end
MAP = "run_class001.mrc"
BEATS = [Beat(rank, f"host{rank}", 100 + rank, "", stage="expectation") for rank in range(3)]

# One rank of three does something to itself while the others wait for it in a collective.
SCRIPT = """
import os, signal, sys, time
import torch
from verglas.cli.main import process
from verglas.cli import main as cli
from verglas.distributed.meeting import joined
from verglas.distributed.place import place_of
from verglas.errors import InputError
place, deed, culprit = place_of(os.environ), sys.argv[1], int(sys.argv[2])
def run(arguments):
    with joined(place, torch.device("cpu")) as ranks:
        ranks.doing("first things")
        ranks.agreed(1, "beginning")
        ranks.doing("testing", part="iteration 7")
        if place.rank == culprit:
            time.sleep(2.8)  # within a second it is told, within another one the others have heard it
            if deed == "hang":
                time.sleep(600)
            if deed == "input":
                raise InputError("particles.star", "nonsense")
            if deed == "crash":
                raise ValueError("a defect")
            os.kill(os.getpid(), getattr(signal, deed))
        ranks.agreed(2, "what all wait for")
    return 0
cli._dispatch = run
sys.exit(process())
"""


def surrounding(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of a process that srun started: nobody ends it when another one fails."""
    return os.environ | {
        "SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": str(size), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


class Started:
    """Processes as srun starts them. said: what each wrote to its terminal."""

    def __init__(self, size: int, words: list[str], folder: Path, patience: float = 300.0) -> None:
        folder.mkdir(exist_ok=True)
        self.files, port = [folder / f"rank{rank}.txt" for rank in range(size)], free_port()
        self.processes = []
        for rank, file in enumerate(self.files):
            surround = surrounding(rank, size, port) | {"VERGLAS_PATIENCE": str(patience)}
            with file.open("w") as out:
                self.processes.append(subprocess.Popen([sys.executable, *words], env=surround, stdout=out, stderr=out))

    def codes(self, seconds: float, without: int | None = None) -> list[int]:
        """Exit codes of all but one, which have to come within so many seconds."""
        until = time.monotonic() + seconds
        try:
            return [one.wait(until - time.monotonic()) for rank, one in enumerate(self.processes) if rank != without]
        finally:
            for one in self.processes:
                one.kill()

    @property
    def said(self) -> list[str]:
        return [file.read_text() for file in self.files]


def judged(change: dict[int, dict[str, object]], seconds: float, judge: Judge, gone: tuple[int, ...] = ()) -> str | None:
    """What rank 0 finds after so many seconds in which all but those in `change` went on beating and getting on."""
    judge.begin(BEATS)
    for second in range(1, int(seconds) + 1):
        going = {"count": second, "done": second}
        beats = [replace(beat, **change.get(beat.rank, going)) for beat in BEATS]  # type: ignore[arg-type]
        end = judge.hear(beats, gone, 1.0)
        if end is not None:
            assert end.code == LOST
            return end.text
    return None


def test_a_dead_a_silent_and_a_hanging_rank_are_told_apart() -> None:
    assert judged({}, 2000, Judge(0)) is None
    dead = judged({}, 1, Judge(0), gone=(2,))
    assert dead is not None and "Rank 2 (host2, process 102) was killed or died in expectation" in dead
    assert judged({2: {"left": True}}, 2000, Judge(0), gone=(2,)) is None  # it has left as it should
    silent = judged({1: {}}, SILENCE + 1, Judge(0))
    assert silent is not None and "Rank 1 (host1, process 101), last heard of in expectation" in silent
    assert judged({1: {}}, SILENCE - 1, Judge(0)) is None


def test_who_holds_the_others_up_is_found() -> None:
    waits = {"count": -1, "number": 5, "name": "sums", "waits": True}

    def held_up(seconds: float, at: int = 4) -> str | None:
        judge = Judge(0, patience=20)
        judge.begin(BEATS)
        for second in range(1, int(seconds) + 1):
            beats = [replace(BEATS[0], **waits | {"count": second}), replace(BEATS[1], **waits | {"count": second}),
                     replace(BEATS[2], count=second, number=4, done=min(second, at))]  # type: ignore[arg-type]  # fmt: skip
            end = judge.hear(beats, [], 1.0)
            if end is not None:
                return end.text
        return None

    text = held_up(26)
    assert text is not None and "Rank 2" in text and "stood still for 20 s in expectation" in text and "collective 5" in text
    assert "Rank 1" not in text
    assert held_up(500, at=500) is None  # slow, but it gets on


def test_a_run_in_which_nothing_moves_ends() -> None:
    judge = Judge(1, patience=20)
    judge.begin(BEATS)
    ends = [judge.hear([replace(beat, count=second) for beat in BEATS], [], 1.0) for second in range(1, int(NOBODY * 20) + 1)]
    assert ends[-2] is None and ends[-1] is not None and "No rank has got on" in ends[-1].text


def test_only_processes_that_can_be_seen_are_looked_for() -> None:
    judge, me = Judge(0), os.getpid()
    here = [Beat(0, "here", me, birth(me)), Beat(1, "here", me, birth(me)), Beat(2, "there", 2**22 + 1, "5")]
    judge.begin(here)
    assert judge.gone() == []
    quiet = [judge.hear([replace(here[0], count=1), here[1], here[2]], [], SILENCE) for _ in range(2)]
    assert quiet[0] is not None and "Rank 2" in quiet[0].text and "Rank 1" not in quiet[0].text  # which is seen to live
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    judge.begin([*here, Beat(3, "here", child.pid, birth(child.pid))])
    child.kill()
    until = time.monotonic() + 5
    while judge.gone() != [3] and time.monotonic() < until:
        time.sleep(0.01)
    assert judge.gone() == [3]  # though nobody has asked for its exit code yet
    child.wait()


@pytest.mark.parametrize(
    ("size", "deed", "culprit", "code", "reason"),
    [
        (2, "SIGKILL", 0, LOST, r"Rank 0 \(.*\) was killed or died in iteration 7, testing"),
        (2, "hang", 1, LOST, r"Rank 1 \(.*\) has stood still for 4 s in iteration 7, testing .*'what all wait for: the lead'"),
        (2, "input", 1, 2, r"Rank 1 \(.*\) ended in iteration 7, testing: particles.star: nonsense"),
        pytest.param(3, "SIGKILL", 1, LOST, r"Rank 1 \(.*\) was killed or died in iteration 7", marks=pytest.mark.slow),
        pytest.param(3, "SIGSTOP", 2, LOST, r"Nothing was heard for 8 s from Rank 2 \(.*\), last heard of in iteration 7",
                     marks=pytest.mark.slow),
        pytest.param(3, "SIGTERM", 2, 143, r"Rank 2 \(.*\) was stopped in iteration 7, testing", marks=pytest.mark.slow),
        pytest.param(3, "crash", 2, 1, r"Rank 2 \(.*\) ended in iteration 7, testing: a defect", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_all_ranks_end_when_one_is_lost(size: int, deed: str, culprit: int, code: int, reason: str, tmp_path: Path) -> None:
    patience = 8.0 if deed == "SIGSTOP" else 4.0  # it has stood still for 3 s before it falls silent
    started = Started(size, ["-c", SCRIPT, deed, str(culprit)], tmp_path, patience)
    codes = started.codes(SOON, without=culprit)
    assert codes == [code] * (size - 1), started.said
    speaker = 1 if culprit == 0 else 0
    assert re.search(f"error: {reason}", started.said[speaker]), started.said
    assert [rank for rank, text in enumerate(started.said) if "error: Rank" in text or "error: Nothing" in text] == [speaker]


def options(folder: Path, out: Path) -> list[str]:
    return ["refine", "--particles", str(folder / "particles.star"), "--reference", str(folder / "start.mrc"),
            "--diameter", "150", "--device", "cpu", "--threads", "1", "--max-iterations", "3", "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set ('set') and its refinement by one process ('whole')."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ["simulate", "--n", "60", "--box", "24", "--pixel", "8", "--snr", "1", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--out", str(folder / "set")]) == 0
    assert main(options(folder / "set", folder / "whole")) == 0
    return folder


def iterations_done(out: Path) -> int:
    """As far as the run would go on."""
    return max((int(path.stem.removeprefix("run_it")) for path in out.glob("run_it*.checkpoint")), default=0)


def wait_for_iteration(out: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 200
    while iterations_done(out) < number:
        assert process.poll() is None and time.monotonic() < until, "ended before it could be killed"
        time.sleep(0.01)


def killed_run(folder: Path, out: Path, size: int, victim: int, after: int, wait: float) -> list[str]:
    """A run of `size` ranks of which one is killed so many seconds after an iteration; what the others said."""
    started = Started(size, ["-m", "verglas", *options(folder / "set", out)], out.with_suffix(".said"))
    wait_for_iteration(out, after, started.processes[0])
    time.sleep(wait)
    started.processes[victim].kill()
    assert started.codes(SOON, without=victim) == [LOST] * (size - 1), started.said
    assert f"error: Rank {victim} " in started.said[1 if victim == 0 else 0], started.said
    assert "verglas refine --continue" in started.said[1 if victim == 0 else 0]
    return started.said


def finish(out: Path, size: int) -> None:
    """Go on with a run, on so many ranks, to its end."""
    words = ["refine", "--continue", str(out), "--device", "cpu", "--threads", "1"]
    if size == 1:
        assert main(words) == 0
    else:
        again = Started(size, ["-m", "verglas", *words], out.with_suffix(".again"))
        assert again.codes(300) == [0] * size, again.said
    assert "going on after iteration" in (out / "run.log").read_text()


def assert_same_map(folder: Path, out: Path) -> None:
    one, two = (read_map(path / MAP).data_ZYX for path in (folder / "whole", out))
    assert np.abs(one - two).max() < 0.02 * one.std()  # sums are added in another order


def test_a_killed_run_goes_on_with_another_number_of_ranks(undisturbed: Path, tmp_path: Path) -> None:
    killed_run(undisturbed, tmp_path / "out", 2, 1, 1, 0.0)
    last = json.loads((tmp_path / "out" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "stopped" and "Rank 1" in last["reason"]
    finish(tmp_path / "out", 1)
    assert_same_map(undisturbed, tmp_path / "out")


@pytest.mark.slow
def test_ten_kills_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    draw = random.Random(5)
    for number in range(10):
        size, out = 2 + number % 2, tmp_path / f"out{number}"
        killed_run(undisturbed, out, size, draw.randrange(size), draw.choice((1, 1, 2)), draw.uniform(0, 0.5))
        finish(out, 1 + number % 3)
        assert_same_map(undisturbed, out)


def kill_lead_when_it_computes(out: Path, launcher: subprocess.Popen[bytes]) -> None:
    wait_for_iteration(out, 1, launcher)
    os.kill(json.loads((out / ".owner.json").read_text())["pid"], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_an_elastic_run_goes_on_by_itself(launcher: str, undisturbed: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "out", "import sys; from verglas.cli.launch import run; sys.exit(run(lambda: 2, sys.argv[1:], 1))"
    words = [*options(undisturbed / "set", out), "--elastic"] if launcher == "own" else options(undisturbed / "set", out)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "verglas"]
    start = ["-c", own] if launcher == "own" else torchrun
    with (tmp_path / "said.txt").open("w") as said:
        running = subprocess.Popen([sys.executable, *start, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=said)
    try:
        kill_lead_when_it_computes(out, running)
        assert running.wait(300) == 0, (tmp_path / "said.txt").read_text()
    finally:
        running.kill()
    assert "going on after iteration" in (out / "run.log").read_text()
    assert_same_map(undisturbed, out)


@pytest.mark.slow
def test_a_run_that_was_lost_ends_with_its_code_if_nobody_is_to_start_it_again(undisturbed: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "out", "import sys; from verglas.cli.launch import run; sys.exit(run(lambda: 2, sys.argv[1:], 0))"
    with (tmp_path / "said.txt").open("w") as said:
        words = [sys.executable, "-c", own, *options(undisturbed / "set", out)]
        running = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=said)
    try:
        kill_lead_when_it_computes(out, running)
        assert running.wait(SOON) == LOST
    finally:
        running.kill()
    assert "error: Rank 0" in (tmp_path / "said.txt").read_text()
