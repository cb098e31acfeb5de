"""Who works on which rows: each rank on its own first, then whoever is done helps the one that has most left.

The rows of an owner are a line; a counter in the ranks' common store says how many of them were taken. Taking the next few is
one addition to it, so that no row is taken twice and nobody waits. What is added up does not depend on who worked on what.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from verglas.distributed.shares import Block, Shares

MOST_FIXED = 0.2  # of a piece's time: no smaller ones are taken
KEPT_BACK, TAKEN_BACK = 1.5, 0.5  # blocks from an owner's last ones on it takes half of what is left, so that others can help
KEPT_AT_FIRST, TAKEN_AT_FIRST = 3.0, 0.3  # the same while speeds are not known
TAKEN_OF_FAIR = 0.5  # of the part of another rank's rows with which both would be done at once
LOOKED_AT = 16  # other ranks that one without work looks at before it helps


Piece = tuple[int, slice]  # an owner, and some of its rows that one rank works on


@dataclass(frozen=True)
class Line:
    """The rows of an owner in the order in which they are to be worked on; cost_n: running sum of their costs; samples_n: of
    their samples."""

    row_n: Tensor
    cost_n: Tensor
    samples_n: Tensor

    def left(self, taken: int) -> float:
        """Cost of the rows that were not taken."""
        return float(self.cost_n[-1] - self._before(taken)) if taken < len(self.row_n) else 0.0

    @property
    def mean(self) -> float:
        """Cost of a mean row."""
        return float(self.cost_n[-1]) / len(self.row_n)

    def next(self, taken: int, cost: float) -> int:
        """How many rows of about that cost come next, at least 1."""
        wanted = torch.tensor(self._before(taken) + cost, dtype=torch.float64)
        return max(1, int(torch.searchsorted(self.cost_n, wanted, right=True)) - taken)

    def _before(self, taken: int) -> float:
        return float(self.cost_n[taken - 1]) if taken else 0.0


def all_taken(rows: Tensor, shares: Shares | None, name: str) -> bool:
    """Whether all rows of a `Handout` of that name have been taken: then nothing need be put in order for it."""
    assert shares is not None and shares.ranks.store is not None
    store, counts = shares.ranks.store, torch.bincount(shares.owner_B[rows], minlength=shares.ranks.size).tolist()
    return all(store.add(f"taken/{rank}/{name}", 0) >= count for rank, count in enumerate(counts) if count)


class Handout:
    """Rows of every owner, to be given out in blocks. Made by all ranks alike. clock: seconds."""

    def __init__(
        self, rows: Tensor, shares: Shares, samples_B: Tensor, clock: Callable[[], float] = time.perf_counter,
        name: str | None = None, helps: bool = True,
    ) -> None:  # fmt: skip
        """rows: of the table, in the order in which they are to be worked on; samples_B: of all rows of the table, as `Shares`
        counts them. Rows that an owner read at the start come first: the others' images may not be there yet. name: of the
        counters, "number of the expectation.set", where ranks come here in different order, or a rank comes more than once;
        helps: others, when its own are done."""
        self.shares, self.ranks, self.clock, self.helps = shares, shares.ranks, clock, helps
        self.number = str(next(shares.ranks.sequence)) if name is None else name
        self._random = Random(self.ranks.rank)
        self.ranks.work.owned = int((shares.owner_B == self.ranks.rank).sum())
        moved_n = shares.owner_B[rows] != shares.home_B[rows]
        if bool(moved_n.any()):
            rows = rows[torch.argsort(moved_n.long(), stable=True)]
        self._row_n, self._owner_n, self._samples_B = rows, shares.owner_B[rows], samples_B
        self._counts = torch.bincount(self._owner_n, minlength=self.ranks.size).tolist()
        self._lines: dict[int, Line] = {}

    def line(self, rank: int) -> Line:
        """The rows of an owner; others' are not looked at before one thinks of helping them."""
        if rank not in self._lines:
            row_n = self._row_n[self._owner_n == rank]
            samples_n = self._samples_B[row_n].double()
            self._lines[rank] = Line(row_n, self.shares.pace.cost(samples_n).cumsum(0), samples_n)
        return self._lines[rank]

    def own(self) -> Tensor:
        """The rows that this rank begins with."""
        return self.line(self.ranks.rank).row_n

    def blocks(self, size: int, announce: Callable[[Tensor], None] | None = None) -> Iterator[Tensor]:
        """Blocks of at most `size` rows until nobody has any left; the rows of a block have one owner.

        announce: is told other ranks' rows before the block that comes ahead of them is handed out, so that their images can be
        read meanwhile.
        """
        for place, (owner, part) in enumerate(self._pieces(size, announce)):
            line, begin = self.line(owner), self.clock() - self.shares.waited  # for images: says nothing of this rank's speed
            yield line.row_n[part]
            samples = float(line.samples_n[part].sum())
            rows, seconds = len(line.row_n[part]), self.clock() - self.shares.waited - begin
            self.shares.worked(Block(rows, samples, seconds, first=place == 0))
            self.ranks.work.add(rows, owner == self.ranks.rank, seconds)

    def best(self, size: int) -> int:
        """Rows of a block, at most `size`: the more, the fewer fixed costs, and the longer others wait for a last one.

        n / size blocks of `fixed` and half a block of waiting are least at sqrt(2 n fixed); half of that is waited for where
        speeds are known.
        """
        pace, rows = self.shares.pace, max(self._counts)
        waits = 1 if pace.fixed is None else 0.5
        return max(1, min(size, int((2 * rows * pace.fixed_rows(size) / waits) ** 0.5)))

    def _pieces(self, size: int, announce: Callable[[Tensor], None] | None) -> Iterator[Piece]:
        """This rank's own rows, then those of others, of which a piece is taken ahead."""
        piece = self._own_piece(size)
        piece = self._stolen(size, announce, self._beginning(size)) if piece is None else piece
        while piece is not None:
            ahead = None if self._left(self.ranks.rank) else self._stolen(size, announce, self._cost(piece))
            yield piece
            piece = ahead or self._own_piece(size) or self._stolen(size, announce)

    def _beginning(self, size: int) -> float:
        """What it costs to help in a set of which this rank has nothing: references and slices are made first. A block, if that
        is not known."""
        if self._counts[self.ranks.rank] or self.shares.half_B is None:
            return 0.0
        return self.shares.pace.start if self.shares.pace.known else size * self.shares.pace.mean_row

    def _own_piece(self, size: int) -> Piece | None:
        me, known = self.ranks.rank, self.shares.pace.known
        left = self._left(me)
        if left == 0:
            return None
        kept, part = (KEPT_BACK, TAKEN_BACK) if known else (KEPT_AT_FIRST, TAKEN_AT_FIRST)
        many = left > kept * size * self.line(me).mean  # as many rows in each, as was announced
        return self._take(me, math.inf if many else part * left, size)

    def _stolen(self, size: int, announce: Callable[[Tensor], None] | None, busy: float = 0.0) -> Piece | None:
        """Some rows of the rank that would be busy longest, so that both would be done at once if this was taken twice.

        busy: cost of what this rank has to do before."""
        me = self.ranks.rank
        others = [rank for rank in range(self.ranks.size) if rank != me and self._counts[rank] and self.helps]
        if len(others) > LOOKED_AT:
            others = self._random.sample(others, LOOKED_AT)
        while others:
            left_R, speed_R = {rank: self._left(rank) for rank in others}, self._speeds([me, *others])
            slowest = max(others, key=lambda rank: left_R[rank] / speed_R[rank])
            fair = (left_R[slowest] * speed_R[me] - busy * speed_R[slowest]) / (speed_R[me] + speed_R[slowest])
            if fair < self._least(size) * self.line(slowest).mean:  # its owner has taken the next piece before help would come
                return None
            piece = self._take(slowest, TAKEN_OF_FAIR * fair, size)
            if piece is not None:
                if announce is not None:
                    announce(self.line(slowest).row_n[piece[1]])
                return piece
        return None

    def _speeds(self, ranks: list[int]) -> dict[int, float]:
        """Of some ranks: as measured; before anything was, how many rows each has begun until now, of its own or others'."""
        if self.shares.pace.known:
            return {rank: float(self.shares.pace.speed_R[rank]) for rank in ranks}
        return {rank: max(1.0, self._begun_by(rank, 0)) for rank in ranks}

    def _cost(self, piece: Piece) -> float:
        """Of a piece's rows, and of the block that they are."""
        line, part = self.line(piece[0]), piece[1]
        return line.left(part.start) - line.left(part.stop) + (self.shares.pace.fixed or 0.0)

    def _least(self, size: int) -> int:
        """Rows of the smallest piece."""
        return max(1, min(size, int(self.shares.pace.fixed_rows(size) / MOST_FIXED)))

    def _take(self, rank: int, cost: float, size: int) -> Piece | None:
        """The next rows of an owner of about that cost, if any are left."""
        line, least, taken = self.line(rank), self._least(size), self._taken_of(rank, 0)
        wanted = min(size, max(least, line.next(taken, cost)))
        if len(line.row_n) - taken - wanted < least / 2:  # no crumbs
            wanted = max(wanted, min(size, len(line.row_n) - taken))
        last = self._taken_of(rank, wanted)
        first, last = last - wanted, min(last, len(line.row_n))
        if first < last and not self.shares.pace.known:
            self._begun_by(self.ranks.rank, last - first)
        return (rank, slice(first, last)) if first < last else None

    def _left(self, rank: int) -> float:
        return self.line(rank).left(self._taken_of(rank, 0))

    def _taken_of(self, rank: int, more: int) -> int:
        """How many rows of an owner are taken, with `more` that are taken now."""
        assert self.ranks.store is not None
        return self.ranks.store.add(f"taken/{rank}/{self.number}", more)

    def _begun_by(self, rank: int, more: int) -> int:
        """A counter of the rows that a rank has begun, its own or others', in all sets of one name up to its first dot."""
        assert self.ranks.store is not None
        return self.ranks.store.add(f"begun/{rank}/{self.number.partition('.')[0]}", more)
