"""Copy the images that a table names into new stacks of one kind of numbers; nothing else about them changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verglas.errors import InputError
from verglas.io.mrc import Stack, StackWriter

BATCH_BYTES = 2**26


@dataclass(frozen=True)
class Images:
    """Image b is number image_index_B[b] (0-based) of paths[stack_index_B[b]] and has pixels of pixel_size_B[b] Å."""

    paths: list[Path]
    stack_index_B: np.ndarray
    image_index_B: np.ndarray
    pixel_size_B: np.ndarray


def copy_images(
    images: Images, target: Path, dtype: str, overwrite: bool, advance: Callable[[int], None]
) -> tuple[list[str], int]:
    """Write `target` (or target_1, target_2 ... where box or pixel size differ); an image named twice is copied once.

    Returns (a name `000001@stack` for every image, relative to the folder of `target`; number of stacks written).
    Raises InputError for missing, damaged and too short stacks, OutputError if a target exists.
    """
    stacks = [Stack.open(path) for path in images.paths]
    _check_lengths(images, stacks)
    boxes = np.array([stack.box_yx for stack in stacks])[images.stack_index_B]
    fields = np.column_stack([boxes, images.pixel_size_B])
    _, field_B = np.unique(fields, axis=0, return_inverse=True)
    field_B = field_B.reshape(-1)
    names = np.empty(len(field_B), dtype=object)
    count = int(field_B.max()) + 1
    for number in range(count):
        rows = np.flatnonzero(field_B == number)
        name = target.name if count == 1 else f"{target.stem}_{number + 1}{target.suffix}"
        first_rows, place = _distinct(images, rows)
        box_yx = stacks[images.stack_index_B[rows[0]]].box_yx
        pixel = float(images.pixel_size_B[rows[0]])
        with StackWriter(target.with_name(name), len(first_rows), box_yx, pixel, dtype, overwrite) as writer:
            step = max(1, BATCH_BYTES // (4 * box_yx[0] * box_yx[1]))
            for start in range(0, len(first_rows), step):
                batch = first_rows[start : start + step]
                writer.append(_read(images, stacks, batch, box_yx))
                advance(len(batch))
        names[rows] = [f"{index + 1:06d}@{name}" for index in place.tolist()]
    return names.tolist(), count


def _check_lengths(images: Images, stacks: list[Stack]) -> None:
    lengths = np.array([stack.n for stack in stacks])[images.stack_index_B]
    beyond = np.flatnonzero(images.image_index_B >= lengths)
    if len(beyond):
        row = int(beyond[0])
        path = images.paths[images.stack_index_B[row]]
        found = f"image {images.image_index_B[row] + 1} is asked for"
        raise InputError(path, found, f"1 to {lengths[row]}, the images in this stack")


def _distinct(images: Images, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that name an image for the first time, in order; for every row the position of its image among them)."""
    key = images.stack_index_B[rows] * (int(images.image_index_B.max()) + 1) + images.image_index_B[rows]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[first[order]], place[inverse.reshape(-1)]


def _read(images: Images, stacks: list[Stack], rows: np.ndarray, box_yx: tuple[int, int]) -> np.ndarray:
    out_BYX = np.empty((len(rows), *box_yx), np.float32)
    stack_index = images.stack_index_B[rows]
    for index in np.unique(stack_index):
        mine = np.flatnonzero(stack_index == index)
        mine = mine[np.argsort(images.image_index_B[rows[mine]], kind="stable")]
        out_BYX[mine] = stacks[index].read(images.image_index_B[rows[mine]])
    return out_BYX
