"""Sums over positions that travel to other ranks while further positions are worked on.

Positions at the border of a tile come first: what they, and only they, add to the object is shared. Then it is on its way, behind
the positions inside. Switched off by VERGLAS_OVERLAP=0 (verglas.distributed.ways): then all is sent at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from verglas.ptychography.share import Share
from verglas.ptychography.unknowns import Unknowns

Chunks = Callable[[Tensor], Iterator[Tensor]]


class Summing:
    """Of a gradient and a curvature, in place. complete: the curvature of the object is, from the start; early: what is sent may
    travel while others are worked on (not worth it for the few positions of a mini-batch)."""

    def __init__(self, share: Share, gradient: Unknowns, curvature: Unknowns, complete: bool, early: bool) -> None:
        self.share, self.waiting = share, {"curvature": curvature, "gradient": gradient}
        self.both = gradient, curvature
        self._arriving: list[Callable[[], None]] = []
        self._early = early and not share.alone and share.ranks.ways.overlap and not share.halo.is_whole
        if self._early and complete:
            self._send("curvature")

    def _send(self, *names: str) -> None:
        for name in names:
            object_OLYX = self.waiting.pop(name).object_OLYX
            if object_OLYX is not None:
                self._arriving.append(self.share.halo.sending(object_OLYX, name))

    def in_turn(self, rows_B: Tensor, position_B2: Tensor, chunks: Chunks) -> Iterator[Tensor]:
        """The rows in chunks, those of the border first; what these added to the object's sums is sent before the others."""
        if not self._early:
            yield from chunks(rows_B)
            return
        border_B = self.share.halo.reaches(position_B2[rows_B], self.share.window)
        yield from chunks(rows_B[border_B])
        self._send(*self.waiting)
        yield from chunks(rows_B[~border_B])

    def finish(self, totals_N: Tensor) -> Tensor:
        """Sums over all ranks are in place; `totals_N` is added up, too, and returned."""
        if self.share.alone:
            return totals_N
        self._send(*self.waiting)
        for arrive in self._arriving:
            arrive()
        return self.share.add_up_small(*self.both, more=totals_N)
