"""Sums on their way to the ranks that need them, piece by piece, while this rank may compute something else.

All ranks send the same pieces in the same order, in a group of their own where messages between hosts could come in between
(`Ranks.behind`); between GPUs nothing else is sent from the first piece to `finish`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from verglas.distributed.meter import Entry
from verglas.distributed.ranks import Ranks

AT_ONCE = 2  # pieces under way: one travels while the next one is put together


@dataclass(frozen=True)
class Piece:
    """What is added up at one rank. make: puts this rank's part together; take: gets the sum, on that rank alone."""

    rank: int
    make: Callable[[], Tensor]
    take: Callable[[Tensor], None]


class Arrivals:
    """Pieces on their way. `advance` now and then, `finish` in the end."""

    def __init__(self, ranks: Ranks, pieces: Iterable[Piece], name: str) -> None:
        self.ranks, self.name = ranks, name
        self._waiting = deque(pieces)
        self._under_way: deque[tuple[Piece, Tensor, dist.Work, Entry, float]] = deque()

    @property
    def left(self) -> bool:
        """Whether any piece has not arrived."""
        return bool(self._waiting or self._under_way)

    def advance(self) -> None:
        """Take in what has arrived, without waiting, and send what comes next."""
        while self._under_way and self._under_way[0][2].is_completed():
            piece, tensor, work, entry, started = self._under_way.popleft()
            work.wait()  # on a GPU: what is queued from here on comes after it
            entry.hidden_seconds += time.perf_counter() - started
            self._taken(piece, tensor)
        self._send()

    def finish(self) -> None:
        """Wait for all pieces."""
        self._send()
        while self._under_way:
            piece, tensor, work, entry, _ = self._under_way.popleft()
            with self.ranks.together(self.name), self.ranks.meter.standing(entry, tensor.device):
                work.wait()
            self._taken(piece, tensor)
            self._send()

    def _taken(self, piece: Piece, tensor: Tensor) -> None:
        if piece.rank == self.ranks.rank:
            piece.take(tensor)

    def _send(self) -> None:
        while self._waiting and len(self._under_way) < AT_ONCE:
            piece = self._waiting.popleft()
            tensor = piece.make()
            entry = self.ranks.meter.count("reduce", self.name, tensor.nbytes, self.ranks.size)
            work = dist.reduce(tensor, piece.rank, group=self.ranks.behind, async_op=True)
            assert work is not None
            self._under_way.append((piece, tensor, work, entry, time.perf_counter()))
