"""Keeping freed memory in the process, whole on a GPU."""

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


def grow_device_memory() -> bool:
    """Let PyTorch extend the memory it holds on a GPU instead of adding pieces of fixed size; returns whether it was done.

    The arrays of every iteration have other sizes than those of the last: freed pieces that fit none of them piled up to six
    times what was in use (84 GB held for 13 GB of arrays, 1,000 images of 256 px).
    """
    import torch

    change = getattr(torch.cuda.memory, "_set_allocator_settings", None)  # not public; the environment is read too early
    if change is None:
        return False
    change("expandable_segments:True")
    return True
