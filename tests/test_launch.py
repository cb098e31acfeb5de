"""--gpus: processes are started with their places, and end together, whoever ends first. Those of the tests compute nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from verglas.cli import launch
from verglas.core.processes import birth, is_alive
from verglas.distributed.beat import LOST

WAIT = "import time; time.sleep(60)"
STARTED = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid())); "
KILLED = f"import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); {WAIT}"
LAUNCHER = """
import sys
from verglas.cli import launch
launch.PROGRAM = ("-c", sys.argv[1])
sys.exit(launch.run(lambda: 2, sys.argv[2:], 0))
"""
LIGHT = """
import sys
from verglas.cli import launch, main
launch.gpus_there, launch.PROGRAM = lambda: 2, ("-c", "import sys; sys.exit(sys.argv[-2:] != ['--device', 'cuda'])")
code = main.main(["refine", "--particles", "a.star", "--reference", "b.mrc", "--out", "c", "--gpus", "2"])
sys.exit(code or 10 * ("torch" in sys.modules))
"""


def ranks_of(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(launch, "PROGRAM", ("-c", program))


def test_processes_are_told_their_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    ranks_of(monkeypatch, f"import os, sys; print(*(os.environ[name] for name in {names}), file=open(sys.argv[1], 'a'))")
    assert launch.run(lambda: 3, [str(tmp_path / "said")], 0) == 0
    lines = sorted(line.split() for line in (tmp_path / "said").read_text().splitlines())
    port = lines[0][-1]
    assert lines == [[str(rank), str(rank), "3", "3", port] for rank in range(3)] and int(port) > 0


def test_the_first_rank_can_listen_at_the_port_that_is_held() -> None:
    with launch._free_port() as held, socket.socket() as lead, socket.socket() as other:
        port = held.getsockname()[1]
        lead.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        lead.bind(("", port))
        lead.listen()
        with pytest.raises(OSError, match="in use"):
            other.bind(("", port))


def test_all_end_with_the_code_of_the_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_of(monkeypatch, f"import os, sys; os.environ['RANK'] == '1' and sys.exit(7); {WAIT}")
    begin = time.monotonic()
    assert launch.run(lambda: 3, [], 2) == 7  # not started again: it was not lost
    assert time.monotonic() - begin < 20


def test_one_that_was_killed_is_told_and_started_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks_of(monkeypatch, KILLED)
    counts = iter([3, 2, 0])
    assert launch.run(lambda: next(counts), [], 3) == LOST
    said = capfd.readouterr().err
    assert said.count("The process of rank 1") == 2 and said.count("SIGKILL") == 2 and "Going on by itself in 2 processes" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_launcher(number: signal.Signals, tmp_path: Path) -> None:
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests are a background job of a shell
    running = subprocess.Popen([sys.executable, "-c", LAUNCHER, STARTED + WAIT, str(tmp_path)], preexec_fn=heard)
    try:
        until = time.monotonic() + 30
        while len([one for one in tmp_path.iterdir() if one.read_text()]) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        pids = [int(one.read_text()) for one in tmp_path.iterdir()]
        born = [birth(pid) for pid in pids]
        running.send_signal(number)
        assert running.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
        while any(map(is_alive, pids, born)) and time.monotonic() < until:
            time.sleep(0.02)
        assert len(pids) == 2 and not any(map(is_alive, pids, born))
    finally:
        running.kill()


def test_the_launcher_leaves_pytorch_to_its_processes() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    assert subprocess.run([sys.executable, "-c", LIGHT], env=environment, check=False).returncode == 0


FORKS = """
import sys
from verglas.cli import launch
forked, plain = [], launch._forked
launch._forked = lambda *words: (forked.append(words[0]["RANK"]), plain(*words))[1]
code = launch.run(lambda: 3, ["info", sys.argv[1]], 0)
print(code, list(forked), launch.run(lambda: 2, ["--version"], 0), len(forked))
"""


@pytest.mark.parametrize(("wanted", "forked", "all_forked"), [("1", ["0", "1", "2"], 5), ("0", [], 0)])
def test_ranks_are_forked_from_a_process_that_has_imported_all(
    wanted: str, forked: list[str], all_forked: int, tmp_path: Path
) -> None:
    """A second time, too; each with its own exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {launch.FORK: wanted}
    words = [sys.executable, "-c", FORKS, str(tmp_path / "none.star")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.splitlines()[-1] == f"2 {forked} 0 {all_forked}", done.stderr
    assert done.stderr.count("none.star") == 1 and done.stdout.count("verglas ") == 2


def test_ranks_are_heard_of_where_whoever_started_the_launcher_would_not_be() -> None:
    """SIGCHLD that is ignored goes on being ignored in a program that is started, unless that says otherwise."""
    program = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)" + FORKS
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run([sys.executable, "-c", program, "none"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["2 ['0', '1', '2'] 0 5"], done.stderr


@pytest.mark.parametrize(("debug", "level"), [("0", "FATAL"), ("1", "None")])
def test_what_is_imported_once_is_imported_as_ranks_want_it(debug: str, level: str) -> None:
    """Threads are said and messages kept back before PyTorch is there; the launcher's own number of threads stays."""
    program = """
import os, sys
from verglas.cli import launch
assert launch.import_once(2) and "torch" in sys.modules
print(os.environ.get("TORCH_CPP_LOG_LEVEL"), os.environ.get("OMP_NUM_THREADS"), launch.import_once(2), launch.import_once(1))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL")}
    done = subprocess.run([sys.executable, "-c", program], env=environment | {"VERGLAS_DEBUG": debug}, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.stdout.split() == [level, "None", "True", "False"], done.stderr


def test_a_stop_while_ranks_are_forked_is_heard() -> None:
    """Whenever it comes: all end, with the code that says so."""
    program = """
import os, signal, sys, threading
from verglas.cli import launch
launch.import_once = lambda count: True
plain = launch._forked
launch._forked = lambda *words: (os.kill(os.getpid(), signal.SIGTERM) if words[0]["RANK"] == "2" else None, plain(*words))[1]
sys.exit(launch.run(lambda: 4, ["info", "none"], 0))
"""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


def test_a_forked_process_tells_how_it_ended() -> None:
    """In a process of its own, as this one has threads."""
    program = """
import os, signal, subprocess
from verglas.cli.launch import Forked
def forked(work):
    pid = os.fork()
    if pid:
        return Forked(pid)
    work()
    os._exit(3)
one, other = forked(lambda: None), forked(signal.pause)
assert one.wait(20) == 3 and one.poll() == 3 and other.poll() is None
one.send_signal(signal.SIGKILL)  # nobody has that number any more
try:
    other.wait(0.1)
except subprocess.TimeoutExpired:
    other.kill()
assert other.wait() == -signal.SIGKILL
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
