"""Keeping freed memory in the process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let large arrays reuse the memory of freed ones instead of asking the system for fresh pages each time.

    The arrays of a batch (hundreds of MB) come and go many times an iteration; without this every one of them is mapped
    anew and each of its pages faults once, which took a third of the time of a refinement on two cores (benchmarks/
    NOTES.md). glibc only; returns whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
