"""Reading images that are scattered over stacks: open files kept, neighbours read as one, float32 whatever the file holds."""

from __future__ import annotations

from collections import OrderedDict
from io import FileIO
from pathlib import Path

import numpy as np
import torch

from verglas.errors import InputError
from verglas.io.mrc import Stack

OPEN_FILES = 64


class StackReader:
    """Reads images of a fixed list of stacks into arrays of the caller; one thread at a time, `close` when done."""

    def __init__(self, stacks: list[Stack | None]) -> None:
        """stacks: None for those that no image is read from."""
        self.stacks = stacks
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def read(self, stack_index_B: np.ndarray, image_index_B: np.ndarray, out_BYX: np.ndarray) -> None:
        """Fill out_BYX (float32) with the images; fast where neighbours in the list are neighbours in a file.

        Raises InputError if a file ends early or cannot be read.
        """
        follows = (np.diff(stack_index_B) == 0) & (np.diff(image_index_B) == 1)
        starts = np.concatenate([[0], np.flatnonzero(~follows) + 1, [len(stack_index_B)]])
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist()):
            if stop > start:
                self._read_run(int(stack_index_B[start]), int(image_index_B[start]), out_BYX[start:stop])

    def close(self) -> None:
        """Close the files that are still open."""
        while self._files:
            self._files.popitem()[1].close()

    def _read_run(self, stack_index: int, first: int, out_BYX: np.ndarray) -> None:
        stack = self.stacks[stack_index]
        assert stack is not None, "reading from a stack that was not opened"
        header, dtype = stack.header, stack.header.dtype
        raw_BYX = out_BYX if dtype == out_BYX.dtype else np.empty(out_BYX.shape, dtype)
        try:
            file = self._file(stack_index, stack.path)
            file.seek(header.offset + first * raw_BYX[0].nbytes)
            _fill(file, memoryview(raw_BYX.data).cast("B"), stack)
        except OSError as error:
            raise InputError(stack.path, f"cannot be read ({error.strerror})", "a readable stack", "Check the disk.") from error
        if dtype == np.float16:  # torch converts ten times faster than numpy
            torch.from_numpy(out_BYX).copy_(torch.from_numpy(raw_BYX))
        elif raw_BYX is not out_BYX:
            out_BYX[...] = raw_BYX

    def _file(self, stack_index: int, path: Path) -> FileIO:
        file = self._files.pop(stack_index, None) or FileIO(path)
        self._files[stack_index] = file
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file


def _fill(file: FileIO, view: memoryview, stack: Stack) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise InputError(
                stack.path, "became shorter after it was opened", f"{stack.n} images", "Do not write to it meanwhile."
            )
        view = view[count:]
