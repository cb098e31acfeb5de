"""The process of a helper (`verglas.refinement.helpers`): expectations of a few particles, on CPU cores that nobody else wants.

Started as `python -m verglas.refinement.helper FD` by its rank, which is at the other end of that socket. It ends when the rank
does, and has no files of its own.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

import torch

from verglas.distributed.wire import Wire
from verglas.maximization.gather import BatchResult
from verglas.refinement.computing import Computing
from verglas.refinement.costs import GB
from verglas.refinement.dataset import Dataset
from verglas.refinement.driver import computing
from verglas.refinement.helpers import Answer, Begin, Task
from verglas.refinement.residency import Residency

PARTS = 4  # of a task: between them it can be left, and they tell what a particle takes
STREAMED = 0.26 * GB  # of images in memory at once


class Inbox:
    """Tasks as they come. dropped: the number of the last one that is not wanted any more."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.dropped = wire, -1
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        Thread(target=self._receive, daemon=True).start()

    def next(self) -> Task:
        """The next task; waits for it."""
        return self._tasks.get()

    def _receive(self) -> None:
        try:
            while True:
                said = self.wire.receive()
                if isinstance(said, int):
                    self.dropped = said
                else:
                    self._tasks.put(said)
        except (EOFError, OSError):  # the rank has ended
            os._exit(0)


def serve(wire: Wire) -> None:
    """Work on task after task until the rank has none and ends."""
    begin = wire.receive()
    assert isinstance(begin, Begin)
    os.nice(begin.nice)
    torch.set_num_threads(begin.threads)
    config = replace(begin.config, precision="double" if begin.config.precision == "double" else "single", memory_gb=None)
    on, _ = computing(torch.device("cpu"), config, begin.threads)
    data = Dataset.read(begin.table, "cpu", Residency("disk", None, STREAMED))
    wire.send(True)
    inbox = Inbox(wire)
    while True:
        task = inbox.next()
        wire.send(answer_to(task, data, on, inbox))


def answer_to(task: Task, data: Dataset, on: Computing, inbox: Inbox) -> Answer:
    """The expectation of a task's rows; per_row is 0 where it was left before that is known."""
    half = task.kind(task.models, data, task.poses, task.plan, task.config, on)
    found, ends = list[tuple[torch.Tensor, BatchResult]](), [time.monotonic()]
    parts = task.rows.split(max(1, -(-len(task.rows) // PARTS)))
    for part in parts:
        if inbox.dropped == task.number:
            break
        found += half.run(part)
        ends.append(time.monotonic())
    per_row = 0.0
    if len(ends) > 2:  # the first part also makes what all need
        per_row = (ends[-1] - ends[1]) / sum(len(part) for part in parts[1 : len(ends) - 1])
    begin = max(0.0, ends[min(1, len(ends) - 1)] - task.at - per_row * len(parts[0]))
    if task.trial or len(ends) <= len(parts):
        return Answer(task.number, begin, per_row, time.monotonic())
    half.release()
    packed = [one.packed() for one in half.sums_of_slices()]
    return Answer(task.number, begin, per_row, time.monotonic(), half.sums, packed, found)


def main() -> None:
    """Serve the rank at the other end of the socket of that number."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the rank, which ends this
    with suppress(OSError):  # where memory runs out, Linux ends this process first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    try:
        serve(wire)
    except (EOFError, ConnectionError):  # the rank has ended
        return
    except Exception as error:
        wire.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
