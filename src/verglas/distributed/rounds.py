"""Ranks that answer one another's questions while each does its own work: in rounds, to which each comes when it needs something.

A rank asks for slices of a volume of which every rank has a layer (core/layers.py), or has slices added to such a one. Whatever
it asks, it begins a round, and so does every other rank when it next asks for something; who has no more work of its own comes to
rounds only to answer. So nobody has to know what the others are at, as long as all come to the end (`serve`).

In a round all tell what they ask (a few numbers, between the hosts), the orientations travel to all ranks, and then each sends
to each: the pixels of its layer for slices that were asked for, the pixels of the other's layer of slices to be added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from verglas.core.layers import Layers
from verglas.distributed.ranks import Ranks
from verglas.errors import VerglasError

BYTES_AT_ONCE = {"cpu": 2**25, "cuda": 2**27}  # of slices that a rank asks for in a round
OUT_OF_MEMORY = (
    "The device ran out of memory while ranks exchanged slices. Other programs may use it: free it, or give verglas less with "
    "--memory, and go on with --continue."
)
DONE, SLICES, ADD = range(3)
DTYPES = [torch.float16, torch.float32, torch.float64]


class Layered(Protocol):
    """What answers for the layer of this rank."""

    def slices_here(self, number: int, rotation_R33: Tensor, pixels: Pixels, out_R2K: Tensor) -> None:
        """Fill in slices of volume `number`: this rank's pixels."""

    def add_here(self, number: int, values_R3K: Tensor, rotation_R33: Tensor, pixels: Pixels) -> None:
        """Add (re, im, weight) of slices to sums `number`: this rank's pixels."""


@dataclass(frozen=True)
class Pixels:
    """A set of them. places: where those of each part are among all; coordinates [k, 3] of this rank's, and what slices are
    multiplied by there [k]."""

    places: list[slice | Tensor]
    coordinates_k3: Tensor
    factor_k: Tensor

    @classmethod
    def of(cls, part_K: Tensor, sent_K4: Tensor, ranks: Ranks, dtype: torch.dtype) -> Pixels:
        """part_K: who has them; sent_K4: coordinates and factor, float64; dtype: of what is kept of them."""
        places = [_place(part_K == rank) for rank in range(ranks.size)]
        mine_k4 = sent_K4[places[ranks.rank]].to(dtype)
        return cls(places, mine_k4[:, :3].contiguous(), mine_k4[:, 3].contiguous())

    def count(self, part: int) -> int:
        """How many a part has."""
        place = self.places[part]
        return place.stop - place.start if isinstance(place, slice) else len(place)


def _place(chosen_K: Tensor) -> slice | Tensor:
    """Where it is true; as a slice if that is one run."""
    index_k = chosen_K.nonzero().squeeze(1)
    if len(index_k) == 0:
        return slice(0, 0)
    first, last = int(index_k[0]), int(index_k[-1]) + 1
    return slice(first, last) if last - first == len(index_k) else index_k


@dataclass(frozen=True)
class Asked:
    """What a rank asks in a round. kind: SLICES, ADD; number: of the volume or the sums; pixels: number of its set; dtype: of the
    slices."""

    kind: int
    number: int
    rotation_R33: Tensor
    pixels: int
    dtype: torch.dtype


class Rounds:
    """Rounds of all ranks, from here to `serve`. here: what answers for this rank; padding, dtype: of volumes and sums."""

    def __init__(self, ranks: Ranks, layers: Layers, padding: float, dtype: torch.dtype, here: Layered) -> None:
        self.ranks, self.layers, self.padding, self.dtype, self.here = ranks, layers, padding, dtype, here
        self.device = layers.whole.device
        self._mine: list[tuple[Tensor, Tensor | None]] = []  # sets of pixels as this rank named them
        self._pixels: list[list[Pixels]] = [[] for _ in range(ranks.size)]  # of every rank, by number

    def slices(
        self, number: int, rotation_R33: Tensor, coordinates_K3: Tensor, factor_K: Tensor | None, out_R2K: Tensor
    ) -> None:
        """Fill `out` with slices of a volume."""
        pixels = self._number_of(coordinates_K3, factor_K)
        for part in self._parts(len(rotation_R33), 2 * len(coordinates_K3) * out_R2K.element_size()):
            asked = Asked(SLICES, number, rotation_R33[part], pixels, out_R2K.dtype)
            self._round(asked, out_R2K[part], None)

    def add(self, number: int, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """Add slices to sums."""
        pixels = self._number_of(coordinates_K3, None)
        for part in self._parts(len(rotation_R33), 3 * len(coordinates_K3) * data_R2K.element_size()):
            values_R3K = torch.cat([data_R2K[part], weight_RK[part, None]], 1)
            self._round(Asked(ADD, number, rotation_R33[part], pixels, values_R3K.dtype), None, values_R3K)

    def serve(self) -> None:
        """Come to rounds without asking anything, until nobody does."""
        while self._round(None, None, None):
            pass

    def _parts(self, count: int, each: int) -> list[slice]:
        step = max(1, BYTES_AT_ONCE[self.device.type] // max(1, each))
        return [slice(first, first + step) for first in range(0, count, step)]

    def _number_of(self, coordinates_K3: Tensor, factor_K: Tensor | None) -> int:
        """Of a set of pixels that this rank has asked for before, or a new one."""
        for number, (coordinates, factor) in enumerate(self._mine):
            if coordinates is coordinates_K3 and factor is factor_K:
                return number
        self._mine.append((coordinates_K3, factor_K))
        return len(self._mine) - 1

    def _round(self, asked: Asked | None, out_R2K: Tensor | None, values_R3K: Tensor | None) -> bool:
        """One round; whether anybody asked anything."""
        told = self._told(asked)
        if not any(kind for kind, *_ in told):
            return False
        try:
            self._answer(told, asked, out_R2K, values_R3K)
        except torch.OutOfMemoryError as error:  # the others cannot begin this round again
            raise VerglasError(OUT_OF_MEMORY) from error
        return True

    def _answer(
        self, told: list[list[int]], asked: Asked | None, out_R2K: Tensor | None, values_R3K: Tensor | None
    ) -> None:
        """What all ranks ask."""
        counts = [count for _, _, count, _, _, _ in told]
        mine_R33 = torch.zeros(0, 3, 3) if asked is None else asked.rotation_R33
        mine_R9 = mine_R33.to(self.device, torch.float64).flatten(1).contiguous()
        rotations = [one.view(-1, 3, 3) for one in self.ranks.gathered(mine_R9, "orientations", counts).split(counts)]
        asking = [None if kind == DONE else self._pixels[q][pixels] for q, (kind, _, _, pixels, _, _) in enumerate(told)]
        if any(kind == SLICES for kind, *_ in told):
            self._send_slices(told, rotations, asking, out_R2K)
        if any(kind == ADD for kind, *_ in told):
            self._send_values(told, rotations, asking, values_R3K)

    def _told(self, asked: Asked | None) -> list[list[int]]:
        """(kind, number, orientations, set of pixels, its size if it is new, dtype) of all ranks; new sets are made known."""
        mine = [0] * 6
        if asked is not None:
            new = asked.pixels == len(self._pixels[self.ranks.rank])
            size = len(self._mine[asked.pixels][0]) if new else 0
            mine = [asked.kind, asked.number, len(asked.rotation_R33), asked.pixels, size, DTYPES.index(asked.dtype)]
        told = self.ranks.numbers(mine, "rounds")
        for rank, (_, _, _, _, size, _) in enumerate(told):
            if size:
                self._pixels[rank].append(self._made_known(rank, size))
        return told

    def _made_known(self, rank: int, size: int) -> Pixels:
        """The newest set of pixels of a rank."""
        sent_K4 = torch.ones(size, 4, dtype=torch.float64, device=self.device)
        if rank == self.ranks.rank:
            coordinates_K3, factor_K = self._mine[-1]
            sent_K4[:, :3] = coordinates_K3
            if factor_K is not None:
                sent_K4[:, 3] = factor_K
        self.ranks.of_rank(rank, sent_K4, "pixels")
        part_K = self.layers.part_of(self.padding * sent_K4[:, :3].norm(dim=1))
        return Pixels.of(part_K, sent_K4, self.ranks, self.dtype)

    def _send_slices(
        self, told: list[list[int]], rotations: list[Tensor], asking: list[Pixels | None], out_R2K: Tensor | None
    ) -> None:
        """Each rank's pixels to who asked for slices."""
        me, parts = self.ranks.rank, list[Tensor]()
        for (kind, number, count, _, _, dtype), rotation_R33, pixels in zip(told, rotations, asking, strict=True):
            size = pixels.count(me) if pixels is not None and kind == SLICES else 0
            part = torch.empty(count if size else 0, 2, size, dtype=DTYPES[dtype], device=self.device)
            if part.numel():
                assert pixels is not None
                self.here.slices_here(number, rotation_R33, pixels, part)
            parts.append(part)
        count, mine = told[me][2], asking[me]
        asks = mine is not None and told[me][0] == SLICES
        shapes = [(count, 2, mine.count(q) if asks and mine is not None else 0) for q in range(self.ranks.size)]

        def put(rank: int, part_R2K: Tensor) -> None:
            assert mine is not None and out_R2K is not None
            out_R2K[:, :, mine.places[rank]] = part_R2K

        self._exchanged(parts, shapes, DTYPES[told[me][5]], "slices of references", put)

    def _send_values(
        self, told: list[list[int]], rotations: list[Tensor], asking: list[Pixels | None], values_R3K: Tensor | None
    ) -> None:
        """Slices to be added: each rank is sent its pixels."""
        me, mine, parts = self.ranks.rank, asking[self.ranks.rank], list[Tensor]()
        adds = [kind == ADD for kind, *_ in told]
        dtype = next(DTYPES[one[5]] for one, add in zip(told, adds, strict=True) if add)  # all sums are of one precision
        for rank in range(self.ranks.size):
            part = torch.empty(0, dtype=dtype, device=self.device)
            if adds[me]:
                assert mine is not None and values_R3K is not None
                part = values_R3K[:, :, mine.places[rank]]
            parts.append(part)
        shapes = [
            (count, 3, pixels.count(me)) if add and pixels is not None else (0, 3, 0)
            for (_, _, count, *_), pixels, add in zip(told, asking, adds, strict=True)
        ]

        def put(rank: int, part_R3K: Tensor) -> None:
            pixels = asking[rank]
            assert pixels is not None
            self.here.add_here(told[rank][1], part_R3K, rotations[rank], pixels)

        self._exchanged(parts, shapes, dtype, "slices for sums", put)

    def _exchanged(
        self, parts: list[Tensor], shapes: list[tuple[int, int, int]], dtype: torch.dtype, name: str,
        put: Callable[[int, Tensor], None],
    ) -> None:  # fmt: skip
        """Send a part to each rank; what comes from each, of that shape and dtype, is put where it belongs. Types may differ, so
        bytes travel."""
        sent = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
        each = torch.empty(0, dtype=dtype).element_size()
        found = self.ranks.exchanged(sent, [(n * planes * k * each,) for n, planes, k in shapes], name)
        for rank, (part, shape) in enumerate(zip(found, shapes, strict=True)):
            if part.numel():
                put(rank, part.view(dtype).view(shape))
