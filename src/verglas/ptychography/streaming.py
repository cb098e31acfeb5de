"""Patterns that stay in host memory, brought to the device block by block: while one is worked on, the next one travels.

Beside a GPU host memory is pinned, and a stream of its own copies into one of two buffers in turn. Neighbours in the file are
copied as they lie; others (a mini-batch, say) are put together first, by threads of the processor.

Axes: B patterns, Y X pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

THREADS = 8  # that put patterns together: one alone does not get all that the memory gives


@dataclass(frozen=True)
class Block:
    """Piece number `piece` of the rows `of`, in buffer `slot` on the device; arrived: when it is there (None: it is)."""

    of: Tensor
    piece: int
    slot: int
    patterns_BYX: Tensor
    arrived: torch.cuda.Event | None = None


class Blocks:
    """host_BYX: all patterns; device: where they go."""

    def __init__(self, host_BYX: Tensor, device: torch.device) -> None:
        self.device, on_gpu = device, device.type == "cuda"
        self.host_BYX = host_BYX.contiguous().pin_memory() if on_gpu else host_BYX
        self._side = torch.cuda.Stream(device) if on_gpu else None
        self._buffers, self._gathered = _Pair(host_BYX, device), _Pair(host_BYX, torch.device("cpu"), on_gpu)
        self._there: list[Block | None] = [None, None]
        self._now: tuple[Tensor, Block] | None = None  # rows that were handed out last, and their block
        self._known: list[tuple[Tensor, Tensor]] = []  # rows on the device and on the host
        self._threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))

    def expect(self, several: Sequence[Tensor]) -> None:
        """Rows that will be walked through one after the other: the first piece of each travels behind the one before."""
        self._known = [(rows_B, rows_B.cpu()) for rows_B in several if len(rows_B)]

    def walk(self, rows_B: Tensor, size: int) -> Iterator[Tensor]:
        """rows_B (on the device) in pieces of `size`; patterns of the last one that was handed out are there, or on their way."""
        pieces = self._pieces(rows_B, size)
        for number, piece_B in enumerate(rows_B.split(size)):
            self._now = piece_B, self._brought(*pieces[number])
            if number + 1 < len(pieces):
                self._brought(*pieces[number + 1])
            yield piece_B

    def patterns(self, rows_B: Tensor) -> Tensor:
        """[B, Y, X] on the device: quick for the very piece that `walk` has handed out last; others are waited for."""
        if self._now is None or self._now[0] is not rows_B:
            return self.host_BYX[rows_B.cpu()].to(self.device)
        block = self._now[1]
        if block.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(block.arrived)
        return block.patterns_BYX

    def _pieces(self, rows_B: Tensor, size: int) -> list[tuple[Tensor, int, Tensor]]:
        """(rows, number of the piece, which patterns) of all pieces, and of the first one of what is expected next."""
        at = next((number for number, (known_B, _) in enumerate(self._known) if known_B is rows_B), None)
        if at is None:  # waits for the device
            self._known, at = [(rows_B, rows_B.cpu())], 0
        pieces = [(rows_B, number, on_host_B) for number, on_host_B in enumerate(self._known[at][1].split(size))]
        return pieces + [(later_B, 0, on_host_B[:size]) for later_B, on_host_B in self._known[at + 1 : at + 2]]

    def _brought(self, of: Tensor, piece: int, on_host_B: Tensor) -> Block:
        """A piece in one of the buffers, or on its way there; not in that which is worked on."""
        for block in self._there:
            if block is not None and block.of is of and block.piece == piece and len(block.patterns_BYX) == len(on_host_B):
                return block
        slot = 0 if self._now is None else 1 - self._now[1].slot
        block = Block(of, piece, slot, *self._sent(on_host_B, slot))
        self._there[slot] = block
        return block

    def _sent(self, on_host_B: Tensor, slot: int) -> tuple[Tensor, torch.cuda.Event | None]:
        first, count = int(on_host_B[0]), len(on_host_B)
        neighbours = bool((on_host_B == torch.arange(first, first + count)).all())
        source_BYX = self.host_BYX[first : first + count] if neighbours else self._put_together(on_host_B, slot)
        if self._side is None:
            return source_BYX, None
        into_BYX = self._buffers.of(slot, count)
        self._side.wait_stream(torch.cuda.current_stream(self.device))  # what was computed from this buffer
        with torch.cuda.stream(self._side):
            into_BYX.copy_(source_BYX, non_blocking=True)
            arrived = self._side.record_event()
        self._gathered.busy[slot] = arrived
        return into_BYX, arrived

    def _put_together(self, on_host_B: Tensor, slot: int) -> Tensor:
        """Patterns from all over, one after the other."""
        if self._side is None:
            return self.host_BYX[on_host_B]
        into_BYX = self._gathered.of(slot, len(on_host_B))

        def take(part: tuple[Tensor, Tensor]) -> None:
            torch.index_select(self.host_BYX, 0, part[0], out=part[1])

        at_once = -(-len(on_host_B) // THREADS)
        list(self._threads.map(take, zip(on_host_B.split(at_once), into_BYX.split(at_once), strict=True)))
        return into_BYX


class _Pair:
    """Two buffers of patterns like `like_BYX`, as large as they were ever asked for. busy: copies out of them."""

    def __init__(self, like_BYX: Tensor, device: torch.device, pinned: bool = False) -> None:
        self.like_BYX, self.device, self.pinned = like_BYX, device, pinned
        self.both = [like_BYX.new_empty(0)] * 2
        self.busy: list[torch.cuda.Event | None] = [None, None]

    def of(self, slot: int, count: int) -> Tensor:
        """The first `count` places of a buffer that nothing is copied from any more."""
        busy = self.busy[slot]
        if busy is not None:
            busy.synchronize()
        if len(self.both[slot]) < count:
            shape = (count, *self.like_BYX.shape[1:])
            self.both[slot] = torch.empty(shape, dtype=self.like_BYX.dtype, device=self.device, pin_memory=self.pinned)
        return self.both[slot][:count]
