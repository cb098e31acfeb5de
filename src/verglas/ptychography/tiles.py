"""Tiles of the object, one for each rank: who owns which positions and pixels, who keeps which, and how it is chosen.

The positions are cut in two again and again, across their longer side, into groups of equal count: any number of ranks works.
The same cuts, through the middle of the windows, divide the object into **cells**: each pixel is in one cell, of the rank that
counts it in sums over the object. What a rank keeps is a **box**: its cell, all pixels that its positions see, and a margin.
Where boxes overlap all of their ranks hold the same values.

Axes: B positions, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.ptychography.costs import Costs

TOUCHED = 30  # times that a pass reads or writes an array of the object's size
NUMBER = 8  # bytes of a complex number


@dataclass(frozen=True)
class Box:
    """Pixels [top, bottom) x [left, right) of the whole object."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.bottom - self.top, self.right - self.left

    @property
    def pixels(self) -> int:
        """How many."""
        return self.shape[0] * self.shape[1]

    def meet(self, other: Box) -> Box | None:
        """The pixels of both; None if there are none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        both = Box(top, left, min(self.bottom, other.bottom), min(self.right, other.right))
        return both if min(both.shape) > 0 else None

    def around(self, other: Box) -> Box:
        """The smallest box that holds both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        return Box(top, left, max(self.bottom, other.bottom), max(self.right, other.right))

    def grown(self, before: int, after: int) -> Box:
        """More pixels above and to the left, below and to the right."""
        return Box(self.top - before, self.left - before, self.bottom + after, self.right + after)

    def inside(self, outer: Box) -> tuple[slice, slice]:
        """Where it lies in an array of `outer`."""
        top, left = self.top - outer.top, self.left - outer.left
        return slice(top, top + self.shape[0]), slice(left, left + self.shape[1])


@dataclass(frozen=True)
class Tile:
    """Of one rank. rows_B: its positions; cell: pixels that it counts; box: those that it keeps."""

    rows_B: Tensor
    cell: Box
    box: Box


def bisected(position_B2: Tensor, count: int, area: Box, half_window: tuple[float, float] = (0, 0)) -> list[tuple[Tensor, Box]]:
    """`count` groups of neighbours of about equal size, and what they get of `area`: cut across the longer side again and again.

    half_window: px from a position to the middle of what it sees.
    """

    def divided(rows_B: Tensor, parts: int, own: Box) -> list[tuple[Tensor, Box]]:
        if parts == 1:
            return [(rows_B, own)]
        position = position_B2[rows_B]
        axis = int((position.max(0).values - position.min(0).values).argmax())
        order = rows_B[position[:, axis].argsort(stable=True)]
        cut = round(len(order) * (parts // 2) / parts)
        middle = float(position_B2[order[max(cut - 1, 0) : cut + 1], axis].mean()) + half_window[axis]
        first, second = halved(own, axis, round(middle))
        return divided(order[:cut], parts // 2, first) + divided(order[cut:], parts - parts // 2, second)

    return divided(torch.arange(len(position_B2)), count, area)


def halved(box: Box, axis: int, at: int) -> tuple[Box, Box]:
    """Both sides of a cut through rows (axis 0) or columns before pixel `at`, as far as it lies in the box."""
    if axis == 0:
        at = min(max(at, box.top), box.bottom)
        return Box(box.top, box.left, at, box.right), Box(at, box.left, box.bottom, box.right)
    at = min(max(at, box.left), box.right)
    return Box(box.top, box.left, box.bottom, at), Box(box.top, at, box.bottom, box.right)


def seen_by(position_B2: Tensor, window: tuple[int, int], margin: int, shape: tuple[int, int]) -> Box:
    """All pixels that windows at these positions cover, and `margin` more, as far as the object reaches."""
    low_2, high_2 = position_B2.min(0).values.floor().int().tolist(), position_B2.max(0).values.ceil().int().tolist()
    box = Box(low_2[0], low_2[1], high_2[0] + window[0], high_2[1] + window[1]).grown(margin, margin)
    return Box(max(box.top, 0), max(box.left, 0), min(box.bottom, shape[0]), min(box.right, shape[1]))


def tiles_of(position_B2: Tensor, window: tuple[int, int], shape: tuple[int, int], count: int, margin: int) -> list[Tile]:
    """Tiles of `count` ranks. position_B2: in pixels of the object of `shape`. InputError for fewer positions than ranks."""
    if len(position_B2) < count:
        found = f"{len(position_B2)} positions for {count} processes"
        raise InputError("ptycho reconstruct", found, "no more processes than positions")
    whole = Box(0, 0, *shape)
    groups = bisected(position_B2, count, whole, (window[0] / 2, window[1] / 2))
    return [Tile(rows_B.sort().values, cell, box_of(cell, position_B2[rows_B], window, margin, shape)) for rows_B, cell in groups]


def box_of(cell: Box, position_B2: Tensor, window: tuple[int, int], margin: int, shape: tuple[int, int]) -> Box:
    """What the rank of this cell and these positions keeps: also the next row and column, for differences of neighbours."""
    following = cell.grown(0, 1).meet(Box(0, 0, *shape)) or cell
    return following.around(seen_by(position_B2, window, margin, shape))


def chosen(tiles: list[Tile], shape: tuple[int, int], planes: int, costs: Costs) -> tuple[list[Tile], str]:
    """The tiles, or the whole object on every rank, whichever a pass takes less time with; and a sentence that tells why.

    planes: modes times slices of the object; costs: as measured. Tiles send what their boxes share with others', the whole
    object goes through an all-reduce, and each rank works through what it keeps.
    """
    whole = Box(0, 0, *shape)
    sent = max(shared_pixels(tiles, rank) for rank in range(len(tiles)))
    kept = max(tile.box.pixels for tile in tiles)
    ring = 2 * whole.pixels * (len(tiles) - 1) // len(tiles)
    seconds = [seconds_of(pixels * planes, own * planes, costs) for pixels, own in ((sent, kept), (ring, whole.pixels))]
    tiles_ms, whole_ms = (1e3 * one for one in seconds)
    about = f"exchange and steps of a pass should take {tiles_ms:.2g} ms with tiles, {whole_ms:.2g} ms with whole objects"
    about = f"{about} ({costs.text})"
    size = f"{shape[0]:,} x {shape[1]:,} px"
    if seconds[1] <= seconds[0]:
        return [Tile(tile.rows_B, tile.cell, whole) for tile in tiles], f"each rank keeps the whole object of {size}: {about}"
    share = 100 * kept / whole.pixels
    return tiles, f"each rank keeps a tile of at most {share:.0f} % of the object of {size}: {about}"


def shared_pixels(tiles: Sequence[Tile], rank: int) -> int:
    """Pixels that a rank sends to all others."""
    own = tiles[rank].box
    meetings = [own.meet(tile.box) for number, tile in enumerate(tiles) if number != rank]
    return sum(one.pixels for one in meetings if one is not None)


def seconds_of(sent: int, kept: int, costs: Costs) -> float:
    """Of a pass: one exchange of so many numbers, and steps of an object of so many."""
    return costs.start + NUMBER * (sent * costs.link + TOUCHED * kept * costs.memory)
