"""CPU processes that help with an expectation while GPUs do most of it: what the ranks they belong to see of them.

When an expectation begins a helper is given the models and some particles of a set that the ranks come to late. It works on
them by itself (`verglas.refinement.helper`) and gives its sums and poses back before the ranks are through with the others. They
are added to those of its rank. What did not come back in time, or from a helper that died, the ranks work on themselves. The
ranks wait for no helper, and their groups know nothing of it.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from verglas.distributed.lending import SHORTEST, TRIAL, Found, Lending
from verglas.distributed.ranks import ALONE, Ranks
from verglas.distributed.wire import Packed, Wire
from verglas.maximization.gather import BatchResult
from verglas.maximization.sums import Sums
from verglas.refinement.config import RefineConfig
from verglas.refinement.state import HalfModel, Poses, direction_order

if TYPE_CHECKING:
    from verglas.particles.table import ParticleTable
    from verglas.refinement.computing import Plan
    from verglas.refinement.dataset import Dataset
    from verglas.refinement.expect import Finished, HalfExpectation

CORES_OF_RANK = 2  # that a rank with a GPU keeps for itself: starting kernels, reading images, writing files
FEWEST_THREADS = 4  # of a helper that nobody asked for
NICE = 19  # a helper yields to everything else on the computer
WAITED = 0.25  # of the time of doing its particles once more, a helper that is late is waited for


@dataclass(frozen=True)
class Begin:
    """What a helper gets once: the table of the run, how many threads it may use, and how far it yields to other programs."""

    table: ParticleTable
    config: RefineConfig
    threads: int
    nice: int


@dataclass(frozen=True)
class Task:
    """An expectation of some rows. kind: what works through them; trial: nothing is given back but how long it took; at: when it
    was sent (time.monotonic, which all processes of a computer share)."""

    number: int
    kind: type[HalfExpectation]
    models: list[HalfModel]
    poses: Poses
    plan: Plan
    config: RefineConfig
    rows: Tensor
    trial: bool
    at: float


@dataclass(frozen=True)
class Answer:
    """What a helper found. packed: (sums, how many slices) of all that slices were added to; at: when it was done."""

    number: int
    begin: float
    per_row: float
    at: float
    sums: Sums | None = None
    packed: list[tuple[Tensor, int]] = field(default_factory=list)
    found: list[tuple[Tensor, BatchResult]] = field(default_factory=list)


class Helper:
    """One helper process. It starts behind the back of its rank, and `ready` says when it has; nothing but `answer` waits."""

    def __init__(self, begin: Begin) -> None:
        ours, theirs = socket.socketpair()
        self.wire, self.ready, self.reason = Wire(ours), False, ""
        self.lending, self.rows, self.task = Lending(), torch.empty(0, dtype=torch.int64), -1  # that it is at; -1: nothing
        self.lends = False
        left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        threads = {f"{name}_NUM_THREADS": str(begin.threads) for name in ("OMP", "MKL", "NUMBA")}
        words = [sys.executable, "-m", "verglas.refinement.helper", str(theirs.fileno())]
        self.process = subprocess.Popen(
            words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            env=environment | threads | {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        theirs.close()
        self._answers: queue.SimpleQueue[tuple[Answer | None, float]] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outgoing.put(begin)
        for work in (self._send, self._receive):
            Thread(target=work, daemon=True).start()

    @property
    def free(self) -> bool:
        """Whether it can be given something."""
        return self.ready and self.task < 0 and not self.reason

    def give(self, task: Task) -> None:
        """Have it begin with that."""
        self.rows, self.task, self.lends = task.rows, task.number, not task.trial
        self._outgoing.put(Packed.of(task))

    def drop(self) -> None:
        """Have it leave what it is at; it is free when it has seen that."""
        self._outgoing.put(self.task)

    def answer(self, seconds: float = 0.0) -> tuple[Answer, float] | None:
        """What it has found, and when that came, if it comes within so many seconds."""
        try:
            answer, at = self._answers.get(timeout=seconds) if seconds else self._answers.get_nowait()
        except queue.Empty:
            return None
        self.task = -1
        return None if answer is None else (answer, at)

    def end(self) -> None:
        """End the process, whatever it is at: it has no files."""
        self._outgoing.put(None)
        self.process.kill()
        self.process.wait()
        self.wire.close()

    def _send(self) -> None:
        while (value := self._outgoing.get()) is not None:
            try:
                self.wire.send(value)
            except OSError:
                return

    def _receive(self) -> None:
        """Everything the helper says: True when it can begin, its answers, and a text if it cannot go on."""
        try:
            while True:
                said = self.wire.receive()
                if isinstance(said, str):
                    self.reason = said
                elif said is True:
                    self.ready = True
                else:
                    self._answers.put((said, time.monotonic()))
        except (EOFError, OSError):
            self.reason = self.reason or "its process has ended"
            self._answers.put((None, 0.0))


class Helpers(AbstractContextManager["Helpers"]):
    """All helpers of a rank; `lend` and `run` are called by all ranks alike. Without any (`NOBODY`) they do nothing.

    data: the particles that helpers know, None: no rank has any; begin: what they get first; ranks: that share the run; wanted:
    how many this rank may have. They are started when an expectation takes long enough for them to be of use.
    """

    def __init__(
        self, data: Dataset | None = None, begin: Begin | None = None, ranks: Ranks = ALONE, wanted: int = 0
    ) -> None:
        self.data, self.begin, self.ranks, self.wanted = data, begin, ranks, wanted
        self.helpers: list[Helper] = []
        self._lent_n = self._nothing = torch.empty(0, dtype=torch.int64)
        self._set: Tensor | None = None  # rows of the set that this rank's helpers help with
        self._began, self._number, self._total = 0.0, 0, 0
        self._worked, self._all = 0, 0  # rows that helpers worked on, and all, since they were last read

    @classmethod
    def beside(cls, data: Dataset, config: RefineConfig, ranks: Ranks, wanted: int, threads: int) -> Self:
        """Those of this rank, `wanted` of them, of so many threads each. All ranks call it, if any has one."""
        return cls(data, Begin(data.table, config, threads, NICE), ranks, wanted)

    def start(self) -> None:
        """Start the processes, unless that was done."""
        if self.begin is not None and not self.helpers:
            self.helpers = [Helper(self.begin) for _ in range(self.wanted)]

    def __exit__(self, *_: object) -> None:
        for helper in self.helpers:
            helper.end()

    def lend(
        self, kind: type[HalfExpectation], sets: list[tuple[list[HalfModel], Tensor]], poses: Poses, data: Dataset, plan: Plan,
        config: RefineConfig,
    ) -> None:  # fmt: skip
        """At the beginning of an expectation: give helpers rows of a late set, but not of a small one; of ranks that have sets
        apart rows of their own one. sets: models and rows."""
        self._lent_n, self._set, self._began = self._nothing, None, time.perf_counter()
        if self.data is None or data is not self.data:
            return
        self._total, largest = sum(len(rows) for _, rows in sets), max(len(rows) for _, rows in sets)
        models, rows = next((models, rows) for models, rows in reversed(sets) if 2 * len(rows) >= largest)
        parts = self.ranks.size
        if data.shares is not None and data.shares.half_B is not None:
            models, rows = max(sets, key=lambda one: len(self._own_of(one[1])))
            parts = max(1, round(len(rows) / max(1, len(self._own_of(rows)))))
        self._set = rows
        lent_n, most = self._nothing, len(rows) // (2 * parts * max(1, len(self.helpers)))
        self.hear()
        for helper in self.helpers:
            trial = helper.free and helper.lending.wants_trial(self._total)
            count = min(TRIAL, most) if trial else helper.lending.rows(self._total, most) if helper.free else 0
            if count == 0:
                continue
            begin, self._number = time.perf_counter(), self._number + 1
            mine_n = self._own(rows, poses, plan)[len(lent_n) : len(lent_n) + count]
            helper.give(Task(self._number, kind, models, poses, plan, config, mine_n, trial, time.monotonic()))
            helper.lending.cost = time.perf_counter() - begin
            lent_n = lent_n if trial else torch.cat([lent_n, mine_n])
        self._lent_n = torch.cat(self.ranks.everyones(lent_n, "lent"))

    def help_with(self, rows: Tensor) -> bool:
        """Whether this is the set that this rank's helpers help with."""
        return rows is self._set

    def begun(self, half: HalfExpectation, rows: Tensor, helps: bool = True) -> Iterator[Callable[[], Finished]]:
        """As `half.begun(rows, helps)`, rows being those of a set, without those that were lent; then one batch after the other,
        as what helpers find is added afterwards."""
        if len(self._lent_n) == 0:
            return half.begun(rows, helps)
        return (partial(list, [found]) for found in half.run(without(rows, self._lent_n, len(half.data)), helps))

    def rest(self, sets: list[tuple[HalfExpectation, Tensor]]) -> Iterator[Callable[[], Finished]]:
        """When all else is through: what helpers found, and the rows of these sets that did not come back. How long the
        expectation took tells what can be lent the next time."""
        if self._set is None:
            return
        if len(self._lent_n) == 0:
            self._through(time.perf_counter() - self._began, 0)
            return
        half = next(half for half, rows in sets if rows is self._set)
        if half.on.device.type == "cuda":  # sums are fetched from there anyway when a set is through
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        back, missing_n = self._taken_back(half, seconds)
        yield from (partial(list, [found]) for found in back)
        missing_n = torch.cat(self.ranks.everyones(missing_n, "not back"))
        for half, rows in sets:
            here_n = missing_n[torch.isin(missing_n, rows)]
            if len(here_n):
                half.name = None
                yield from (partial(list, [found]) for found in half.run(here_n))
        self._through(seconds, len(self._lent_n) - len(missing_n))

    def _through(self, seconds: float, worked: int) -> None:
        """An expectation took so long without what was lent; helpers worked on so many rows."""
        self._worked, self._all = self._worked + worked, self._all + self._total
        for helper in self.helpers:
            helper.lending.passed(self._total - len(self._lent_n), seconds)
        if seconds >= SHORTEST:
            self.start()

    def record(self) -> dict[str, Any] | None:
        """What helpers did since this was last asked for, in terms of JSON; None if nothing was asked of them. said: in words, of
        those of this rank."""
        if self._all == 0:
            return None
        said = "; ".join(map(_told, self.helpers)) or f"the CPU took {self._worked} of {self._all} particles"
        if self.wanted and not self.helpers:
            said = f"the CPU rests: no expectation took {SHORTEST:g} s, and from a shorter one it would not be back in time"
        found = {"particles": self._worked, "share": self._worked / self._all, "said": said}
        self._worked = self._all = 0
        return found

    def _own(self, rows: Tensor, poses: Poses, plan: Plan) -> Tensor:
        """The rows that this rank begins with, of the largest optics group; where neighbours in direction share slices, in their
        order."""
        assert self.data is not None
        own_n = self._own_of(rows)
        group_n = self.data.group_B[own_n]
        own_n = own_n[group_n == group_n.mode().values] if len(own_n) else own_n
        return own_n[torch.argsort(direction_order(poses.rotation_B33[own_n]))] if plan.schedule.local_sigma else own_n

    def _own_of(self, rows: Tensor) -> Tensor:
        shares = None if self.data is None else self.data.shares
        return rows if shares is None else rows[shares.owner_B[rows] == self.ranks.rank]

    def _taken_back(self, half: HalfExpectation, seconds: float) -> tuple[list[tuple[Tensor, BatchResult]], Tensor]:
        """Add what this rank's helpers found to its own; (rows and their results, rows that did not come back)."""
        found, missing = list[tuple[Tensor, BatchResult]](), [self._nothing]
        for helper in self.helpers:
            if not helper.lends:
                continue
            helper.lends, came = False, helper.answer(WAITED * len(helper.rows) * seconds / max(1, self._total) + 1e-3)
            if came is None:
                missing.append(helper.rows)
                if not helper.reason:
                    helper.drop()
                    helper.lending.late()
                continue
            begin = time.perf_counter()
            answer, at = came
            assert answer.sums is not None
            half.add_sums(answer.sums, answer.packed)
            found += [(rows, result.to(half.on.device)) for rows, result in answer.found]
            helper.lending.cost += time.perf_counter() - begin
            helper.lending.heard(Found(answer.begin, answer.per_row, at - answer.at), lent=True)
        return found, torch.cat(missing)

    def hear(self) -> None:
        """Take in what helpers have said: how long a trial took, or that they have left what came too late."""
        for helper in self.helpers:
            if helper.task >= 0 and not helper.reason and (came := helper.answer()) is not None:
                answer, at = came
                if answer.per_row > 0:
                    helper.lending.heard(Found(answer.begin, answer.per_row, at - answer.at), lent=False)


NOBODY = Helpers()


def _told(helper: Helper) -> str:
    return f"the CPU does not help any more: {helper.reason}" if helper.reason else helper.lending.told


def without(rows: Tensor, left_out: Tensor, total: int) -> Tensor:
    """Rows but for some of them, in their order. total: of the table."""
    if len(left_out) == 0:
        return rows
    keep_B = torch.ones(total, dtype=torch.bool)
    keep_B[left_out] = False
    return rows[keep_B[rows]]


def threads_beside(cores: int, ranks: int, helpers: int) -> int:
    """Threads of each of so many helpers of a host with so many cores and ranks with a GPU: what these leave."""
    return max(1, (cores - CORES_OF_RANK * ranks) // max(1, helpers))


def helpers_of_host(asked: str, cuda: bool, cores: int, ranks: int) -> int:
    """How many helpers a host gets. asked: a number, or auto: one if it has enough cores beside those of the ranks with GPUs."""
    if asked != "auto":
        return int(asked)
    return int(cuda and threads_beside(cores, ranks, 1) >= FEWEST_THREADS)
