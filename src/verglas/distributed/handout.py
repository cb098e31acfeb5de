"""Who works on which rows: each rank on its own first, then whoever is done helps the one that has most left.

The rows of an owner are a line; a counter in the ranks' common store says how many of them were taken. Taking the next few is
one addition to it, so that no row is taken twice and nobody waits. What is added up does not depend on who worked on what.

A `Board` says what each rank has begun and is done with, and since when. A rank that sees there that others are quicker than
itself takes no more of its own rows than it can do until all are to be done: the rest is left to them, in the iteration in which
it got slow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from verglas.distributed.shares import FIXED, Block, Shares

LITTLE = 0.1  # of what a rank has to do: a delay that is not worth the images, references and sums of others' rows
MOST_FIXED = 0.5  # of a piece's time: no smaller ones are taken
SURE = 2.0  # times the time that help would take: a rank too slow for rows of its own offers it if others need longer
TAKEN_OF_FAIR = 0.75  # of the part with which a rank would be done when all others are: speeds may change
UNDER_WAY = 0.1  # of a piece is still to be done, where a rank should be through with it
LOOKED_AT = 16  # other ranks that one looks at

Piece = tuple[int, slice]  # an owner, and some of its rows that one rank works on


@dataclass(frozen=True)
class Seen:
    """Of a rank: its speed, that of who looks being 1; cost of its rows that nobody has taken, and of what it is working on."""

    speed: float
    left: float
    rest: float


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

    def next(self, taken: int, cost: float) -> int:
        """How many rows of about that cost come next, at least 1."""
        wanted = torch.tensor(self._before(taken) + cost, dtype=torch.float64)
        return max(1, int(torch.searchsorted(self.cost_n, wanted, right=True)) - taken)

    def _before(self, taken: int) -> float:
        return float(self.cost_n[taken - 1]) if taken else 0.0


def all_taken(rows: Tensor, shares: Shares | None, name: str) -> bool:
    """Whether all rows of a `Handout` of that name have been taken, where sets are apart: then nothing need be put in order
    for it."""
    assert shares is not None and shares.ranks.store is not None
    owned = torch.bincount(shares.owner_B, minlength=shares.ranks.size).tolist()
    if all(one.gone >= owned[rank] for rank, one in shares.board.read(range(len(owned))).items()):
        return True  # and so are those of all other sets: one question to the store
    store, counts = shares.ranks.store, torch.bincount(shares.owner_B[rows], minlength=shares.ranks.size).tolist()
    return all(store.add(f"taken/{rank}/{name}", 0) >= count for rank, count in enumerate(counts) if count)


class Handout:
    """Rows of every owner, to be given out in blocks. Made by all ranks alike. clock: seconds."""

    def __init__(
        self, rows: Tensor, shares: Shares, samples_B: Tensor, clock: Callable[[], float] = time.perf_counter,
        name: str | None = None, helps: bool = True, order: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """rows: of the table; order: brings those of an owner into the order in which they are to be worked on, if it is not that
        of `rows` (those that it read at the start come first in any case: the others' images may not be there yet); samples_B:
        of all rows of the table, as `Shares` counts them. name: of the counters, "number of the expectation.set", where ranks
        come here in different order, or a rank comes more than once; helps: others, when its own are done."""
        self.shares, self.ranks, self.clock, self.helps = shares, shares.ranks, clock, helps
        self.number = str(next(shares.ranks.sequence)) if name is None else name
        self._random = Random(self.ranks.rank)
        self._owned = torch.bincount(shares.owner_B, minlength=self.ranks.size).tolist()
        self.ranks.work.owned, self._board = self._owned[self.ranks.rank], shares.board
        self._row_n, self._owner_n, self._samples_B, self._order = rows, shares.owner_B[rows], samples_B, order
        self._counts = torch.bincount(self._owner_n, minlength=self.ranks.size).tolist()
        self._lines: dict[int, Line] = {}
        self._begun, self._own_left = False, self._counts[self.ranks.rank] > 0  # whether this rank took any; left some of its own
        self._largest = 0  # rows of a block as large as memory lets it be

    def line(self, rank: int) -> Line:
        """The rows of an owner; others' are not looked at before one thinks of helping them."""
        if rank not in self._lines:
            row_n = self._row_n[self._owner_n == rank]
            row_n = row_n if self._order is None else self._order(row_n)
            moved_n = self.shares.owner_B[row_n] != self.shares.home_B[row_n]
            if bool(moved_n.any()):
                row_n = row_n[torch.argsort(moved_n.long(), stable=True)]
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
            line, begin, waited = self.line(owner), self.clock(), self.shares.waited
            yield line.row_n[part]
            samples = float(line.samples_n[part].sum())
            self._board.ends(self._cost((owner, part), first=place == 0), self.clock)
            rows, waited = len(line.row_n[part]), self.shares.waited - waited  # for images: says nothing of this rank's speed
            seconds = self.clock() - begin - waited
            self.shares.worked(Block(rows, samples, seconds, first=place == 0))
            self.ranks.work.add(rows, owner == self.ranks.rank, seconds, waited)

    def best(self, size: int) -> int:
        """Rows of a block, at most `size`: the more, the fewer fixed costs, and the longer others wait for a last one.

        n / size blocks of `FIXED` and half a block of waiting are least at sqrt(2 n fixed); half of that is waited for where
        speeds are known. Blocks of a rank are alike.
        """
        rows, waits = max(1, *self._counts), 0.5 if self.shares.pace.known else 1
        wanted = (2 * rows * self._fixed(size) / waits) ** 0.5
        return math.ceil(rows / max(math.ceil(rows / size), round(rows / wanted)))

    def _pieces(self, size: int, announce: Callable[[Tensor], None] | None) -> Iterator[Piece]:
        """This rank's own rows, then those of others, of which a piece is taken ahead."""
        piece = self._own_piece(size)
        piece = self._stolen(size, announce, self._beginning(size)) if piece is None else piece
        while piece is not None:
            ahead = None if self._own_left else self._stolen(size, announce, self._cost(piece), True)
            yield piece
            piece = ahead or self._own_piece(size) or self._stolen(size, announce)

    def _beginning(self, size: int) -> float:
        """What it costs to help in a set of which this rank has nothing: references and slices are made first. A block, if that
        is not known."""
        if self._counts[self.ranks.rank] or self.shares.half_B is None:
            return 0.0
        return self.shares.pace.start if self.shares.pace.known else size * self.shares.pace.mean_row

    def _own_piece(self, size: int) -> Piece | None:
        """A block; less, if others would be done long before this rank's own rows are."""
        me = self.ranks.rank
        taken = self._taken_of(me, 0)
        if (left := self.line(me).left(taken)) == 0:
            self._own_left = False  # others may have taken the last ones
            return None
        seen, own = self._seen(left)
        seen = {rank: one for rank, one in seen.items() if one.left or one.rest}  # others have gone
        fixed = self._fixed(size) * self.shares.pace.mean_row
        fair = self._until_all_are_done(seen, own + fixed) - fixed
        if own - fair > LITTLE * (self._board.done + own):
            return self._take(me, self._of_fair(fair, size), size, taken)
        return self._take(me, math.inf, size, taken)

    def _stolen(
        self, size: int, announce: Callable[[Tensor], None] | None, busy: float = 0.0, ahead: bool = False
    ) -> Piece | None:  # fmt: skip
        """Some rows of the rank that would be busy longest, so that both, or all ranks, would be done at once.

        busy: cost of what this rank has to do before; ahead: others might come sooner."""
        while self.helps:
            seen, own = self._seen()
            left_R = {rank: self._left(rank) for rank, one in seen.items() if self._counts[rank] and one.left}
            ends_R = {rank: (left + seen[rank].rest) / seen[rank].speed for rank, left in left_R.items() if left}
            if not ends_R:
                return None
            slowest = max(ends_R, key=lambda rank: ends_R[rank])
            wanted = self._of_slowest(slowest, left_R[slowest], seen, own, busy, ahead, size)
            if wanted is None:
                return None
            piece = self._take(slowest, wanted, size)
            if piece is not None:
                if announce is not None:
                    announce(self.line(slowest).row_n[piece[1]])
                return piece
        return None

    def _of_slowest(
        self, rank: int, left: float, seen: dict[int, Seen], own: float, busy: float, ahead: bool, size: int
    ) -> float | None:  # fmt: skip
        """How much to take of what a rank has left of this set; None: it is soon done, or before help would come. own: left of
        this rank's rows."""
        row, one = self.shares.pace.mean_row, seen[rank]
        fixed, least = self._fixed(size) * row, min(left, self._least(size) * row)
        begun, sure = busy + fixed, 1.0 if self._owned[self.ranks.rank] else SURE
        alone, both = (one.rest + left + fixed) / one.speed, (one.rest + left + fixed + begun) / (1 + one.speed)
        together = self._until_all_are_done(seen, own + begun) - begun  # others may help it, too
        little = LITTLE * (self._board.done + busy)
        if alone - busy < little or sure * (begun + least) > alone or (ahead and together < least):
            return None
        fair = left if begun + left < both else both - begun
        return self._of_fair(max(least, min(fair, together)), size)

    def _of_fair(self, fair: float, size: int) -> float:
        """What to take of a part with which all would be done at once: all of it only where the rest would be small."""
        return TAKEN_OF_FAIR * fair if (1 - TAKEN_OF_FAIR) * fair > self._least(size) * self.shares.pace.mean_row else fair

    def _some_others(self) -> list[int]:
        """All other ranks; of many some, drawn anew."""
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        return others if len(others) <= LOOKED_AT else self._random.sample(others, LOOKED_AT)

    def _until_all_are_done(self, seen: dict[int, Seen], own: float) -> float:
        """What this rank can do until it and those it has seen are done with all that they have left, if they share it. own: what
        it has itself, or is busy with."""
        left = own + sum(one.left + one.rest for one in seen.values())
        return left / (1 + sum(one.speed for one in seen.values()))

    def _seen(self, left: float = 0.0) -> tuple[dict[int, Seen], float]:
        """(how other ranks stand, cost of what is left of this one's rows: of those of this set, `left`). A rank's speed is what
        it has done in its time, relative to this one; where either has done nothing yet, that of the iterations before."""
        pace, found, me = self.shares.pace, dict[int, Seen](), self.ranks.rank
        read = self._board.read([me, *self._some_others()])
        own_left = left if self.shares.half_B is None else self._left_of(me, read[me].gone)
        now, mine = self._board.elapsed(self.clock), self._board.done
        own = mine / now if mine and now else float(pace.speed_R[me])  # cost a second
        for rank, one in read.items():
            if rank == me:
                continue
            left, under_way = self._left_of(rank, one.gone), one.begun - one.done
            usual = own * float(pace.speed_R[rank] / pace.speed_R[me])
            rate = one.done / one.since if one.done and one.since and mine else usual
            through = min(rate * max(now - one.since, 0.0), (1 - UNDER_WAY) * under_way)
            if under_way and now and mine:
                rate = min(rate, one.begun / now)  # it should have been through, but is not
            elif not left:
                rate = usual  # one without work is as quick as ever
            found[rank] = Seen(rate / own, left, under_way - through)
        return found, own_left

    def _left_of(self, rank: int, gone: int) -> float:
        """Cost of an owner's rows that nobody has taken: of this set, or, where ranks have sets apart, of all."""
        owned = self._owned[rank]
        if self.shares.half_B is None:  # without a look at their rows, which would have to be put in order
            owned, gone = self._counts[rank], self._taken_of(rank, 0) if self._counts[rank] else 0
        return max(0, owned - gone) * self.shares.pace.mean_row

    def _cost(self, piece: Piece, first: bool = False) -> float:
        """Of a piece's rows, and of the block that they are. first: of the set."""
        pace = self.shares.pace
        return self._cost_of_rows(piece) + self._fixed(self._largest) * pace.mean_row + first * pace.start

    def _cost_of_rows(self, piece: Piece) -> float:
        line, part = self.line(piece[0]), piece[1]
        return line.left(part.start) - line.left(part.stop)

    def _least(self, size: int) -> int:
        """Rows of the smallest piece."""
        return max(1, min(size, int(self._fixed(size) / MOST_FIXED)))

    def _fixed(self, size: int) -> float:
        """Rows that take as long as what a block takes beside its rows; size: of the first blocks that were thought of."""
        self._largest = self._largest or min(size, max(1, *self._counts))
        return FIXED * self._largest

    def _take(self, rank: int, cost: float, size: int, taken: int | None = None) -> Piece | None:
        """The next rows of an owner of about that cost, if any are left. taken: how many were a moment ago, if known."""
        line, least, own = self.line(rank), self._least(size), rank == self.ranks.rank
        taken = self._taken_of(rank, 0) if taken is None else taken
        if taken >= len(line.row_n):  # the last ones went since this rank looked; counters go beyond the number of rows
            return None
        wanted = min(size, max(least, line.next(taken, cost)))
        if len(line.row_n) - taken - wanted < (least if own else least / 2):  # nobody would help with that
            wanted = max(wanted, min(size, len(line.row_n) - taken))
        last = self._taken_of(rank, wanted)
        first, last = last - wanted, min(last, len(line.row_n))
        if own:
            self._own_left = last < len(line.row_n)
        if first >= last:
            return None
        piece = rank, slice(first, last)
        self._board.begins(self._cost(piece, first=not self._begun), self.clock, last - first if own else 0)
        self._begun = True
        if self.shares.half_B is not None and not own:
            self._board.helps(rank, last - first)
        return piece

    def _left(self, rank: int) -> float:
        return self.line(rank).left(self._taken_of(rank, 0))

    def _taken_of(self, rank: int, more: int) -> int:
        """How many rows of an owner are taken, with `more` that are taken now."""
        assert self.ranks.store is not None
        return self.ranks.store.add(f"taken/{rank}/{self.number}", more)
