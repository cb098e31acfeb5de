"""Images that do not stay where they are needed: the next batch is read, and copied to the device, while one is computed with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verglas.particles.files import ImageFiles, unusable


@dataclass(frozen=True)
class _Batch:
    """A batch under way. ready: gives its images and, on a GPU, the event after which they are there."""

    row_B: Tensor
    ready: Future[tuple[Tensor, torch.cuda.Event | None]]


class ImageStream:
    """Hands out batches from two buffers on the host, made for the largest batch: one is in use, one being filled.

    source: fills an array with the images of rows (of one optics group, in the order given) in the group's type: `files.read`,
    or a copy from memory. device: where batches are wanted; for a GPU buffers are pinned, and copied on a stream of their own.
    """

    def __init__(
        self, files: ImageFiles, device: torch.device, source: Callable[[np.ndarray, np.ndarray], None] | None = None
    ) -> None:
        self.files, self.device, self.source = files, device, source or files.read
        self._buffers: list[Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="verglas-ahead")
        self._seen_B = np.zeros(len(files.table), bool)  # images that were checked
        self._queue: deque[Tensor] = deque()  # rows of the batches that come next
        self._waiting: _Batch | None = None

    def announce(self, row_B: Tensor, size: int) -> None:
        """Say in which order rows of one optics group will be asked for, `size` at a time: the first batch is begun at once."""
        self._forget()
        self._queue = deque(row_B.split(size) if len(row_B) else ())
        self._begin_next()

    def announce_next(self, row_B: Tensor) -> None:
        """Say which batch comes after the one that is asked for next, instead of what was announced before."""
        self._queue = deque([row_B])
        if self._waiting is None:
            self._begin_next()

    def take(self, row_B: Tensor) -> Tensor:
        """Images of these rows on the device, in the group's type [B, Y, X]. On a CPU they are good until the next call.

        Any rows may be asked for, but only those announced, in their order, are there without waiting. Raises InputError for
        images that cannot be used (each is checked when it comes first) or read.
        """
        batch = self._waiting
        if batch is None or not torch.equal(batch.row_B, row_B):
            if batch is not None:
                self._queue.appendleft(batch.row_B)
            self._forget()
            batch = self._begin(row_B)
            self._pass_by(int(row_B[-1]))
        image_BYX, event = batch.ready.result()
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            image_BYX.record_stream(current)
        self._begin_next()
        return image_BYX

    def close(self) -> None:
        """End the threads; nothing can be taken any more."""
        self._forget()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _begin_next(self) -> None:
        self._waiting = self._begin(self._queue.popleft()) if self._queue else None

    def _pass_by(self, row: int) -> None:
        """Drop what was announced up to a row that was asked for out of turn; all of it stays if that row was not announced."""
        for number, rows in enumerate(self._queue):
            places = (rows == row).nonzero()
            if len(places):
                rest = rows[int(places[0]) + 1 :]
                self._queue = deque(([rest] if len(rest) else []) + list(self._queue)[number + 1 :])
                return

    def _begin(self, row_B: Tensor) -> _Batch:
        self._turn = 1 - self._turn
        return _Batch(row_B, self._worker.submit(self._fill, row_B.numpy(), self._turn))

    def _forget(self) -> None:
        """Wait for the batch that is under way, and drop it."""
        if self._waiting is not None and not self._waiting.ready.cancel():
            self._waiting.ready.exception()
        self._waiting = None

    def _fill(self, row_B: np.ndarray, turn: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """In the worker: the images in a buffer, checked; on a GPU, a copy of them there."""
        event = self._copied[turn]
        if event is not None:
            event.synchronize()  # the buffer's last images have left it
        image_BYX = self._buffer(row_B, turn)
        self.source(row_B, image_BYX.numpy())
        if self._side is None:
            self._check(row_B, image_BYX)
            return image_BYX, None
        with torch.cuda.stream(self._side):
            there_BYX = image_BYX.to(self.device, non_blocking=True)
            self._copied[turn] = event = torch.cuda.Event()
            event.record(self._side)
            self._check(row_B, there_BYX)
        return there_BYX, event

    def _buffer(self, row_B: np.ndarray, turn: int) -> Tensor:
        """The buffer of this turn as an array for these rows; made anew for a larger batch."""
        group = int(self.files.table.group_index_B[row_B[0]])
        box, needed = self.files.box_of_group[group], len(row_B) * self.files.image_bytes_of(group)
        while len(self._buffers) <= turn:
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if len(self._buffers[turn]) < needed:
            self._buffers[turn] = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffers[turn] = torch.empty(needed, dtype=torch.uint8, pin_memory=self._side is not None)
        return self._buffers[turn][:needed].view(self.files.dtype_of_group[group]).view(len(row_B), box, box)

    def _check(self, row_B: np.ndarray, image_BYX: Tensor) -> None:
        if self._seen_B[row_B].all():
            return
        bad_B = unusable(image_BYX).cpu().numpy()
        if bad_B.any():
            self.files.refuse(row_B[bad_B])
        self._seen_B[row_B] = True
