"""A grid that ranks share: from planes of its slowest axis to rows of the next one and back, each piece behind computing.

An FFT of such a grid is: transform the planes, turn, transform the lines along the slowest axis, which each rank has whole then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from verglas.distributed.ranks import Ranks

T = TypeVar("T")
PIECES = 4  # of what travels; one travels while another one is computed


@dataclass(frozen=True)
class Turn:
    """Who has what of arrays [B, Z, Y, ...]: rank q the planes first[q] .. first[q] + count[q] - 1, or the rows ends[q] ..
    ends[q + 1] - 1 of all planes. Planes of ranks may overlap and go around the end of Z: turned to rows their sum is taken,
    turned to planes all have them. Turning to planes is the transpose of turning to rows.

    One turn of complex numbers of b bytes: a rank sends (R - 1) / R B b times its planes and Y ... (to rows), or times its rows,
    the planes of all ranks and ... (to planes).
    """

    planes: int
    first: tuple[int, ...]
    count: tuple[int, ...]
    ends: tuple[int, ...]
    ranks: Ranks

    @property
    def mine(self) -> slice:
        """This rank's rows."""
        return slice(self.ends[self.ranks.rank], self.ends[self.ranks.rank + 1])

    def to_rows(self, made: Callable[[slice], Tensor], name: str) -> Tensor:
        """Rows [B, Z, y, ...] of this rank. made(part): a part of its own planes, complex [B, z, Y, ...], asked for once each."""
        widths = [high - low for low, high in pairwise(self.ends)]
        out: Tensor | None = None

        def begin(piece: int) -> Callable[[], list[Tensor]]:
            nonlocal out
            planes = made(self._part(self.ranks.rank, piece))
            batch, rest = len(planes), planes.shape[3:]
            if out is None:
                out = planes.new_zeros(batch, self.planes, widths[self.ranks.rank], *rest)
            shapes = [(batch, self._part_size(q, piece), widths[self.ranks.rank], *rest, 2) for q in range(self.ranks.size)]
            sent = [torch.view_as_real(one.contiguous()) for one in planes.split(widths, 2)]
            return self.ranks.exchanging(sent, shapes, name)

        for piece, found in enumerate(ahead(begin, PIECES, self.ranks)):
            for rank, part in enumerate(found):
                assert out is not None
                out.index_add_(1, self._planes_of(rank, piece, part.device), torch.view_as_complex(part))
        assert out is not None
        return out

    def to_planes(self, rows: Tensor, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Parts of this rank's planes, with what they hold [B, z, Y, ...]; rows: complex [B, Z, y, ...]."""
        batch, rest = len(rows), rows.shape[3:]

        def begin(piece: int) -> Callable[[], list[Tensor]]:
            mine = self._part_size(self.ranks.rank, piece)
            shapes = [(batch, mine, high - low, *rest, 2) for low, high in pairwise(self.ends)]
            of_rank = [rows[:, self._planes_of(rank, piece, rows.device)] for rank in range(self.ranks.size)]
            return self.ranks.exchanging([torch.view_as_real(part) for part in of_rank], shapes, name)

        for piece, found in enumerate(ahead(begin, PIECES, self.ranks)):
            yield self._part(self.ranks.rank, piece), torch.cat([torch.view_as_complex(part) for part in found], 2)

    def _part(self, rank: int, piece: int) -> slice:
        count = self.count[rank]
        return slice(count * piece // PIECES, count * (piece + 1) // PIECES)

    def _part_size(self, rank: int, piece: int) -> int:
        part = self._part(rank, piece)
        return part.stop - part.start

    def _planes_of(self, rank: int, piece: int, device: torch.device) -> Tensor:
        part = self._part(rank, piece)
        return (torch.arange(part.start, part.stop, device=device) + self.first[rank]) % self.planes


def ahead(begin: Callable[[int], Callable[[], T]], pieces: int, ranks: Ranks) -> Iterator[T]:
    """What begin(0), begin(1), ... return when called; each piece is begun before the one before it is waited for, unless nothing
    is to travel behind computing (`Ways.overlap`).

    All ranks begin the same pieces in the same order, so whatever one waits for the others have begun before they wait.
    """
    if ranks.ways.overlap is False:
        for piece in range(pieces):
            yield begin(piece)()
        return
    finish = begin(0)
    for piece in range(1, pieces):
        following = begin(piece)
        yield finish()
        finish = following
    yield finish()
