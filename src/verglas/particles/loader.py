"""Batches of images, read ahead by one thread while the consumer computes.

Everything that can be known from the headers is checked when the loader is made: missing and truncated stacks, image
numbers, box sizes. Pixels are checked as they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.io.mrc import Stack
from verglas.optics.group import OpticsGroup
from verglas.particles.images import ImageLocations, looked_in
from verglas.particles.stacks import StackReader
from verglas.particles.table import ParticleTable


@dataclass(frozen=True)
class ImageBatch:
    """index_B: rows of the table (int64); image_BYX: float32 on the CPU, pinned if it will go to a GPU; one optics group."""

    index_B: np.ndarray
    image_BYX: Tensor
    group: OpticsGroup
    group_index: int

    def __len__(self) -> int:
        return len(self.index_B)


@dataclass(frozen=True)
class BadImage:
    """An image that was left out: row of the table, its name, and what is wrong with it."""

    row: int
    name: str
    reason: str


Read: TypeAlias = tuple[ImageBatch, list[BadImage]]


class ImageLoader:
    """Iterate for `ImageBatch`es of the rows `indices` of `table`; every iteration reads them anew.

    Batches hold one optics group each, groups one after the other, rows in the order given, sorted by file within a
    batch. At most `prefetch` batches wait beside the one in the consumer's hands. With skip_bad, images that are not
    finite or constant are left out and listed in `bad`; without, they raise InputError. box_of_group: position of an
    optics group -> box in px, as the stacks have it.
    """

    def __init__(
        self,
        table: ParticleTable,
        indices: np.ndarray | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        *,
        skip_bad: bool = False,
        prefetch: int = 2,
    ) -> None:
        self.table = table
        self.indices = np.arange(len(table)) if indices is None else np.asarray(indices, np.int64)
        self.batch_size, self.skip_bad, self.prefetch = batch_size, skip_bad, max(prefetch, 1)
        self.pinned = torch.device(device).type == "cuda"
        self.locations = table.image_locations()
        self.bad: list[BadImage] = []
        self._stacks = open_stacks(table, self.locations, self.indices)
        self.box_of_group = check_boxes(table, self.locations, self.indices, self._stacks)
        self._plan = self._batches()
        self._begun: _Reading | None = None

    def stored_bytes(self) -> int:
        """Of a pixel in the files; of several kinds the most."""
        return max((stack.header.dtype.itemsize for stack in self._stacks if stack is not None), default=4)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._plan)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.bad = []
        self.begin()
        reading, self._begun = self._begun, None
        assert reading is not None
        try:
            while True:
                reading.fill(self.prefetch + 1)
                if not reading.waiting:
                    return
                batch, bad = reading.waiting.popleft().result()
                self.bad += bad
                if len(batch):
                    yield batch
                del batch  # else it would live on while the next one is awaited
        finally:
            reading.close()

    def begin(self) -> None:
        """Have the first batches read from now on, for whoever goes through the batches next."""
        if self._begun is None:
            self._begun = _Reading(self._read, StackReader(self._stacks), self._plan)
            self._begun.fill(self.prefetch)

    def blank(self, device: torch.device) -> Iterator[ImageBatch]:
        """The same batches without reading: with images of zeros on a device. For what depends on poses and CTFs alone."""
        image_BYX = torch.zeros(0)
        for rows in self._plan:
            group_index = int(self.table.group_index_B[rows[0]])
            shape = len(rows), self.box_of_group[group_index], self.box_of_group[group_index]
            image_BYX = image_BYX if image_BYX.shape == shape else torch.zeros(shape, device=device)
            yield ImageBatch(rows, image_BYX, self.table.groups[group_index], group_index)

    def _batches(self) -> list[np.ndarray]:
        """Rows of each batch: one group, as given; sorted by stack and image number inside."""
        batches = []
        group_of_row = self.table.group_index_B[self.indices]
        for group in np.unique(group_of_row):
            rows = self.indices[group_of_row == group]
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                order = np.lexsort((self.locations.image_index_B[part], self.locations.stack_index_B[part]))
                batches.append(part[order])
        return batches

    def _read(self, reader: StackReader, rows: np.ndarray) -> Read:
        group_index = int(self.table.group_index_B[rows[0]])
        box = self.box_of_group[group_index]
        # numpy's memory costs fewer page faults than torch's; pinned memory comes from torch's cache.
        if self.pinned:
            image_BYX = torch.empty(len(rows), box, box, pin_memory=True)
        else:
            image_BYX = torch.from_numpy(np.empty((len(rows), box, box), np.float32))
        reader.read(self.locations.stack_index_B[rows], self.locations.image_index_B[rows], image_BYX.numpy())
        bad = [
            BadImage(int(rows[i]), self.locations.name(int(rows[i])), reason) for i, reason in unusable_images(image_BYX.numpy())
        ]
        if bad:
            if not self.skip_bad:
                raise refusal(bad)
            keep = ~np.isin(rows, [image.row for image in bad])
            rows, image_BYX = rows[keep], image_BYX[torch.from_numpy(keep)]
        return ImageBatch(rows, image_BYX, self.table.groups[group_index], group_index), bad


class _Reading:
    """Batches that are being read, by one thread."""

    def __init__(self, read: Callable[[StackReader, np.ndarray], Read], reader: StackReader, plan: Sequence[np.ndarray]) -> None:
        self._read, self._reader, self._left = read, reader, iter(plan)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="verglas-reader")
        self.waiting: deque[Future[Read]] = deque()

    def fill(self, most: int) -> None:
        """Until so many batches are waiting, or all that are left."""
        for rows in islice(self._left, max(0, most - len(self.waiting))):
            self.waiting.append(self._pool.submit(self._read, self._reader, rows))

    def close(self) -> None:
        """What is not begun is not read."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()


def refusal(bad: list[BadImage]) -> InputError:
    """The error for images that cannot be used."""
    more = f" (and {len(bad) - 1} more near it)" if len(bad) > 1 else ""
    return InputError(
        bad[0].name, f"{bad[0].reason}{more}", "an image with finite, varying values",
        "Remove such particles, or pass --skip-bad to leave them out.",
    )  # fmt: skip


def unusable_images(image_BYX: np.ndarray) -> list[tuple[int, str]]:
    """(position, reason) of every image that holds NaN or infinity, or one value throughout.

    One pass over good images: their sum of squares (the fastest pass there is) shows what is not finite, and a first row
    that varies shows that the image does.
    """
    flat_BP = image_BYX.reshape(len(image_BYX), -1)
    with np.errstate(invalid="ignore", over="ignore"):
        finite_B = np.isfinite(np.vecdot(flat_BP, flat_BP))
    suspect_B = ~finite_B | (image_BYX[:, 0] == image_BYX[:, 0, :1]).all(axis=1)
    found = []
    for i in np.flatnonzero(suspect_B).tolist():
        bad_pixels = int((~np.isfinite(flat_BP[i])).sum())
        if bad_pixels:
            found.append((i, f"{bad_pixels} pixels are not finite numbers"))
        elif flat_BP[i].min() == flat_BP[i].max():
            found.append((i, f"constant image (every pixel is {flat_BP[i, 0]:g})"))
    return found


def open_stacks(table: ParticleTable, locations: ImageLocations, rows: np.ndarray) -> list[Stack | None]:
    """Headers of all stacks that `rows` need; InputError if one is missing, no stack, truncated, or too short."""
    stack_of_row, image_of_row = locations.stack_index_B[rows], locations.image_index_B[rows]
    last_image = np.full(len(locations.paths), -1, np.int64)
    np.maximum.at(last_image, stack_of_row, image_of_row)
    stacks: list[Stack | None] = []
    for path, last in zip(locations.paths, last_image.tolist()):
        if last >= 0 and not path.exists():
            raise InputError(
                looked_in(path, table.folder), "stack not found", f"the images of {table.source}",
                "Run from the folder that the names are relative to, name it with --folder, or correct rlnImageName.",
            )  # fmt: skip
        stacks.append(Stack.open(path) if last >= 0 else None)
        opened = stacks[-1]
        if opened is not None and last >= opened.n:
            raise InputError(
                f"{table.source}, {last + 1:06d}@{path}", f"the stack has {opened.n} images", f"at least {last + 1}",
                "The STAR file and the stack do not belong together.",
            )  # fmt: skip
    return stacks


def check_boxes(table: ParticleTable, locations: ImageLocations, rows: np.ndarray, stacks: list[Stack | None]) -> dict[int, int]:
    """Box of every group in use, in px; InputError for boxes that are odd, not square, or not what the group says."""
    pairs = np.unique(np.stack([table.group_index_B[rows], locations.stack_index_B[rows]]), axis=1).T
    box_of_group: dict[int, int] = {}
    for group_index, stack_index in pairs.tolist():
        stack, group = stacks[stack_index], table.groups[group_index]
        assert stack is not None, "every stack of these rows was opened"
        ny, nx = stack.box_yx
        if ny != nx or nx % 2:
            odd = f"odd box of {nx} px" if ny == nx else f"images of {nx} x {ny} px"
            raise InputError(stack.path, odd, "square images with an even box", "Extract or resize the particles again.")
        expected = box_of_group.setdefault(group_index, group.box or nx)
        if nx != expected:
            raise InputError(
                stack.path, f"box of {nx} px", f"{expected} px, as optics group '{group.name}' of {table.source} says",
                "Correct rlnImageSize, or put these images into a group of their own.",
            )  # fmt: skip
    return box_of_group
