"""Two threads for one GPU: while one batch is finished, the next one is begun, so that it has work while a thread waits for it.

The host waits for the device wherever the length of a list is known there alone. Both threads put their work into the same
stream, each in its own order: what comes out is what one thread makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from verglas.core.memory import usable_device_memory
from verglas.distributed.ranks import ALONE, Ranks

T = TypeVar("T")
TURN = 2e-4  # s after which Python lets a thread run that has heard from the GPU; otherwise 5 ms, in which that may stand still
BATCHES = 4  # memory of as many is free before two are worked on at once: theirs, their slices', and that of references


def in_order(
    begun: Iterable[Callable[[], T]], device: torch.device, batch: float, ranks: Ranks = ALONE
) -> Iterator[T]:  # fmt: skip
    """What works make that were begun, in their order; with one ahead, if it pays, there is room, and several ranks are not told
    otherwise (`Ways.ahead`). batch: bytes of one."""
    wanted = ranks.size == 1 or ranks.ways.ahead
    return one_ahead(begun, device) if wanted and room_ahead(device, batch) else (work() for work in begun)


def room_ahead(device: torch.device, batch: float) -> bool:
    """Whether a batch may be begun before the last one is finished: on a GPU that has memory for it."""
    return device.type == "cuda" and usable_device_memory(device) > BATCHES * batch


def one_ahead(begun: Iterable[Callable[[], T]], device: torch.device) -> Iterator[T]:
    """What is made by works that were begun, in their order: a second thread finishes each while the next one is begun.

    begun: gives each work's second half when its first one is done. What a second half raises is raised here. Whoever ends early
    waits for those that were handed over, two at most.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def finished(work: Callable[[], T]) -> T:
        with torch.cuda.stream(stream):  # of this thread, and its device; None: no change
            return work()

    with _quick_turns(), ThreadPoolExecutor(1, thread_name_prefix="verglas-finish") as worker:
        before: Future[T] | None = None
        for work in begun:
            after = worker.submit(finished, work)
            if before is not None:
                yield before.result()
            before = after
        if before is not None:
            yield before.result()


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Python's threads take turns of `TURN`."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
