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
from typing import IO, TYPE_CHECKING

from verglas.core.imports import importing
from verglas.io.progress import say

if TYPE_CHECKING:  # the processes are to begin before the first import that takes time
    from verglas.report.page import Block
    from verglas.report.sections import Section

PROGRAM = "from verglas.cli.painters import paint; paint()"
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

    def draw(self, named: Sequence[tuple[str, Section]]) -> list[Block]:
        """As `page.drawn_blocks`. Should one of the processes be gone, this one draws."""
        from verglas.report.page import drawn_blocks

        count = len(self._processes)
        found: list[Block | None] = [None] * len(named)
        try:
            for i, process in enumerate(self._processes):
                assert process.stdin
                pickle.dump(named[i::count], process.stdin)
                process.stdin.flush()
            for i, process in enumerate(self._processes):
                found[i::count] = _answer(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            say("A process that draws the report has ended: it is drawn here.")
            return drawn_blocks(named)
        return [one for one in found if one is not None]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            assert process.stdin and process.stdout
            process.kill()  # it owns nothing, and ends by itself more slowly
            with suppress(OSError):  # the pipe of one that has ended before
                process.stdin.close()
            process.stdout.close()
            process.wait()


def _answer(pipe: IO[bytes] | None) -> list[Block]:
    assert pipe is not None
    found: list[Block] = pickle.load(pipe)
    return found


def paint() -> None:
    """What the processes do: sections with their names in, blocks out, until the input ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    with importing():
        import numpy as np

        from verglas.report.page import drawn_blocks
        from verglas.report.sections import Histogram

        drawn_blocks([("warming", Histogram("", np.zeros(1), ""))])  # imports what drawing needs, finds the fonts
    while True:
        try:
            named = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(drawn_blocks(named), answers)
        answers.flush()
