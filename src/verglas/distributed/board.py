"""What ranks tell one another while they work on particles: how much each has begun, how much it is done with, and since when.

Each rank has a line in the common store, which it alone writes, without waiting for an answer; all are read by one question.
Beside it is a counter of the rows of this rank that others have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.distributed as dist

Clock = Callable[[], float]


@dataclass(frozen=True)
class Standing:
    """Of a rank in a round: cost of the rows that it has begun, and of those it is done with; since: seconds after the round's
    start at which it began what it is at (or was done, if it is at nothing); gone: rows of its own that were taken, by itself or
    by others."""

    begun: float
    done: float
    since: float
    gone: int

    @classmethod
    def read(cls, line: bytes, taken: bytes) -> Standing:
        """From what is in the store."""
        begun, done, since, own = map(float, line.split())
        return cls(begun, done, since, int(own) + int(taken))


class Board:
    """Lines of all ranks, anew in every round (an expectation). name: of this board among those of a run; begun, done: of this
    rank; own: rows of its own that it took."""

    def __init__(self, store: dist.Store | None, rank: int, name: str) -> None:
        self.store, self.rank, self.name, self.number = store, rank, name, -1
        self.next_round()

    def next_round(self) -> None:
        """All ranks do this; who asks for the line of one that has not waits for it."""
        self.number += 1
        self._started: float | None = None
        self.begun, self.done, self.own = 0.0, 0.0, 0
        if self.store is not None:
            self._write(0.0)
            self.store.add(self._key("helped", self.rank), 0)

    def elapsed(self, clock: Clock) -> float:
        """Seconds since this rank first asked in this round."""
        now = clock()
        self._started = now if self._started is None else self._started
        return now - self._started

    def begins(self, cost: float, clock: Clock, own: int = 0) -> None:
        """This rank takes up rows of that cost; own: how many of them are its own."""
        self.begun, self.own = self.begun + cost, self.own + own
        self._write(self.elapsed(clock))

    def ends(self, cost: float, clock: Clock) -> None:
        """It is done with them."""
        self.done += cost
        self._write(self.elapsed(clock))

    def helps(self, rank: int, rows: int) -> None:
        """This rank has taken so many rows of another one."""
        assert self.store is not None
        self.store.add(self._key("helped", rank), rows)

    def read(self, ranks: Iterable[int]) -> dict[int, Standing]:
        """How some ranks stand."""
        assert self.store is not None
        asked = list(ranks)
        found = self.store.multi_get([self._key(what, rank) for rank in asked for what in ("at", "helped")])
        return {rank: Standing.read(*pair) for rank, pair in zip(asked, zip(found[::2], found[1::2], strict=True), strict=True)}

    def _write(self, since: float) -> None:
        assert self.store is not None
        line = f"{self.begun:.9g} {self.done:.9g} {since:.9g} {self.own}"
        self.store.set(self._key("at", self.rank), line)

    def _key(self, what: str, rank: int) -> str:
        return f"board/{self.name}/{self.number}/{what}/{rank}"
