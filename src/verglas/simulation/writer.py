"""Writing a stack while the next images are being computed: device -> pinned memory -> a thread that writes."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from verglas.errors import OutputError
from verglas.io.mrc import StackWriter
from verglas.optics.group import OpticsGroup

BUFFERS = 3
PIXELS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}


@dataclass(frozen=True)
class Block:
    """The first `count` images of a buffer, and their smallest, largest, sum, sum of squares (float64 [4], before rounding).

    copied: done once the copy from a GPU has arrived; None where nothing was copied.
    """

    image_BYX: Tensor
    statistics: Tensor
    count: int
    copied: torch.cuda.Event | None


class OverlappedWriter:
    """Hands batches of images to `stack` in a thread; at most BUFFERS batches are under way.

    with OverlappedWriter(stack, batch, device) as writer:
        writer.put(image_BYX)          # float32 on the device; returns before the images are written
    An error of the thread is raised by the next `put` or at the end of the `with`.
    """

    def __init__(self, stack: StackWriter, batch: int, device: torch.device) -> None:
        self.stack = stack
        self.dtype = torch.float16 if stack.dtype == "float16" else torch.float32
        self.on_gpu = device.type == "cuda"
        self._full: queue.Queue[Block | None] = queue.Queue(BUFFERS)
        self._free: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue()
        for _ in range(BUFFERS if self.on_gpu else 0):
            images = torch.empty(batch, *stack.box_yx, dtype=self.dtype, pin_memory=True)
            self._free.put((images, torch.empty(4, dtype=torch.float64, pin_memory=True)))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stack writer", daemon=True)

    def __enter__(self) -> OverlappedWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._full.put(None)
        self._thread.join()
        if error is None:
            self._raise_error()

    def put(self, image_BYX: Tensor) -> None:
        """Queue float32 images [B, Y, X]; rounding, statistics and copy are started on their device."""
        self._raise_error()
        statistics = torch.stack([image_BYX.min().double(), image_BYX.max().double(), image_BYX.sum(dtype=torch.float64),
                                  image_BYX.square().sum(dtype=torch.float64)])  # fmt: skip
        rounded_BYX = image_BYX.to(self.dtype)
        count = len(rounded_BYX)
        if not self.on_gpu:
            self._full.put(Block(rounded_BYX, statistics, count, None))
            return
        images, numbers = self._free.get()
        images[:count].copy_(rounded_BYX, non_blocking=True)
        numbers.copy_(statistics, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._full.put(Block(images, numbers, count, copied))

    def _run(self) -> None:
        while (block := self._full.get()) is not None:
            if self._error is None:
                self._write(block)
            if block.copied is not None:
                self._free.put((block.image_BYX, block.statistics))

    def _write(self, block: Block) -> None:
        try:
            if block.copied is not None:
                block.copied.synchronize()
            smallest, largest, total, squares = block.statistics.tolist()
            self.stack.append_measured(block.image_BYX[: block.count].numpy(), (smallest, largest, total, squares))
        except BaseException as error:
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class Delivery:
    """How images are computed and stored: device, float16 or float32, images per batch (None: by their size)."""

    device: torch.device
    float16: bool
    batch: int | None = None

    def batch_for(self, box: int) -> int:
        """Images of `box` px to compute at once."""
        return self.batch or max(1, PIXELS_AT_ONCE[self.device.type] // box**2)


def write_stack(
    path: Path, group: OpticsGroup, index_B: Tensor, images: Callable[[Tensor], Tensor], delivery: Delivery,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Write the images of particles `index_B`, in this order. images: from indices to float32 [B, box, box] on the device."""
    batch = min(delivery.batch_for(group.box), len(index_B))
    dtype = "float16" if delivery.float16 else "float32"
    with (
        StackWriter(path, len(index_B), (group.box, group.box), group.pixel_size, dtype) as stack,
        OverlappedWriter(stack, batch, delivery.device) as writer,
    ):
        for part in index_B.split(batch):
            writer.put(images(part))
            advance(len(part))


def check_disk(folder: Path, needed: int) -> None:
    """Raise OutputError if the disk of `folder` (which need not exist yet) has less than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"The images need {needed / 1e9:.2f} GB, but {folder} has only {free / 1e9:.2f} GB free. "
                          "Make fewer or smaller images, use --float16, or choose another disk.")  # fmt: skip
