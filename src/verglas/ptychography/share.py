"""What one of several ranks keeps of a reconstruction, and sums over all of them.

A rank has its positions, with patterns, scales and the like, and the box of its tile of the object (`tiles.py`); probe,
background and changes of the probe are the same on all ranks. Gradients are added up where boxes overlap, so that every rank
makes the same step there. A reconstruction of one process has a `Share` that keeps everything and sends nothing.

Axes: B positions (of this rank, where not said otherwise), O L Y X those of the object, N anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from verglas.distributed.ranks import ALONE, Ranks
from verglas.ptychography.costs import Costs
from verglas.ptychography.halo import Halo
from verglas.ptychography.scan import Scan
from verglas.ptychography.tiles import Box, Tile, box_of, chosen, seen_by, tiles_of
from verglas.ptychography.unknowns import PER_POSITION, Unknowns

MOVING_HALO = 24  # px about what a tile's positions see, where these are corrected
HALO = 2  # px, for fractions of a pixel
OBJECT = "object_OLYX"


@dataclass(frozen=True)
class Share:
    """tiles: of all ranks; shape: (Y, X) of the whole object; window: (Y, X) px; reason: why it is shared so."""

    ranks: Ranks
    tiles: list[Tile]
    shape: tuple[int, int]
    window: tuple[int, int]
    positions: int
    whole_pixels: bool
    reason: str = ""

    @classmethod
    def of(
        cls, ranks: Ranks, position_B2: Tensor, window: tuple[int, int], shape: tuple[int, int], costs: Costs, planes: int = 1,
        moving: bool = False,
    ) -> Share:  # fmt: skip
        """position_B2: of all, float64 on the CPU, in pixels of the object of `shape`; costs: of what ranks send; planes: modes
        times slices of the object; moving: positions will be corrected."""
        whole = bool((position_B2 == position_B2.round()).all())
        tiles = tiles_of(position_B2, window, shape, ranks.size, MOVING_HALO if moving else HALO)
        tiles, reason = chosen(tiles, shape, planes, costs)
        boxes = [tile.box for tile in tiles]
        halos = [Halo(replace(ranks, rank=rank), boxes, shape) for rank in range(ranks.size)]
        tiles = [replace(tile, rows_B=halo.border_first(tile.rows_B, position_B2, window)) for tile, halo in zip(tiles, halos)]
        return cls(ranks, tiles, shape, window, len(position_B2), whole, reason)

    @classmethod
    def of_one(cls, scan: Scan) -> Share:
        """Of a process alone, which keeps everything, whatever the size of the object."""
        whole = bool((scan.positions_B2 == scan.positions_B2.round()).all())
        return cls(ALONE, [], (0, 0), scan.window, len(scan), whole)

    @property
    def alone(self) -> bool:
        """Whether nothing is shared."""
        return self.ranks.size == 1

    @property
    def tile(self) -> Tile:
        """Of this rank."""
        return self.tiles[self.ranks.rank]

    @property
    def rows_B(self) -> Tensor:
        """Numbers of this rank's positions among all."""
        return self.tile.rows_B

    @cached_property
    def halo(self) -> Halo:
        """What travels between the boxes."""
        return Halo(self.ranks, [tile.box for tile in self.tiles], self.shape)

    # What this rank keeps

    def object_pixels(self, scan: Scan) -> int:
        """Of the object, of this rank; about, for a process alone."""
        if not self.alone:
            return self.tile.box.pixels
        span_2 = scan.positions_B2.max(0).values - scan.positions_B2.min(0).values
        return math.prod(int(span) + edge for span, edge in zip(span_2.tolist(), self.window, strict=True))

    def part(self, scan: Scan) -> Scan:
        """This rank's positions of the whole scan."""
        return scan if self.alone else scan.subset(self.rows_B)

    def cut(self, x: Unknowns) -> Unknowns:
        """What this rank keeps of unknowns of the whole."""
        return x if self.alone else Unknowns(**{name: self.cut_field(name, value) for name, value in x.items()})

    def cut_field(self, name: str, value: Tensor) -> Tensor:
        """The same of one field, also of an engine's memory, whose names end in those of fields."""
        if self.alone:
            return value
        kind = name.rpartition(".")[2]
        if kind == OBJECT:
            rows, columns = self.tile.box.inside(Box(0, 0, *self.shape))
            return value[..., rows, columns].clone()
        if kind not in (*PER_POSITION, "exit"):
            return value
        value_B = value[self.rows_B.to(value.device)]
        return value_B - self.corner_2.to(value_B) if name == "positions_B2" else value_B

    def own_part(self, value_B: Tensor) -> Tensor:
        """This rank's rows of what there is one of for each position of all."""
        return value_B if self.alone else value_B[self.rows_B.to(value_B.device)]

    @property
    def corner_2(self) -> Tensor:
        """(row, column) of the box's first pixel in the whole object; positions of a rank count from there."""
        if self.alone:
            return torch.zeros(2, dtype=torch.float64)
        return torch.tensor([self.tile.box.top, self.tile.box.left], dtype=torch.float64)

    def own(self, rows_B: Tensor) -> Tensor:
        """Of numbers among all positions those that this rank has, as numbers among its own."""
        if self.alone:
            return rows_B
        number_B = torch.full((self.positions,), -1)
        number_B[self.rows_B] = torch.arange(len(self.rows_B))
        found_B = number_B[rows_B]
        return found_B[found_B >= 0]

    def limits(self, box: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Lowest and highest position [2] at which a window and a pixel more are on the object, counted from this rank's box;
        box: its shape."""
        shape = box if self.alone else self.shape
        high_2 = torch.tensor([n - edge - 1 for n, edge in zip(shape, self.window, strict=True)], dtype=torch.float64)
        return -self.corner_2, high_2 - self.corner_2

    @property
    def cell(self) -> tuple[slice, slice]:
        """Where the pixels that this rank counts lie in its box."""
        if self.alone:
            return slice(None), slice(None)
        return self.tile.cell.inside(self.tile.box)

    @property
    def cell_and_next(self) -> tuple[slice, slice]:
        """The same with the row and the column that follow, where the object goes on."""
        if self.alone:
            return slice(None), slice(None)
        following = self.tile.cell.grown(0, 1).meet(Box(0, 0, *self.shape)) or self.tile.cell
        return following.inside(self.tile.box)

    @property
    def next_2(self) -> tuple[int, int]:
        """How many rows and columns `cell_and_next` has beyond `cell`: 0 or 1."""
        if self.alone:
            return 0, 0
        return int(self.tile.cell.bottom < self.shape[0]), int(self.tile.cell.right < self.shape[1])

    # Sums over all ranks

    def total(self, *parts: Tensor) -> list[Tensor]:
        """Each of these real or complex arrays summed over all ranks, which have the same shapes; one message in float64."""
        if self.alone:
            return list(parts)
        planes = [torch.view_as_real(one) if one.is_complex() else one for one in parts]
        flat = torch.cat([one.double().flatten() for one in planes])
        flat = self.ranks.add_up(flat, "sums")
        found = []
        for plane, part, sum_N in zip(planes, parts, flat.split([one.numel() for one in planes]), strict=True):
            value = sum_N.view(plane.shape).to(plane.dtype)
            found.append(torch.view_as_complex(value.contiguous()) if part.is_complex() else value)
        return found

    def sum_of(self, value: float) -> float:
        """A number summed over all ranks."""
        return value if self.alone else self.sums_of([value])[0]

    def sums_of(self, values: Sequence[float]) -> list[float]:
        """Numbers, each summed over all ranks."""
        if self.alone:
            return list(values)
        return self.ranks.add_up(torch.tensor(values, dtype=torch.float64), "numbers").tolist()  # type: ignore[no-any-return]

    def greatest(self, name: str, value: Tensor) -> Tensor:
        """The greatest number of a field, over all ranks."""
        most = value.amax()
        divided = not self.alone and (name == OBJECT or name in PER_POSITION)
        return self.ranks.greatest(most, "maxima") if divided else most

    def counted(self, x: Unknowns) -> Unknowns:
        """The part of x that this rank counts, so that everything is counted once."""
        if self.alone:
            return x
        fields = {name: one if self.ranks.is_lead or name in PER_POSITION else one[:0] for name, one in x.items()}
        if x.object_OLYX is not None:
            fields[OBJECT] = x.object_OLYX[(..., *self.cell)]
        return Unknowns(**fields)

    def dots(self, *pairs: tuple[Unknowns, Unknowns]) -> list[float]:
        """Re sum conj(a) b over the fields of both, of all ranks, for every pair; in one message."""
        own = torch.stack([self.counted(a).product(self.counted(b)) for a, b in pairs])
        return self.total(own)[0].tolist()  # type: ignore[no-any-return]

    def everyones(self, value_B: Tensor) -> Tensor:
        """One row for each position, of all positions in their order."""
        if self.alone:
            return value_B
        order_B = torch.cat([tile.rows_B for tile in self.tiles]).to(value_B.device)
        found_B = value_B.new_empty(self.positions, *value_B.shape[1:])
        found_B[order_B] = self.ranks.gathered(value_B, "positions")
        return found_B

    def add_up(self, *several: Unknowns) -> None:
        """Sums over all ranks, in place, of what each has added up over its positions; fields of single positions stay."""
        if self.alone:
            return
        for x in several:
            if x.object_OLYX is not None:
                self.halo.sending(x.object_OLYX, "object")()
        if same := self._same(several):
            for one, total in zip(same, self.total(*same), strict=True):
                one.copy_(total)

    def add_up_small(self, *several: Unknowns, more: Tensor) -> Tensor:
        """The same of all but the object; `more` is added up along with them and returned."""
        same = self._same(several)
        *found, more = self.total(*same, more)
        for one, total in zip(same, found, strict=True):
            one.copy_(total)
        return more

    def _same(self, several: Sequence[Unknowns]) -> list[Tensor]:
        """Fields that are the same on all ranks."""
        return [one for x in several for name, one in x.items() if name != OBJECT and name not in PER_POSITION]

    # Positions that have moved

    def holds(self, position_B2: Tensor, reach: int) -> bool:
        """Whether every rank keeps what its positions, and such up to `reach` px about them, see."""
        if self.alone:
            return True
        box = seen_by(position_B2.cpu() + self.corner_2, self.window, reach, self.shape)
        return all(self.ranks.everyones(self.tile.box.around(box) == self.tile.box, "tiles"))

    def following(self, position_B2: Tensor) -> Share:
        """The same positions and cells, with boxes about where the positions are now."""
        here_B2 = position_B2.cpu() + self.corner_2
        boxes = self.ranks.everyones(box_of(self.tile.cell, here_B2, self.window, MOVING_HALO, self.shape), "tiles")
        tiles = [Tile(tile.rows_B, tile.cell, box) for tile, box in zip(self.tiles, boxes, strict=True)]
        return Share(self.ranks, tiles, self.shape, self.window, self.positions, self.whole_pixels, self.reason)

    def moved(self, name: str, value: Tensor, to: Share) -> Tensor:
        """A field of this share as one of another share of the same positions and cells."""
        if name == "positions_B2":
            return value + (self.corner_2 - to.corner_2).to(value)
        return self.halo.moved(value, self.tiles, to.tile.box, [one.box for one in to.tiles]) if name.endswith(OBJECT) else value
