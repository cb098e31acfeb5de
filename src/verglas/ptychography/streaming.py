"""Patterns that stay in host memory, brought to the device block by block: while one is worked on, the next one travels.

Beside a GPU host memory is pinned, and a stream of its own copies into one of two buffers in turn. Neighbours in the file are
copied as they lie; others (a mini-batch, say) are put together first, by the processor.

Axes: B patterns, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Patterns `rows_B` on the device; arrived: when they are there (None: they are)."""

    rows_B: Tensor
    patterns_BYX: Tensor
    arrived: torch.cuda.Event | None = None


class Blocks:
    """host_BYX: all patterns; device: where they go."""

    def __init__(self, host_BYX: Tensor, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.host_BYX = host_BYX.contiguous().pin_memory() if self.on_gpu else host_BYX
        self._side = torch.cuda.Stream(device) if self.on_gpu else None
        self._buffers, self._gathered = (_Pair(host_BYX, place, self.on_gpu) for place in (device, torch.device("cpu")))
        self._turn = 0
        self._now: Block | None = None

    def walk(self, rows_B: Tensor, size: int) -> Iterator[Tensor]:
        """rows_B (on the device) in pieces of `size`; patterns of the last one that was handed out are there, or on their way."""
        pieces = list(zip(rows_B.split(size), rows_B.cpu().split(size), strict=True))
        ahead = self._send(*pieces[0])
        for (piece_B, _), following in zip_longest(pieces, pieces[1:]):
            self._now = ahead
            if following is not None:
                ahead = self._send(*following)
            yield piece_B
        self._now = None

    def patterns(self, rows_B: Tensor) -> Tensor:
        """[B, Y, X] on the device: quick for the very piece that `walk` has handed out last; others are waited for."""
        block = self._now
        if block is None or block.rows_B is not rows_B:
            return self.host_BYX[rows_B.cpu()].to(self.device)
        if block.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(block.arrived)
        return block.patterns_BYX

    def _send(self, rows_B: Tensor, on_host_B: Tensor) -> Block:
        first, count = int(on_host_B[0]), len(on_host_B)
        neighbours = bool((on_host_B == torch.arange(first, first + count)).all())
        if self._side is None:
            return Block(rows_B, self.host_BYX[first : first + count] if neighbours else self.host_BYX[on_host_B])
        self._turn = 1 - self._turn
        if neighbours:
            source_BYX = self.host_BYX[first : first + count]
        else:
            source_BYX = self._gathered.of(self._turn, count)  # its last copy is over: `_buffers` were used since
            torch.index_select(self.host_BYX, 0, on_host_B, out=source_BYX)
        into_BYX = self._buffers.of(self._turn, count)
        self._side.wait_stream(torch.cuda.current_stream(self.device))  # what was computed from this buffer
        with torch.cuda.stream(self._side):
            into_BYX.copy_(source_BYX, non_blocking=True)
            arrived = self._side.record_event()
        self._gathered.busy[self._turn] = arrived
        return Block(rows_B, into_BYX, arrived)


class _Pair:
    """Two buffers of patterns like `like_BYX`, as large as they were ever asked for."""

    def __init__(self, like_BYX: Tensor, device: torch.device, pinned: bool) -> None:
        self.like_BYX, self.device, self.pinned = like_BYX, device, pinned and device.type == "cpu"
        self.both: list[Tensor] = [like_BYX.new_empty(0)] * 2
        self.busy: list[torch.cuda.Event | None] = [None, None]

    def of(self, turn: int, count: int) -> Tensor:
        """The first `count` places of a buffer that nothing is copied from any more."""
        busy = self.busy[turn]
        if busy is not None:
            busy.synchronize()
        if len(self.both[turn]) < count:
            shape = (count, *self.like_BYX.shape[1:])
            self.both[turn] = torch.empty(shape, dtype=self.like_BYX.dtype, device=self.device, pin_memory=self.pinned)
        return self.both[turn][:count]
