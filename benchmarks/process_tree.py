"""Processes that are ended with all that they have started, whatever sessions these are in: launchers give ranks their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from verglas.core.processes import birth, is_alive

ENDING = 10.0  # s that a process has to end when it is told to
TRACED = {"PYTHONFAULTHANDLER": "1"}  # in the environment of processes that are to say where they stand when they are ended


def descendants(pid: int) -> dict[int, str]:
    """Number -> `birth` of all processes that one has started, and these in turn, as far as they live (Linux)."""
    found: dict[int, str] = {}
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            for child in map(int, listed.read_text().split()):
                found |= {child: birth(child)} | descendants(child)
    return found


def end_all(process: subprocess.Popen[bytes], seconds: float = ENDING, traced: bool = False) -> None:
    """End a process and its descendants; those that have not ended after so many seconds are killed.

    traced: the descendants say where each of their threads stands (if they were started with `TRACED`), and end by that.
    """
    begun = descendants(process.pid)
    if traced:
        signalled(begun, signal.SIGABRT)
    process.terminate()
    until = time.monotonic() + seconds
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    while traced and time.monotonic() < until and any(is_alive(*one) for one in begun.items()):
        time.sleep(0.02)  # they are still writing where they stand
    signalled(begun | descendants(process.pid), signal.SIGKILL)
    process.kill()
    process.wait()


def signalled(processes: dict[int, str], number: signal.Signals) -> None:
    """Send a signal to those that still live."""
    for pid, born in processes.items():
        if is_alive(pid, born):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
