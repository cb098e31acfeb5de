"""A map file that is written part after part, for maps that memory does not hold beside what they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from verglas.io.atomic import atomic_path
from verglas.io.mrc_header import HEADER_BYTES, make_header, set_statistics

FLOAT32_MODE = 2
VALUES_AT_ONCE = 2**23


class MapInParts:
    """A map [N, N, N] of float32 in a file: rows are put anywhere, then all planes are gone through once. See `map_in_parts`."""

    def __init__(self, file: BinaryIO, box: int, pixel_size: float) -> None:
        self.file, self.box = file, box
        self.header = make_header((box, box, box), FLOAT32_MODE, pixel_size, False)
        file.write(self.header.tobytes())

    def put_rows(self, first: int, values_ZyX: np.ndarray) -> None:
        """Rows first, first + 1, ... along y of every plane."""
        for z, rows_yX in enumerate(values_ZyX):
            self._seek(z * self.box + first)
            self.file.write(np.ascontiguousarray(rows_yX, "<f4").data)

    def change_planes(self, change: Callable[[slice, np.ndarray], np.ndarray]) -> None:
        """Put change(which, planes) in the place of the planes, run after run of them, then their statistics into the header."""
        step = max(1, VALUES_AT_ONCE // self.box**2)
        smallest, largest, total, squares = math.inf, -math.inf, 0.0, 0.0
        for first in range(0, self.box, step):
            part = slice(first, min(first + step, self.box))
            values_zYX = np.ascontiguousarray(change(part, self._planes(part)), "<f4")
            self._seek(part.start * self.box)
            self.file.write(values_zYX.data)
            smallest, largest = min(smallest, float(values_zYX.min())), max(largest, float(values_zYX.max()))
            total += float(values_zYX.sum(dtype=np.float64))
            squares += float(np.square(values_zYX, dtype=np.float64).sum())
        mean = total / self.box**3
        set_statistics(self.header, smallest, largest, mean, math.sqrt(max(squares / self.box**3 - mean**2, 0.0)))
        self.file.seek(0)
        self.file.write(self.header.tobytes())

    def _planes(self, part: slice) -> np.ndarray:
        values_zYX = np.empty((part.stop - part.start, self.box, self.box), "<f4")
        self._seek(part.start * self.box)
        self.file.readinto(values_zYX.data)  # type: ignore[attr-defined]
        return values_zYX

    def _seek(self, row: int) -> None:
        self.file.seek(HEADER_BYTES + 4 * self.box * row)


@contextmanager
def map_in_parts(path: Path, box: int, pixel_size: float, overwrite: bool = False) -> Iterator[MapInParts]:
    """A map that takes its name `path` at the end of the `with`; pixel_size: Å. Raises as `io.atomic.atomic_path`."""
    with atomic_path(path, overwrite) as temporary, open(temporary, "w+b") as file:
        yield MapInParts(file, box, pixel_size)


def read_planes(path: Path, box: int, part: slice) -> np.ndarray:
    """Planes of a map that `map_in_parts` wrote, float32 [z, N, N]."""
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES + 4 * box**2 * part.start)
        return np.fromfile(file, "<f4", (part.stop - part.start) * box**2).reshape(-1, box, box)
