"""Bytes that PyTorch takes of the CPU's memory, counted allocation by allocation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that `work` has at a time beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    assert watched.profiler is not None
    events = [one for one in watched.profiler.kineto_results.events() if one.name() == "[memory]"]
    taken = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return max(accumulate(taken), default=0)
