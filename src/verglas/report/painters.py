"""Processes of their own that draw the sections of a page: a run on a GPU soon waits for nothing but its figures.

They import what drawing needs while the run computes, share the sections, and end when the run does, however it ends.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import IO

import numpy as np

from verglas.io.progress import say
from verglas.report.page import Block, drawn_blocks
from verglas.report.sections import Histogram, Section

WARMING = Histogram("", np.zeros(1), "")  # drawn while there is time: imports what drawing needs, finds the fonts
PROGRAM = "from verglas.report.painters import paint; paint()"
MOST, CORES_EACH = 6, 2


def painters_for(cores: int) -> int:
    """How many to start on a machine of so many cores."""
    return max(1, min(MOST, cores // CORES_EACH))


class Painters(AbstractContextManager["Painters"]):
    """`count` processes that draw."""

    def __init__(self, count: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                             start_new_session=True)  # so that Ctrl-C is for the run alone
            for _ in range(count)
        ]  # fmt: skip

    def draw(self, sections: Sequence[Section]) -> list[Block]:
        """As `page.drawn_blocks`. Should one of the processes be gone, this one draws."""
        numbered, count = list(enumerate(sections)), len(self._processes)
        try:
            for i, process in enumerate(self._processes):
                assert process.stdin
                pickle.dump(numbered[i::count], process.stdin)
                process.stdin.flush()
            found = [pair for process in self._processes for pair in _answer(process.stdout)]
        except (EOFError, OSError, pickle.UnpicklingError):
            say("A process that draws the report has ended: it is drawn here.")
            return drawn_blocks(numbered)
        return [one for _, one in sorted(found, key=lambda pair: pair[0])]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            assert process.stdin and process.stdout
            process.kill()  # it owns nothing, and ends by itself more slowly
            with suppress(OSError):  # the pipe of one that has ended before
                process.stdin.close()
            process.stdout.close()
            process.wait()


def _answer(pipe: IO[bytes] | None) -> list[tuple[int, Block]]:
    assert pipe is not None
    found: list[tuple[int, Block]] = pickle.load(pipe)
    return found


def paint() -> None:
    """What the processes do: numbered sections in, numbered blocks out, until the input ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    drawn_blocks([(0, WARMING)])
    while True:
        try:
            numbered = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        blocks = drawn_blocks(numbered)
        pickle.dump([(number, one) for (number, _), one in zip(numbered, blocks)], answers)
        answers.flush()
