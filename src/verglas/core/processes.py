"""Whether a process of this machine is still the one that was once seen: numbers of processes are used again."""

from __future__ import annotations

import os
from pathlib import Path


def birth(pid: int) -> str:
    """When a process was started, in clock ticks since boot (Linux: field 22 of /proc/<pid>/stat), else ''."""
    return _field(pid, 22)


def is_alive(pid: int, born: str) -> bool:
    """Whether the process of that number lives and, where the system tells, is the one with that `birth`. One that has ended and
    was not yet asked for its exit code (a zombie) is dead."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except OSError:
        return False
    return birth(pid) == born and _field(pid, 3) not in ("Z", "X")


def _field(pid: int, number: int) -> str:
    """Field of /proc/<pid>/stat, counted from 1 as in proc(5), from the third on: the second is a name that may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[number - 3]
    except (OSError, IndexError):
        return ""
