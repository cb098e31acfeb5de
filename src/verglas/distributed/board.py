"""What ranks tell one another while they work on particles: how much each has begun, how much it is done with, and since when.

Each rank has a line in the common store, which it alone writes and all read at once: nobody waits for anybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Standing:
    """Of a rank in a round: cost of the rows that it has begun, and of those it is done with; since: seconds after the round's
    start at which it began what it is at (or was done, if it is at nothing); gone: rows of its own that were taken, by itself or
    by others."""

    begun: float
    done: float
    since: float
    gone: int


class Board:
    """Lines of all ranks, anew in every round (an expectation). size: of ranks; clock: seconds."""

    def __init__(self, store: dist.Store | None, rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.clock = store, rank, size, time.perf_counter
        self.number, self._begin = 0, float("nan")
        self.begun = self.done = 0.0
        self.own = 0  # rows of its own that this rank took
        self._write()

    def next_round(self) -> None:
        """All ranks do this before something that they do together: then everybody's lines are there."""
        self.number += 1
        self._begin, self.own = float("nan"), 0
        self.begun = self.done = 0.0
        self._write()

    def elapsed(self, clock: Callable[[], float]) -> float:
        """Seconds since this rank first asked in this round."""
        now = clock()
        if self._begin != self._begin:  # not yet
            self._begin = now
        return now - self._begin

    def begins(self, cost: float, clock: Callable[[], float], own: int = 0) -> None:
        """This rank takes up rows of that cost; own: how many of them are its own."""
        self.begun, self.own = self.begun + cost, self.own + own
        self._write(self.elapsed(clock))

    def ends(self, cost: float, clock: Callable[[], float]) -> None:
        """It is done with them."""
        self.done += cost
        self._write(self.elapsed(clock))

    def helped(self, rank: int, rows: int) -> None:
        """This rank took so many rows of another one."""
        assert self.store is not None
        self.store.add(f"gone/{self.number}/{rank}", rows)

    def read(self, ranks: Iterable[int]) -> dict[int, Standing]:
        """How some ranks stand."""
        assert self.store is not None
        asked = list(ranks)
        keys = [f"{name}/{self.number}/{rank}" for rank in asked for name in ("at", "gone")]
        found = self.store.multi_get(keys) if keys else []
        standings = zip(asked, found[::2], found[1::2], strict=True)
        return {rank: _standing(line, gone) for rank, line, gone in standings}

    def _write(self, since: float = 0.0) -> None:
        if self.store is None:
            return
        self.store.set(f"at/{self.number}/{self.rank}", f"{self.begun:.9g} {self.done:.9g} {since:.9g} {self.own}")
        if since == 0.0 and self.begun == 0.0:
            self.store.add(f"gone/{self.number}/{self.rank}", 0)


def _standing(line: bytes, gone: bytes) -> Standing:
    begun, done, since, own = map(float, line.split())
    return Standing(begun, done, since, int(own) + int(gone))
