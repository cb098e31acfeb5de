"""Where a rank's host spends an iteration: seconds of every stage, each without those within it, so that all add up to the whole.

What a GPU does is not waited for at the end of a stage (it would change what is measured): its time shows where the host waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.gpu_busy import merged
from verglas.distributed.handout import Handout
from verglas.distributed.ranks import Ranks
from verglas.expectation.search import Searcher
from verglas.maximization import gather
from verglas.refinement import ahead, driver, expect, step
from verglas.refinement.dataset import Dataset
from verglas.refinement.expect import HalfExpectation

STAGES: dict[str, list[tuple[Any, str]]] = {
    "accuracy": [(step, "measure_accuracy")],
    "half-set begun": [(HalfExpectation, "__init__")],
    "slices begun": [(HalfExpectation, "searcher_of")],
    "order, handout": [(expect, "direction_order"), (Handout, "__init__"), (Dataset, "follow_speed")],
    "next block": [(Handout, "_own_piece"), (Handout, "_stolen")],
    "images": [(Dataset, "images_of")],
    "prepare": [(HalfExpectation, "_prepare")],
    "own lists": [(HalfExpectation, "_own")],
    "coarse": [(Searcher, "coarse")],
    "fine": [(Searcher, "fine")],
    "sums": [(expect, "weighted_slices"), (expect, "update_sums"), (gather.WeightedSlices, "add_to")],
    "half-set ended": [(HalfExpectation, "release")],
    "waiting for ranks": [(Ranks, "meet")],
    "adding up": [(step, "add_up")],
    "poses": [(step, "stored"), (step.sampling, "monitor_changes")],
    "maps": [(step, "maximise")],
    "state": [(driver, "same_everywhere"), (Ranks, "communication")],
}
REST = "rest"


class StageTimes:
    """Seconds by stage, and how often each was entered."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys([*STAGES, REST], 0.0)
        self.count = dict.fromkeys(STAGES, 0)
        self._inside: list[float] = []  # of every stage that is open: seconds of those within it
        self._changes: list[tuple[float, str]] = []  # time.time() from when on the host was in which stage
        self._open = [REST]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        def counting(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            self._inside.append(0.0)
            self._open.append(name)
            self._changes.append((time.time(), name))
            try:
                return function(*arguments, **options)
            finally:
                whole, within = time.perf_counter() - begin, self._inside.pop()
                self._open.pop()
                self._changes.append((time.time(), self._open[-1]))
                self.seconds[name] += whole - within
                self.count[name] += 1
                if self._inside:
                    self._inside[-1] += whole

        return counting

    def idle(self, busy: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Seconds of every stage in which the GPU did nothing. busy: from when to when it did something, s of time.time()."""
        found, after, apart = dict.fromkeys([*STAGES, REST], 0.0), 0, merged(busy)
        for (begin, name), (end, _) in zip(self._changes, self._changes[1:], strict=False):
            while after < len(apart) and apart[after][1] <= begin:
                after += 1
            covered, at = 0.0, after
            while at < len(apart) and apart[at][0] < end:
                covered += min(end, apart[at][1]) - max(begin, apart[at][0])
                at += 1
            found[name] += end - begin - covered
        return found

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, all stages are timed, and batches come one after the other, as stages of two threads would be one another's."""
        begin, patches = time.perf_counter(), [patch.object(ahead, "room_ahead", lambda *_: False)]
        for name, places in STAGES.items():
            patches += [patch.object(owner, one, self.timed(name, getattr(owner, one))) for owner, one in places]
        for one in patches:
            one.start()
        try:
            self._changes.append((time.time(), REST))
            yield
        finally:
            self._changes.append((time.time(), REST))
            for one in patches:
                one.stop()
            self.seconds[REST] += time.perf_counter() - begin - sum(self.seconds.values())


def table(columns: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Lines: milliseconds by stage, a column for each of (title, seconds by stage)."""
    names = [*STAGES, REST]
    lines = [f"{'ms':18s}" + "".join(f"{title:>20s}" for title, _ in columns)]
    lines += [f"{name:18s}" + "".join(f"{1000 * seconds[name]:20.1f}" for _, seconds in columns) for name in names]
    return [*lines, f"{'all':18s}" + "".join(f"{1000 * sum(seconds.values()):20.1f}" for _, seconds in columns)]
