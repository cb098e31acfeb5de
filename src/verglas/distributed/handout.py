"""Who works on which rows: each rank on its own first, then whoever is done helps the one that has most left.

The rows of an owner are a line; a counter in the ranks' common store says how many of them were taken. Taking the next few is
one addition to it, so that no row is taken twice and nobody waits. What is added up does not depend on who worked on what.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.distributed.ranks import Ranks

SMALLEST = 0.25  # of a block: no smaller pieces are taken, their fixed costs would be felt
KEPT_BACK = 2.0  # blocks from an owner's last ones on it takes half of what is left, so that others can help


def owners(order_B: Tensor, set_B: Tensor, size: int) -> Tensor:
    """Which rank reads and keeps which row [B]: equal shares of every set of rows, each a run of the order of the files.

    order_B: rows in that order; set_B: number of each row's set (half-set), so that all ranks have as much to do in each.
    """
    owner_B = torch.zeros(len(order_B), dtype=torch.int64)
    for number in set_B.unique():
        mine = order_B[set_B[order_B] == number]
        owner_B[mine] = torch.arange(len(mine)) * size // max(1, len(mine))
    return owner_B


@dataclass(frozen=True)
class Handout:
    """Rows of every owner, to be given out in blocks. Made by all ranks alike: number names the counters."""

    rows_of_rank: list[Tensor]
    ranks: Ranks
    number: int

    @classmethod
    def of(cls, rows: Tensor, owner_B: Tensor | None, ranks: Ranks) -> Handout:
        """Of rows in the order in which they are to be worked on. owner_B: of all rows of the table; None: this rank's."""
        if ranks.size == 1 or owner_B is None:
            return cls([rows], ranks, 0)
        owner_n = owner_B[rows]
        return cls([rows[owner_n == rank] for rank in range(ranks.size)], ranks, next(ranks.sequence))

    def own(self) -> Tensor:
        """The rows that this rank begins with."""
        return self.rows_of_rank[self.ranks.rank if len(self.rows_of_rank) > 1 else 0]

    def blocks(self, size: int) -> Iterator[Tensor]:
        """Blocks of at most `size` rows until nobody has any left; the rows of a block have one owner."""
        if len(self.rows_of_rank) == 1:
            yield from self.rows_of_rank[0].split(size)
            return
        me, least = self.ranks.rank, max(1, int(SMALLEST * size))
        while (left := self._left(me)) > 0:
            yield from self._take(me, size if left > KEPT_BACK * size else min(size, max(least, -(-left // 2))))
        while True:
            left_R = [self._left(rank) for rank in range(self.ranks.size)]
            slowest = max(range(self.ranks.size), key=left_R.__getitem__)
            if left_R[slowest] <= least:  # its owner has taken the next piece before help would come
                return
            yield from self._take(slowest, min(size, max(least, left_R[slowest] // 2)))

    def _key(self, rank: int) -> str:
        return f"taken/{self.number}/{rank}"

    def _left(self, rank: int) -> int:
        assert self.ranks.store is not None
        return len(self.rows_of_rank[rank]) - self.ranks.store.add(self._key(rank), 0)

    def _take(self, rank: int, wanted: int) -> Iterator[Tensor]:
        """The next rows of an owner, if any are left."""
        assert self.ranks.store is not None
        last = self.ranks.store.add(self._key(rank), wanted)
        block = self.rows_of_rank[rank][last - wanted : last]
        if len(block):
            yield block
