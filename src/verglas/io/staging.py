"""Hidden folders beside an output folder: made, put into place in one step, and cleaned up after runs that died.

`.{name}.partial-<pid>` is a run at work; `.{name}.replaced-<pid>` is an older run that is about to be replaced. Each holds a
note of its owner (machine, process), so that the folder of a living run, or of another machine, is never touched.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verglas.core.processes import birth, is_alive
from verglas.errors import OutputError
from verglas.io.progress import say

OWNER = ".owner.json"


def sibling(target: Path, kind: str) -> Path:
    """The hidden folder of this process beside `target`; kind: 'partial' or 'replaced'. OutputError for the root."""
    if not target.name:
        raise OutputError(f"{target} cannot be the folder of a run. Name a new folder with --out.")
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def siblings(target: Path, kind: str) -> list[Path]:
    """The hidden folders of any process beside `target`."""
    start = f".{target.name}.{kind}-"
    return sorted(path for path in target.parent.iterdir() if path.name.startswith(start) and path.name[len(start) :].isdigit())


def sign(folder: Path) -> None:
    """Write into `folder` that this process works there."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": birth(os.getpid())}
    (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")


def unsign(folder: Path) -> None:
    """Nobody works in `folder` any more."""
    (folder / OWNER).unlink(missing_ok=True)


def refuse_if_busy(folder: Path, out: Path) -> None:
    """Raise OutputError if a living process of this machine works in `folder` to make `out`."""
    owner = _owner(folder)
    if owner and _is_here(owner) and _is_alive(owner):
        raise OutputError(
            f"{out} is being written by another run (process {owner['pid']}). Wait for it, or choose another --out."
        )


def clean_up(target: Path) -> None:
    """Remove what dead runs of this machine left beside `target`, and say so.

    A run that died between moving the old folder aside and putting the new one in its place left no `target`: the old one is
    put back. Raises OutputError if a living run is at work.
    """
    for folder in siblings(target, "partial"):
        refuse_if_busy(folder, target)
        if _is_left_behind(folder):
            say(f"Removing {folder.name}, left behind by a run that died.")
            shutil.rmtree(folder)
    for folder in siblings(target, "replaced"):
        if not _is_left_behind(folder):
            continue
        unsign(folder)
        if target.exists():
            say(f"Removing {folder.name}, a replaced run left behind by one that died.")
            shutil.rmtree(folder)
        else:
            say(f"Putting {folder.name} back as {target.name}: the run that was to replace it died.")
            os.rename(folder, target)


def move_aside(target: Path) -> Path:
    """Rename `target` to its hidden name and return that."""
    aside = sibling(target, "replaced")
    sign(target)
    os.rename(target, aside)
    return aside


def move_into_place(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename `folder` to `target`. An old `target` is moved aside first and deleted last, so one of the two always exists."""
    if not target.exists():
        os.rename(folder, target)
        return
    if not overwrite:
        raise OutputError(f"{target} was made by someone else while this run was at work. Choose another --out.")
    aside = move_aside(target)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(aside, target)
        unsign(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def is_disk_full(error: OSError) -> bool:
    """Whether `error` means that no more can be written (numpy's tofile reports it without an errno)."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or ("requested and" in str(error) and "written" in str(error))


@contextmanager
def disk_errors_named(out: Path) -> Iterator[None]:
    """Turn the OSErrors of making, writing and moving `out` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise OutputError(disk_full_text(out)) from error
        raise OutputError(f"{out} cannot be written: {error.strerror or error} ({error.filename or out}).") from error


def disk_full_text(out: Path) -> str:
    """One sentence on a full disk, with the space that is left where `out` was to go."""
    parent = next((folder for folder in out.parents if folder.exists()), Path("/"))
    left = shutil.disk_usage(parent).free / 1e9
    return f"{out}: the disk is full ({left:.2f} GB left, or your quota is used up). Make room, or choose another --out."


def _owner(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_left_behind(folder: Path) -> bool:
    """True if its owner is a dead process of this machine, or if nobody signed it and it is empty."""
    owner = _owner(folder)
    return _is_here(owner) and not _is_alive(owner) if owner else not any(folder.iterdir())


def _is_here(owner: dict[str, Any]) -> bool:
    return owner.get("host") == socket.gethostname()


def _is_alive(owner: dict[str, Any]) -> bool:
    return is_alive(int(owner.get("pid", 0)), owner.get("process_start", ""))
