"""Work done behind the computing: one thing at a time, in order, in one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType

from verglas.errors import OutputError


class Behind(AbstractContextManager["Behind"]):
    """`do(work)` starts `work` in a thread once everything before it is done, and returns; with most=0 does it at once.

    An error of the work is raised by a later `do`, or at the end of the `with`, which waits for what is under way. `do` waits
    until it has no more than `most` pieces: so many can be missing on the disk after a kill.
    """

    def __init__(self, most: int) -> None:
        self._threads = ThreadPoolExecutor(1, "verglas-writes", _computing, (_threads_here(),)) if most else None
        self._most = most
        self._begun: deque[Future[None]] = deque()

    def do(self, work: Callable[[], None]) -> None:
        """Do `work` after all before it."""
        if self._threads is None:
            work()
            return
        self._wait(self._most - 1)
        self._begun.append(self._threads.submit(work))

    @property
    def waiting(self) -> int:
        """Pieces that nobody has begun."""
        return sum(not (one.running() or one.done()) for one in tuple(self._begun))

    def _wait(self, left: int) -> None:
        """Until no more than so many pieces are left. After an error none of those behind it is waited for again."""
        while self._begun and (len(self._begun) > left or self._begun[0].done()):
            self._begun.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._threads is None:
            return
        try:
            if error is None:
                self._wait(0)
        finally:
            self._threads.shutdown(wait=True)


def written(files: Future[None]) -> None:
    """Wait for files that are written beside another one: what goes wrong with them is no fault of that one. OutputError says
    whose it is."""
    error = files.exception()
    if isinstance(error, OSError):
        raise OutputError(f"{error.filename or 'A file of the run'} could not be written: {error.strerror or error}.") from error
    files.result()


def _threads_here() -> int:
    """Threads of torch that the one that asks computes with."""
    import torch

    return torch.get_num_threads()


def _computing(threads: int) -> None:
    """With so many from now on: the host of a GPU goes on with a single one meanwhile (`driver.own_threads`)."""
    import torch

    torch.set_num_threads(threads)
