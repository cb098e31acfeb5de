"""Sums on their way to the ranks that need them, piece by piece, while this rank may compute something else.

All ranks send the same pieces in the same order, in a group of their own where messages between hosts could come in between
(`Ranks.behind`); between GPUs nothing else is sent from the first piece to `finish`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from verglas.distributed.coding import coded, coded_bytes, decoded
from verglas.distributed.meter import Entry
from verglas.distributed.ranks import Ranks

AT_ONCE = 2  # pieces under way: one travels while the next one is put together


@dataclass(frozen=True)
class Piece:
    """What is added up at one rank. make: puts this rank's part together; take: gets the sum, on that rank alone."""

    rank: int
    make: Callable[[], Tensor]
    take: Callable[[Tensor], None]


@dataclass(frozen=True)
class UnderWay:
    """What was sent at `began`, from memory of `device`. arrived: takes it in, once `work` is done."""

    work: dist.Work
    entry: Entry
    device: torch.device
    began: float
    arrived: Callable[[], None]


class Arrivals:
    """Pieces on their way. `advance` now and then, `finish` in the end."""

    def __init__(self, ranks: Ranks, pieces: Iterable[Piece], name: str) -> None:
        self.ranks, self.name = ranks, name
        self._waiting: deque[list[Piece]] = deque(self._together(pieces))
        self._under_way: deque[UnderWay] = deque()

    @property
    def left(self) -> bool:
        """Whether any piece has not arrived."""
        return bool(self._waiting or self._under_way)

    def advance(self) -> None:
        """Take in what has arrived, without waiting, and send what comes next."""
        while self._under_way and self._under_way[0].work.is_completed():
            one = self._under_way.popleft()
            one.work.wait()  # on a GPU: what is queued from here on comes after it
            one.entry.hidden_seconds += time.perf_counter() - one.began
            one.arrived()
        self._send()

    def finish(self) -> None:
        """Wait for all pieces."""
        self._send()
        while self._under_way:
            one = self._under_way.popleft()
            with self.ranks.together(self.name), self.ranks.meter.standing(one.entry, one.device):
                one.work.wait()
            one.arrived()
            self._send()

    def _send(self) -> None:
        while self._waiting and len(self._under_way) < AT_ONCE:
            self._under_way.append(self._begun(self._waiting.popleft()))

    def _together(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        """What is sent at once: each piece alone."""
        for piece in pieces:
            yield [piece]

    def _begun(self, pieces: list[Piece]) -> UnderWay:
        (piece,) = pieces
        tensor = piece.make()
        self.ranks.connected(tensor.device)
        entry = self.ranks.meter.count("reduce", self.name, tensor.nbytes, self.ranks.size)
        work = dist.reduce(tensor, piece.rank, group=self.ranks.behind, async_op=True)
        assert work is not None
        mine = piece.rank == self.ranks.rank
        return UnderWay(work, entry, tensor.device, time.perf_counter(), partial(piece.take, tensor) if mine else _nothing)


class SentArrivals(Arrivals):
    """The same, each rank being sent its pieces by all others that have any, and adding them up. givers: those that have; coded:
    in half the bytes (`verglas.distributed.coding`)."""

    def __init__(
        self, ranks: Ranks, pieces: Iterable[Piece], name: str, givers: Collection[int] | None = None, coded: bool = False
    ) -> None:
        self.givers, self.coded = range(ranks.size) if givers is None else givers, coded
        super().__init__(ranks, pieces, f"{name}, {'coded' if coded else 'of some ranks'}")

    def _together(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        """A piece for each rank at once, as long as there are any."""
        of_rank: dict[int, list[Piece]] = {rank: [] for rank in range(self.ranks.size)}
        for piece in pieces:
            of_rank[piece.rank].append(piece)
        for row in zip_longest(*of_rank.values()):
            yield [piece for piece in row if piece is not None]

    def _begun(self, pieces: list[Piece]) -> UnderWay:
        me, size = self.ranks.rank, self.ranks.size
        mine = next((piece for piece in pieces if piece.rank == me), None)
        mine_VC = None if mine is None else mine.make()
        gives = [piece for piece in pieces if piece is not mine and me in self.givers]
        parts = {piece.rank: coded(piece.make()) if self.coded else piece.make().flatten() for piece in gives}
        like = pieces[0].make() if mine_VC is None else mine_VC
        none = torch.empty(0, dtype=torch.uint8 if self.coded else like.dtype, device=like.device)
        device, sent = none.device, [parts.get(rank, none) for rank in range(size)]
        each = 0 if mine_VC is None else coded_bytes(*mine_VC.shape) if self.coded else mine_VC.numel()
        received = [each * (rank != me and rank in self.givers) for rank in range(size)]
        out, found = torch.cat(sent), none.new_empty(sum(received))
        self.ranks.connected(device)
        payload = out.nbytes * size // (size - 1)  # as if each sent something to itself, too
        entry = self.ranks.meter.count("all-to-all", self.name, payload, size)
        lengths = [len(one) for one in sent]
        work = dist.all_to_all_single(found, out, received, lengths, group=self.ranks.behind, async_op=True)

        def arrived(kept: Tensor = out) -> None:  # kept in memory until it has been sent
            if mine is not None and mine_VC is not None:
                for part in found.split(each) if len(found) else ():
                    mine_VC.add_(decoded(part, *mine_VC.shape) if self.coded else part.view(mine_VC.shape))
                mine.take(mine_VC)

        return UnderWay(work, entry, device, time.perf_counter(), arrived)


def _nothing() -> None:
    """What a piece for another rank does here."""
