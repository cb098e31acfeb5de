"""Copies of images, one after another in plain files, that are read instead of the stacks they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verglas.errors import InputError
from verglas.particles.files import ImageFiles

CHUNK_BYTES = 2**26  # copied at once


@dataclass(frozen=True)
class Copy:
    """row_n: rows of one optics group whose images a file holds, in that order, in the type that the group is read in."""

    path: Path
    row_n: np.ndarray


def copies_of(files: ImageFiles, row_B: np.ndarray, folder: Path) -> list[Copy]:
    """What `copy` makes of some rows in a folder: one file per optics group."""
    group_B = files.table.group_index_B[row_B]
    return [
        Copy(folder / f"group{group + 1}.images", files.in_file_order(row_B[group_B == group]))
        for group in np.unique(group_B).tolist()
    ]


def size_of(files: ImageFiles, copies: list[Copy]) -> int:
    """Bytes of the copies."""
    return sum(len(one.row_n) * files.image_bytes_of(int(files.table.group_index_B[one.row_n[0]])) for one in copies)


def copy(files: ImageFiles, copies: list[Copy], advance: Callable[[int], None] | None = None) -> None:
    """Write the files. advance: is told how many images were copied. InputError if images cannot be read, or a disk is full."""
    for one in copies:
        group = int(files.table.group_index_B[one.row_n[0]])
        box, at_once = files.box_of_group[group], max(1, CHUNK_BYTES // files.image_bytes_of(group))
        buffer = np.empty((min(at_once, len(one.row_n)), box, box), files.numpy_dtype_of(group))
        with open(one.path, "wb") as out:
            for first in range(0, len(one.row_n), at_once):
                row_n = one.row_n[first : first + at_once]
                files.read(row_n, buffer[: len(row_n)])
                try:
                    out.write(buffer[: len(row_n)].data)
                except OSError as error:
                    raise InputError("--scratch", f"{one.path} cannot be written ({error.strerror})", "room for the images",
                                     "Make room, name another folder, or leave it out.") from error  # fmt: skip
                if advance is not None:
                    advance(len(row_n))
