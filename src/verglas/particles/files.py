"""The image files of a particle table, opened and checked once: any rows into any array, in the files' own type of number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.io.mrc import Stack
from verglas.io.mrc_header import read_header
from verglas.particles.loader import BadImage, check_boxes, open_stacks, refusal, unusable_images
from verglas.particles.stacks import StackReader
from verglas.particles.table import ParticleTable

# Types that images may stay in as they are; what PyTorch cannot work with (unsigned or swapped numbers) becomes float32.
KEPT = {np.dtype(name): getattr(torch, torch_name) for name, torch_name in
        (("<f4", "float32"), ("<f2", "float16"), ("<i2", "int16"), ("i1", "int8"))}  # fmt: skip


class ImageFiles:
    """Raises InputError as `ImageLoader` does for stacks that are missing, truncated or of a wrong box.

    box_of_group: px; dtype_of_group: what its images can be read as without loss (float32 where its files differ).
    """

    def __init__(self, table: ParticleTable, stacks: list[Stack | None] | None = None) -> None:
        """stacks: of `opened`, by this process or another one; None: their headers are read now."""
        rows = np.arange(len(table))
        self.table, self.locations = table, table.image_locations()
        self._stacks = opened(table) if stacks is None else stacks
        self._stack_B, self._image_B = self.locations.stack_index_B.copy(), self.locations.image_index_B.copy()
        self.box_of_group = check_boxes(table, self.locations, rows, self._stacks)
        self.dtype_of_group = {group: self._dtype(group) for group in self.box_of_group}
        self._reader = StackReader(self._stacks)

    def image_bytes_of(self, group: int) -> int:
        """Bytes of one image of an optics group, in memory."""
        return self.box_of_group[group] ** 2 * self.dtype_of_group[group].itemsize

    def in_file_order(self, row_B: np.ndarray) -> np.ndarray:
        """The rows by file, and by place in it."""
        return self.locations.in_file_order(row_B)

    def read(self, row_B: np.ndarray, out_BYX: np.ndarray) -> None:
        """Fill out_BYX with the images of rows of one optics group, in the order given; values are not checked."""
        self._reader.read(self._stack_B[row_B], self._image_B[row_B], out_BYX)

    def read_from(self, path: Path, row_n: np.ndarray) -> None:
        """Read these rows of one optics group from another file from now on, which holds nothing but their images, in that order
        and in the group's type. InputError if it is not as long as that."""
        group = int(self.table.group_index_B[row_n[0]])
        if path.stat().st_size != len(row_n) * self.image_bytes_of(group):
            raise InputError(path, f"{path.stat().st_size} bytes long", f"{len(row_n)} images", "Start the run again.")
        like, box = self._stacks[self.locations.stack_index_B[row_n[0]]], self.box_of_group[group]
        assert like is not None
        header = replace(like.header, shape=(len(row_n), box, box), dtype=self.numpy_dtype_of(group), offset=0)
        self._stack_B[row_n], self._image_B[row_n] = len(self._stacks), np.arange(len(row_n))
        self._stacks.append(Stack(path, header))

    def numpy_dtype_of(self, group: int) -> np.dtype:
        """`dtype_of_group` in numpy's terms."""
        return torch.empty(0, dtype=self.dtype_of_group[group]).numpy().dtype

    def refuse(self, row_B: np.ndarray) -> None:
        """Raise InputError that says what is wrong with these images; they were found unusable."""
        box = self.box_of_group[int(self.table.group_index_B[row_B[0]])]
        first = np.empty((1, box, box), np.float32)
        self.read(row_B[:1], first)
        reason = next((text for _, text in unusable_images(first)), "not finite, or constant, when it was first read")
        raise refusal([BadImage(int(row), self.locations.name(int(row)), reason) for row in row_B])

    def close(self) -> None:
        """End the reading threads."""
        self._reader.close()

    def _dtype(self, group: int) -> torch.dtype:
        stacks = [self._stacks[i] for i in np.unique(self.locations.stack_index_B[self.table.group_index_B == group])]
        types = {stack.header.dtype for stack in stacks if stack is not None}
        return KEPT.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


def opened(table: ParticleTable) -> list[Stack | None]:
    """Headers of all stacks of a table, for `ImageFiles`; InputError for stacks that are missing or truncated."""
    return open_stacks(table, table.image_locations(), np.arange(len(table)))


def unusable(image_BYX: Tensor) -> Tensor:
    """Which images hold NaN or infinity, or one value throughout; bool [B], on the images' device, one pass over them."""
    if image_BYX.device.type == "cpu" and image_BYX.dtype == torch.float32:  # four times faster there
        found_B = torch.zeros(len(image_BYX), dtype=torch.bool)
        found_B[[position for position, _ in unusable_images(image_BYX.numpy())]] = True
        return found_B
    low_B, high_B = torch.aminmax(image_BYX.flatten(1), dim=1)  # NaN goes through
    return ~(torch.isfinite(low_B) & torch.isfinite(high_B)) | (low_B == high_B)


def pixel_bytes(table: ParticleTable) -> int:
    """Bytes of a pixel as it stays in memory without loss: the largest of the first stacks of all optics groups (4 where one is
    not there). Raises InputError for a stack that is broken.
    """
    locations = table.image_locations()
    firsts = [np.flatnonzero(table.group_index_B == group)[:1] for group in range(len(table.groups))]
    paths = {locations.paths[locations.stack_index_B[int(first[0])]] for first in firsts if len(first)}
    types = [KEPT.get(read_header(path).dtype, torch.float32) if path.exists() else torch.float32 for path in paths]
    return max(dtype.itemsize for dtype in types)
