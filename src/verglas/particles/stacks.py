"""Reading images that are scattered over stacks: neighbours read as one, by several threads at once, into the caller's array."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from verglas.errors import InputError
from verglas.io.mrc import Stack

READERS = 8  # threads: disks and networks are fastest with several requests under way
TASK_BYTES = 2**22  # that one thread reads before it takes the next task

Run = tuple[int, int, int]  # first image in the file, first place in the array, number of images


class StackReader:
    """Reads images of a fixed list of stacks into arrays of the caller, with threads of its own; `close` when done."""

    def __init__(self, stacks: list[Stack | None], threads: int = READERS) -> None:
        """stacks: None for those that no image is read from."""
        self.stacks = stacks
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verglas-disk")

    def read(self, stack_index_B: np.ndarray, image_index_B: np.ndarray, out_BYX: np.ndarray) -> None:
        """Fill out_BYX with the images. Fastest where its type is the files' (nothing is copied) and neighbours in the list are
        neighbours in a file.

        Raises InputError if a file ends early or cannot be read.
        """
        types = {stack.header.dtype for i in np.unique(stack_index_B) if (stack := self.stacks[i]) is not None}
        if types == {out_BYX.dtype}:
            self._read(stack_index_B, image_index_B, out_BYX)
            return
        for dtype in types:
            mine_B = np.array([stack is not None and stack.header.dtype == dtype for stack in self.stacks])[stack_index_B]
            raw_BYX = np.empty((int(mine_B.sum()), *out_BYX.shape[1:]), dtype)
            self._read(stack_index_B[mine_B], image_index_B[mine_B], raw_BYX)
            if dtype == np.float16 and mine_B.all() and out_BYX.dtype == np.float32:  # torch converts ten times faster
                torch.from_numpy(out_BYX).copy_(torch.from_numpy(raw_BYX))
            else:
                out_BYX[mine_B] = raw_BYX

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, stack_index_B: np.ndarray, image_index_B: np.ndarray, out_BYX: np.ndarray) -> None:
        """Fill an array of the files' type: tasks of neighbouring images, in the order of the files."""
        waiting = [
            self._pool.submit(_read_runs, self.stacks[stack_index], runs, out_BYX)
            for stack_index, runs in _tasks(stack_index_B, image_index_B, out_BYX[:1].nbytes)
        ]
        try:
            for task in waiting:
                task.result()
        finally:  # nobody writes into the array after an error
            for task in waiting:
                task.cancel()
            for task in waiting:
                if not task.cancelled():
                    task.exception()


def _tasks(stack_index_B: np.ndarray, image_index_B: np.ndarray, image_bytes: int) -> list[tuple[int, list[Run]]]:
    """What to read, (stack, its runs), at most about TASK_BYTES each. A run lies together in the file and in the array."""
    order_B = np.lexsort((image_index_B, stack_index_B))
    stack_B, image_B = stack_index_B[order_B], image_index_B[order_B]
    follows_B = (np.diff(stack_B) == 0) & (np.diff(image_B) == 1) & (np.diff(order_B) == 1)
    starts = np.concatenate([[0], np.flatnonzero(~follows_B) + 1]) if len(order_B) else np.zeros(0, np.int64)
    lengths = np.diff(np.concatenate([starts, [len(order_B)]]))
    largest = max(1, TASK_BYTES // image_bytes)
    tasks: list[tuple[int, list[Run]]] = []
    room = 0
    for stack, first, place, length in zip(*(a.tolist() for a in (stack_B[starts], image_B[starts], order_B[starts], lengths))):
        for done in range(0, length, largest):
            count = min(largest, length - done)
            if not tasks or tasks[-1][0] != stack or count > room:
                tasks.append((stack, []))
                room = largest
            tasks[-1][1].append((first + done, place + done, count))
            room -= count
    return tasks


def _read_runs(stack: Stack | None, runs: list[Run], out_BYX: np.ndarray) -> None:
    assert stack is not None, "reading from a stack that was not opened"
    try:
        file = os.open(stack.path, os.O_RDONLY)
        try:
            for first, place, count in runs:
                view = memoryview(out_BYX[place : place + count].data).cast("B")
                _fill(file, view, stack.header.offset + first * len(view) // count, stack)
        finally:
            os.close(file)
    except OSError as error:
        raise InputError(stack.path, f"cannot be read ({error.strerror})", "a readable stack", "Check the disk.") from error


def _fill(file: int, view: memoryview, offset: int, stack: Stack) -> None:
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise InputError(
                stack.path, "became shorter after it was opened", f"{stack.n} images", "Do not write to it meanwhile."
            )
        view, offset = view[count:], offset + count
