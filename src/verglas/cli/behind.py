"""Work done behind the computing: one thing at a time, in order, in one thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType


class Behind(AbstractContextManager["Behind"]):
    """`do(work)` starts `work` in a thread once everything before it is done, and returns; behind=False: does it at once.

    An error of the work is raised by the next `do`, or at the end of the `with`, which waits for what is under way. So no
    more than one piece of work is ever missing on the disk.
    """

    def __init__(self, behind: bool) -> None:
        self._threads = ThreadPoolExecutor(1, "verglas-writes") if behind else None
        self._last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Do `work` after all before it; waits for those."""
        if self._threads is None:
            work()
            return
        self._wait()
        self._last = self._threads.submit(work)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._threads is None:
            return
        try:
            if error is None:
                self._wait()
        finally:
            self._threads.shutdown(wait=True)
