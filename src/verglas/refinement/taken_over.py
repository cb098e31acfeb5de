"""Images of particles that come to a rank from slower ones, read into memory while it computes with those it has."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from verglas.particles.files import ImageFiles
from verglas.particles.resident import read_all

Part = tuple[Tensor, Tensor | None]  # images [n, Y, X], and what `unscaled` undoes


class TakenOver:
    """device: the memory that they are kept in; rounded: float32 as float16 (particles/resident.py); room: bytes for all."""

    def __init__(self, files: ImageFiles, device: torch.device, rounded: bool, room: float) -> None:
        self.files, self.device, self.rounded, self.room = files, device, rounded, room
        self._for_others = room / 2  # that rows of others, with which this rank helps, may take: they may come again
        self._part_B = torch.full((len(files.table),), -1)
        self._place_B = torch.zeros(len(files.table), dtype=torch.int64)
        self._parts: list[Future[Part]] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="verglas-taken-over")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, row_B: Tensor, own: bool = True) -> None:
        """Start to read the images of these rows, as many as there is room for. own: they are this rank's from now on."""
        row_B = row_B[self._part_B[row_B] < 0]
        group_B = self.files.table.group_index_B[row_B.numpy()]
        for group in np.unique(group_B).tolist():
            row_n = self.files.in_file_order(row_B.numpy()[group_B == group])
            room = self.room if own else min(self.room, self._for_others)
            row_n = row_n[: int(min(len(row_n), room // self._bytes_of(group)))]
            if len(row_n) == 0:
                continue
            self.room -= len(row_n) * self._bytes_of(group)
            self._for_others -= 0 if own else len(row_n) * self._bytes_of(group)
            self._part_B[torch.from_numpy(row_n)] = len(self._parts)
            self._place_B[torch.from_numpy(row_n)] = torch.arange(len(row_n))
            self._parts.append(self._worker.submit(self._read, row_n))

    def has(self, row_B: Tensor) -> Tensor:
        """Which of these rows are here, or on their way."""
        return self._part_B[row_B] >= 0

    def wait_for(self, row_B: Tensor) -> None:
        """Until the images of rows that are on their way are here. InputError if they cannot be used."""
        for number in self._part_B[row_B].unique().tolist():
            self._parts[number].result()

    def images_of(self, row_B: Tensor, group: int) -> Tensor:
        """Images [B, Y, X] of rows that are here, of one optics group; waits for those on their way. InputError if they cannot be
        used."""
        part_B, place_B = self._part_B[row_B], self._place_B[row_B].to(self.device)
        found: Tensor | None = None
        for number in part_B.unique().tolist():
            images, scales = self._parts[number].result()
            mine_B = (part_B == number).to(self.device)
            own_BYX = unscaled(images[place_B[mine_B]], None if scales is None else scales[place_B[mine_B]])
            found = own_BYX.new_empty(len(row_B), *own_BYX.shape[1:]) if found is None else found
            found[mine_B] = own_BYX
        assert found is not None
        return found

    def _bytes_of(self, group: int) -> int:
        pixels = self.files.box_of_group[group] ** 2
        return 2 * pixels if self.rounded else self.files.image_bytes_of(group)

    def _read(self, row_n: np.ndarray) -> Part:
        """In the worker: on a GPU copied beside what it computes."""
        with torch.cuda.stream(self._side) if self._side is not None else nullcontext():
            part = read_all(self.files, row_n, self.device, self.rounded)
            if self._side is not None:
                self._side.synchronize()
        return part


def unscaled(image_BYX: Tensor, scale_B2: Tensor | None) -> Tensor:
    """Images as the files have them, float32 where they were rescaled by `particles.resident.rescaled`; scale_B2: (deviation,
    mean), None: they were not."""
    if scale_B2 is None:
        return image_BYX
    return image_BYX.float().mul_(scale_B2[:, 0, None, None]).add_(scale_B2[:, 1, None, None])
