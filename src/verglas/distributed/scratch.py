"""A folder of this process on a disk of its host (--scratch). It is gone when the process ends, or when the next run finds it."""

from __future__ import annotations

import fcntl
import shutil
import socket
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from verglas.core.memory import size_text
from verglas.errors import InputError

if TYPE_CHECKING:
    from verglas.distributed.ranks import Ranks

START, LOCK = "verglas-scratch-", "lock"
SPARE = 1.02  # times what the images take: file systems need some room of their own


_living: set[Scratch] = set()


class Scratch:
    """path: the folder. A lock in it, which the system takes back from a process that dies, says that its owner lives."""

    def __init__(self, parent: Path) -> None:
        """Make a folder in `parent`, and remove what dead processes left there. InputError if `parent` cannot be written to."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_left_behind(parent)
            made = Path(tempfile.mkdtemp(prefix=f".{START}", dir=parent))
            self._lock = _locked(made, make=True)
            self.path = made.rename(parent / f"{START}{socket.gethostname()}{made.name.removeprefix('.' + START)}")
        except OSError as error:
            raise InputError("--scratch", f"{parent} cannot be written to ({error.strerror})", "a folder on a disk of this host",
                             "Name another one, or leave it out.") from error  # fmt: skip
        _living.add(self)

    def remove(self) -> None:
        """Remove the folder, if that was not done yet."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        _living.discard(self)


def remove_all() -> None:
    """Remove all folders of this process, which is about to end in a way that leaves nothing else the time to do so, and those
    of killed ones beside them."""
    for scratch in tuple(_living):
        scratch.remove()
        remove_left_behind(scratch.path.parent)


def remove_left_behind(parent: Path) -> None:
    """Remove the folders of this host's processes that have died."""
    for folder in parent.glob(f"{START}{socket.gethostname()}*"):
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def _locked(folder: Path, make: bool = False) -> IO[str] | None:
    """The lock of a folder, None if a living process has it, or if the folder is gone; closing it gives the lock back."""
    try:
        lock = open(folder / LOCK, "w" if make else "r+", encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def check_space(parent: Path, needed: int, ranks: Ranks) -> None:
    """InputError on all ranks of a host whose images do not fit into `parent`; all ranks call it. needed: bytes of one's own."""
    host = socket.gethostname()
    wanted = [size for name, size in ranks.everyones((host, needed), "scratch") if name == host]
    free = shutil.disk_usage(parent).free
    if SPARE * sum(wanted) > free:
        of = f" of its {len(wanted)} ranks" if len(wanted) > 1 else ""
        needed_here = f"{size_text(SPARE * sum(wanted))} for the images{of}"
        raise InputError("--scratch", f"{size_text(free)} free in {parent} of {host}", needed_here,
                         "Make room, name another folder, or leave it out.")  # fmt: skip
