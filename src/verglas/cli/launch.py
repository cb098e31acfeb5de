"""--gpus: the same command once per GPU of this computer.

What takes seconds to import is imported once, and the processes are forked from there: eight that read PyTorch's files side by
side take several times as long as one, on a file system that others share still longer. CUDA is not begun before the fork.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

from verglas.core.imports import import_triton, importing, quiet_messages
from verglas.distributed.beat import LOST
from verglas.distributed.place import place_of
from verglas.errors import InputError
from verglas.io.progress import say

PROGRAM = ("-m", "verglas")  # Python's words for it, where processes are not forked
FORK = "VERGLAS_FORK"  # 0: each imports everything itself
RESTARTS = 3  # of a run that is to go on by itself
LOOK = 0.05  # s between two looks for processes that have ended
TOGETHER = 0.3  # s after the first one that failed in which others may end by what ended it
ENDING = 30.0  # s that processes have to end when they are told to
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2): the signal that a process gets when its parent ends
COUNT_GPUS = """
import ctypes, sys
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
sys.exit(cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or print(count.value))
"""


class Stopped(BaseException):
    """This process was told to stop. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def gpus_there() -> int:
    """How many GPUs CUDA_VISIBLE_DEVICES leaves, as NVIDIA's driver says; 0 without it. Asked in a process of its own, as the
    driver's first answer to a process stays its answer."""
    asked = subprocess.run([sys.executable, "-I", "-S", "-c", COUNT_GPUS], capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.returncode == 0 else 0


def gpus_wanted(gpus: str) -> tuple[int, str | None]:
    """(how many, CUDA_VISIBLE_DEVICES or None for the first ones) of 'all', '4' or '0,2', of the visible ones: in a job of Slurm
    its own. InputError if they are not there, or if srun started several processes already."""
    if place_of(os.environ) is not None:
        raise InputError("--gpus", f"'{gpus}' beside several processes of srun", "one of the two",
                         "Let srun start one process per GPU, without --gpus, or one in all (--ntasks 1).")  # fmt: skip
    there = gpus_there()
    if gpus == "all":
        count, visible = there, None
    elif "," in gpus:
        numbers = [one.strip() for one in gpus.split(",") if one.strip()]
        if not numbers or not all(one.isdigit() for one in numbers) or len(set(numbers)) < len(numbers):
            raise InputError("--gpus", f"'{gpus}'", "all, a number, or numbers of GPUs such as 0,1")
        count, visible = len(numbers), ",".join(visible_names(numbers))
        if max(map(int, numbers)) >= there:
            raise InputError("--gpus", f"'{gpus}'", f"numbers below {there}, which is how many GPUs the driver finds here")
    elif gpus.isdigit():
        count, visible = int(gpus), None
    else:
        raise InputError("--gpus", f"'{gpus}'", "all, a number, or numbers of GPUs such as 0,1")
    if not 1 <= count <= there:
        raise InputError("--gpus", f"'{gpus}'", f"at most {there}, which is how many GPUs the driver finds here",
                         "Leave it out to compute in this process.")  # fmt: skip
    return count, visible


def visible_names(numbers: list[str]) -> list[str]:
    """What CUDA calls the GPUs of these numbers, if only some of the computer's are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [visible[int(one)] if int(one) < len(visible) and visible != [""] else one for one in numbers]


def launch(gpus: str, command: list[str], elastic: bool = False) -> int:
    """Run `verglas COMMAND` with one process per GPU; the exit code. elastic: when a process was lost, start it again (it goes on
    by itself), up to `RESTARTS` times, on as many GPUs as there are then."""
    count, visible = gpus_wanted(gpus)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    if not any(word.startswith("--device") for word in command):
        command = [*command, "--device", "cuda"]  # a PyTorch without CUDA is to say so, not to compute on the CPU
    counts = iter([count])  # asked again only where a process was lost
    return run(lambda: next(counts, None) or min(count, gpus_there()), command, RESTARTS if elastic else 0)


def run(processes: Callable[[], int], command: list[str], restarts: int) -> int:
    """Run `verglas COMMAND` in so many processes of this computer, and again after one was lost. processes: asked before each."""
    count = processes()
    while (code := run_once(count, command)) == LOST and restarts > 0 and (count := processes()) > 0:
        restarts -= 1
        say(f"Going on by itself in {count} processes; after that, up to {restarts} times more.")
    return code


def run_once(processes: int, command: list[str]) -> int:
    """The exit code of the process that failed first, `LOST` if it was killed; 0 if none did. They end if this one is ended."""
    begun: list[Process] = []
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody learns how processes end
    with _signals_raise() as before:
        try:
            forks = import_once(processes)
            with _free_port() as held:
                for rank in range(processes):
                    place = environment_of(rank, processes, held.getsockname()[1])
                    if not forks:
                        begun.append(_begun(place, command))
                        continue
                    with _signals_wait():  # raised within a fork they would be lost
                        begun.append(_forked(place, command, before, held))
                failed = _first_failed(begun)
            end(begun, signal.SIGTERM)
        except Stopped as stop:
            end(begun, stop.number)
            return 128 + stop.number
    if failed is None:
        return 0
    rank, code = failed
    if code > 0:
        return code
    say(f"The process of rank {rank} ({begun[rank].pid}) was ended by {signal.Signals(-code).name}.")
    return LOST


def threads_of(size: int) -> str:
    """OMP_NUM_THREADS of each of so many processes."""
    return os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // size)))


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What tells a process where it stands, as torchrun would."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost",
             "MASTER_PORT": port, "OMP_NUM_THREADS": threads_of(size)}  # fmt: skip
    return {name: str(value) for name, value in place.items()}


def _begun(place: Mapping[str, str], command: list[str]) -> subprocess.Popen[bytes]:
    """The process of a rank. Ctrl-C reaches it through this process alone."""
    words = [sys.executable, *PROGRAM, *command]
    return subprocess.Popen(words, env=os.environ | place, start_new_session=True, preexec_fn=_ends_with_parent())


class Forked:
    """A process forked from this one, as `subprocess.Popen` tells of one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, -N if signal N ended it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(LOOK)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing, if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[bytes] | Forked
_imported = False  # by `import_once`


def import_once(processes: int) -> bool:
    """Import what all processes need, if they may be forked from this one: not where somebody else has begun threads, or PyTorch,
    in it. Returns whether they may."""
    global _imported
    alone = threading.active_count() == 1 and (_imported or "torch" not in sys.modules)
    if processes < 2 or not alone or PROGRAM != ("-m", "verglas") or sys.platform != "linux" or os.environ.get(FORK) == "0":
        return False
    quiet_messages()
    with _threads_said(threads_of(processes)), importing():
        import verglas.cli.run_loop
        import verglas.refinement.driver  # noqa: F401  with PyTorch and pandas

        import_triton()
    _imported = threading.active_count() == 1
    return _imported


@contextmanager
def _threads_said(threads: str) -> Iterator[None]:
    """Within, OMP_NUM_THREADS says so: it is read as libraries are loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _forked(place: Mapping[str, str], command: list[str], before: Mapping[Any, Any], held: socket.socket) -> Forked:
    """As `_begun`, without importing anything again. before: what this process did at signals; held: not the child's."""
    ends_with_parent, parent = _ends_with_parent(), os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of a library for matrices, which knows of forks
        pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        if ends_with_parent is not None:
            ends_with_parent()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        held.close()
        os.environ.update(place)
        sys.argv = ["verglas", *command]
        if os.getppid() == parent:  # else it was killed meanwhile
            from verglas.cli.main import process

            code = process()
    except SystemExit as stop:
        from verglas.cli.main import ended

        code = ended(0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _ends_with_parent() -> Callable[[], object] | None:
    """What lets a process be ended when its parent is killed, called in it before it begins; None where that is not possible."""
    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM) if sys.platform == "linux" else None


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Within, signals that ask this process to stop wait."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def _free_port() -> Iterator[socket.socket]:
    """What holds a port at which the first rank can listen; as long as the `with` lasts no other program is given it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a listening one may have it, too
        held.bind(("", 0))
        yield held


def _first_failed(processes: list[Process]) -> tuple[int, int] | None:
    """(rank, exit code) of the process that failed first, soon after it has ended; None when all are done."""
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return None
        if any(codes):
            time.sleep(TOGETHER)
            failed = [(rank, process.poll() or 0) for rank, process in enumerate(processes)]
            return min((one for one in failed if one[1] != 0), key=lambda one: how_early(one[1]))
        time.sleep(LOOK)


def how_early(code: int) -> tuple[bool, bool, int]:
    """Orders processes that ended at about the same time: a killed one (code below 0) is before those that miss it; one that was
    ended by SIGTERM is last."""
    return code == -signal.SIGTERM, code > 0, code


def end(processes: list[Process], number: int) -> None:
    """Let processes that still run end by a signal; those that have not after `ENDING`, or when this one is told again, are
    killed."""
    running = [process for process in processes if process.poll() is None]
    try:
        for process in running:
            process.send_signal(number)
        until = time.monotonic() + ENDING
        for process in running:
            process.wait(max(0.0, until - time.monotonic()))
    except (Stopped, subprocess.TimeoutExpired):
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def _signals_raise() -> Iterator[Mapping[Any, Any]]:
    """Within, signals that ask this process to stop raise `Stopped`, but for those that it was started to ignore (nohup). Gives
    what they did before."""

    def told(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, told) for number in heard}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
