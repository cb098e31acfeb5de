"""What travels between the boxes of several ranks: sums over all that keep a pixel, and an object cut in another way.

Axes: N anything, Y X pixels of a rank's box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from verglas.distributed.ranks import Ranks
from verglas.ptychography.tiles import Box, Tile


class Halo:
    """boxes: of all ranks; shape: (Y, X) of the whole object. Where every box is the whole object, sums go through an all-reduce,
    else each rank sends to each other what both keep."""

    def __init__(self, ranks: Ranks, boxes: Sequence[Box], shape: tuple[int, int]) -> None:
        self.ranks, self.boxes = ranks, boxes
        self.own = boxes[ranks.rank]
        self.is_whole = all(box.shape == shape for box in boxes)
        self.shared = [None if rank == ranks.rank else self.own.meet(box) for rank, box in enumerate(boxes)]
        self._first: list[Tensor | None] = []  # [Y, X, 1] of each of these, where none of those before it is

    def reaches(self, corner_B2: Tensor, window: tuple[int, int]) -> Tensor:
        """[B] whether windows at these positions (px of the own box), or fractions of a pixel beside, show pixels of others."""
        found_B = torch.full((len(corner_B2),), self.is_whole, device=corner_B2.device)
        for box in self.shared:
            if box is not None:
                rows, columns = box.inside(self.own)
                row_B, column_B = corner_B2.unbind(1)
                above_B = (row_B + window[0] + 1 > rows.start) & (row_B - 1 < rows.stop)
                found_B |= above_B & (column_B + window[1] + 1 > columns.start) & (column_B - 1 < columns.stop)
        return found_B

    def border_first(self, rows_B: Tensor, position_B2: Tensor, window: tuple[int, int]) -> Tensor:
        """Rows of this rank, those that reach pixels of others first: what is worked on together then lies together.

        position_B2: of all, in pixels of the whole object.
        """
        corner_2 = torch.tensor([self.own.top, self.own.left], dtype=position_B2.dtype)
        border_B = self.reaches(position_B2[rows_B] - corner_2, window)
        return torch.cat([rows_B[border_B], rows_B[~border_B]])

    def sending(self, value_NYX: Tensor, name: str) -> Callable[[], None]:
        """Send what this rank has added up in shared pixels. What is returned waits for the others' and adds it, in place; until
        then only pixels that no other rank keeps may change. All ranks get the same bits: they add in the order of the ranks."""
        plane = torch.view_as_real(value_NYX) if value_NYX.is_complex() else value_NYX[..., None]
        if self.is_whole:
            return lambda: self._reduced(plane, name)
        parts = [self._part(plane, box) for box in self.shared]
        finish = self.ranks.exchanging(parts, [tuple(part.shape) for part in parts], name)

        def add() -> None:
            found = finish()
            own = [self._part(plane, box).clone() for box in self.shared]
            for box in self.shared:
                self._part(plane, box).zero_()
            for rank, (box, part) in enumerate(zip(self.shared, found, strict=True)):
                if rank == self.ranks.rank:
                    for one, mine, first in zip(self.shared, own, self._first_of(plane.device), strict=True):
                        self._part(plane, one).add_(mine if first is None else mine * first)
                elif box is not None:
                    self._part(plane, box).add_(part)

        return add

    def _first_of(self, device: torch.device) -> list[Tensor | None]:
        """Where each shared box is the first one of a pixel, so that this rank's own sums are added there once."""
        if not self._first:
            seen = torch.zeros(*self.own.shape, 1, dtype=torch.bool, device=device)
            for box in self.shared:
                part = self._part(seen, box)
                self._first.append(~part if part.numel() else None)
                part.fill_(True)
        return self._first

    def _reduced(self, plane: Tensor, name: str) -> None:
        together = plane.contiguous()
        self.ranks.add_up(together, f"whole {name}")
        plane.copy_(together)

    def _part(self, plane: Tensor, box: Box | None) -> Tensor:
        """What lies in a box; nothing if there is none."""
        return plane.new_empty(0) if box is None else plane[(..., *box.inside(self.own), slice(None))]

    def moved(self, value_NYX: Tensor, tiles: Sequence[Tile], to: Box, boxes: Sequence[Box]) -> Tensor:
        """The object in another box, `to` of this rank, `boxes` of all: every pixel comes from the rank whose cell it is in."""
        plane = torch.view_as_real(value_NYX) if value_NYX.is_complex() else value_NYX[..., None]
        cell = tiles[self.ranks.rank].cell
        parts = [self._part(plane, cell.meet(box)) for box in boxes]
        meetings = [tile.cell.meet(to) for tile in tiles]
        lead, last = plane.shape[:-3], plane.shape[-1:]
        shapes = [(0,) if box is None else (*lead, *box.shape, *last) for box in meetings]
        found = plane.new_empty(*lead, *to.shape, *last)
        for box, part in zip(meetings, self.ranks.exchanged(parts, shapes, "tiles moved"), strict=True):
            if box is not None:
                found[(..., *box.inside(to), slice(None))] = part
        return torch.view_as_complex(found) if value_NYX.is_complex() else found[..., 0]
