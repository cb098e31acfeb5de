"""The processes (ranks) of one run, and what they say to one another.

A run of one process has `ALONE`, whose methods do nothing: nobody needs to ask how many there are. Ranks are started by
torchrun, by srun or by --gpus (verglas.cli.launch), never by verglas itself; `meeting.joined` makes them one group.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from verglas.distributed.links import Links, all_gather
from verglas.distributed.meter import Kind, Meter, record_of
from verglas.distributed.place import LAST_WORDS
from verglas.distributed.pulse import Farewell, Pulse
from verglas.distributed.ways import Ways
from verglas.distributed.wire import packed, unpacked
from verglas.distributed.work import Work
from verglas.errors import VerglasError

T = TypeVar("T")
CPU = torch.device("cpu")
LOOK = 2e-4  # s between two looks whether all ranks have met
HEAD, SHORT, BRIEF = 8, 1 << 16, 1 << 13  # bytes of a letter's length; of what the lead, and each rank, says in one message


@dataclass(frozen=True)
class Ranks:
    """rank 0, the lead, writes and decides; the others compute. local_size: how many there are on this host; store: small numbers
    that all can see; sequence: numbers what all ranks do in the same order; meter: what travels, under the names it is given;
    ways: what is switched off; work: what this rank has worked on; pulse: tells the others that this one lives, and ends it when
    another one is lost; behind: group of what travels while other messages do, None: that of all messages; links: between GPUs,
    being made."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    store: dist.Store | None = None
    sequence: Iterator[int] = field(default_factory=count)
    meter: Meter = field(default_factory=Meter)
    ways: Ways = field(default_factory=Ways)
    work: Work = field(default_factory=Work)
    pulse: Pulse | None = None
    behind: dist.ProcessGroup | None = None
    links: Links | None = None

    @property
    def is_lead(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def doing(self, stage: str, done: int = 0, part: str | None = None) -> None:
        """Tell the others what this rank is at, how many particles of that are done, and in which part of the run (until another
        is named). One that says nothing new for long while others wait for it is taken to be stuck."""
        if self.pulse is not None:
            self.pulse.doing(stage, done, part)

    @contextmanager
    def ending(self, farewell: Farewell) -> Iterator[None]:
        """Within, if this process is ended because another one was lost, farewell(reason) is called; what it returns is said."""
        with nullcontext() if self.pulse is None else self.pulse.ending(farewell):
            yield

    def idle(self) -> AbstractContextManager[None]:
        """Within, this rank waits for something to do: however long that takes, nobody is stuck."""
        return nullcontext() if self.pulse is None else self.pulse.idle()

    def agreed(self, value: T, name: str = "decisions", meeting: bool = True) -> T:
        """The lead's value, on all ranks. Not for large tensors: it is pickled. meeting: the lead waits for the others,
        too, as it has to where it may end after that."""
        if self.size == 1:
            return value
        if meeting:
            self.meet(f"{name}: the lead")
        mine = packed(value) if self.is_lead else b""
        first = letter(mine, SHORT)
        with self._sending("wait", f"{name}: the lead", 0):  # for its decision, more than for the few bytes
            dist.broadcast(first, 0)
        length, started = length_of(first), time.perf_counter()
        text = first[HEAD : HEAD + length] if length <= SHORT else letter(mine, length)[HEAD:]
        if length > SHORT:
            with self.together(name):
                dist.broadcast(text, 0)
        self.meter.count("broadcast", name, length, self.size).seconds += time.perf_counter() - started
        found: T = value if self.is_lead else unpacked(text.numpy().tobytes())
        return found

    def everyones(self, value: T, name: str = "counts") -> list[T]:
        """The values of all ranks, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        mine = packed(value)
        with self._sending("all-gather", name, len(mine) * self.size):
            rows_RN = self._letters(mine, BRIEF)
            if (longest := max(map(length_of, rows_RN))) > BRIEF:
                rows_RN = self._letters(mine, longest)
        return [unpacked(row_N[HEAD : HEAD + length_of(row_N)].numpy().tobytes()) for row_N in rows_RN]

    def _letters(self, mine: bytes, room: int) -> Tensor:
        """The letters of all ranks, [R, HEAD + room]."""
        all_N = torch.empty(self.size * (HEAD + room), dtype=torch.uint8)
        all_gather(all_N, letter(mine, room))
        return all_N.view(self.size, -1)

    def counts(self, number: int, name: str = "counts") -> list[int]:
        """The numbers of all ranks, in their order, on all ranks."""
        if self.size == 1:
            return [number]
        all_R = torch.empty(self.size, dtype=torch.int64)
        with self._sending("all-gather", name, all_R.nbytes):
            all_gather(all_R, torch.tensor([number]))
        return all_R.tolist()

    def numbers(self, mine: Sequence[int], name: str) -> list[list[int]]:
        """A few numbers of every rank, on all ranks; what that takes is counted as waiting for the others."""
        if self.size == 1:
            return [list(mine)]
        all_RN = torch.empty(self.size * len(mine), dtype=torch.int64)
        with self._sending("wait", name, 0):
            all_gather(all_RN, torch.tensor(mine))
        found: list[list[int]] = all_RN.view(self.size, -1).tolist()
        return found

    def of_lead(self, tensor: Tensor, name: str) -> Tensor:
        """The lead's tensor, on all ranks; theirs has the same shape."""
        return self.of_rank(0, tensor.contiguous(), name)

    def of_rank(self, rank: int, tensor: Tensor, name: str) -> Tensor:
        """A rank's tensor, on all ranks: in place of theirs, which are contiguous and have the same shape."""
        if self.size > 1:
            with self._sending("broadcast", name, tensor.nbytes, tensor.device):
                dist.broadcast(tensor, rank)
        return tensor

    def exchanged(self, parts: list[Tensor], shapes: Sequence[tuple[int, ...]], name: str, even: bool = True) -> list[Tensor]:
        """Each rank's part for each: parts[q] goes to rank q; what comes from rank q has shapes[q]. even: one's own part
        counts as 1 / R of what is sent, as in the formulas of traffic; else as what it is."""
        return self._exchanging(parts, shapes, name, None, even=even)()

    def exchanging(
        self, parts: list[Tensor], shapes: Sequence[tuple[int, ...]], name: str, lent: bool = False
    ) -> Callable[[], list[Tensor]]:
        """As `exchanged`, but returns while they travel; what it returns waits for them and gives them. Between GPUs nothing else
        is sent until then. lent: nobody changes the parts until then; they are not copied if they lie side by side."""
        return self._exchanging(parts, shapes, name, self.behind, lent)

    def _exchanging(
        self, parts: list[Tensor], shapes: Sequence[tuple[int, ...]], name: str, group: dist.ProcessGroup | None,
        lent: bool = False, even: bool = True,
    ) -> Callable[[], list[Tensor]]:
        self.connected(parts[0].device)
        sent = side_by_side(parts) if lent else torch.cat([part.flatten() for part in parts])
        counts = [math.prod(shape) for shape in shapes]
        found = sent.new_empty(sum(counts))
        sizes = [part.numel() for part in parts]
        counted = sent.nbytes  # of which the meter takes off 1 / R for one's own part
        if not even and self.size > 1:
            counted = round((sent.nbytes - parts[self.rank].nbytes) * self.size / (self.size - 1))
        entry = self.meter.count("all-to-all", name, counted, self.size)
        work = dist.all_to_all_single(found, sent, counts, sizes, group=group, async_op=True)
        assert work is not None

        def finish() -> list[Tensor]:
            with self.together(name), self.meter.standing(entry, sent.device):
                work.wait()
            return [one.view(shape) for one, shape in zip(found.split(counts), shapes, strict=True)]

        return finish

    def gathering(self, mine: Tensor, name: str) -> Callable[[], Tensor]:
        """Tensors of one shape, of all ranks, [ranks, ...]; returns while they travel, as `exchanging` does."""
        self.connected(mine.device)
        found = mine.new_empty(self.size * len(mine), *mine.shape[1:])
        entry = self.meter.count("all-gather", name, found.nbytes, self.size)
        work = all_gather(found, mine.contiguous(), group=self.behind, async_op=True)
        assert work is not None

        def finish() -> Tensor:
            with self.together(name), self.meter.standing(entry, found.device):
                work.wait()
            return found.view(self.size, *mine.shape)

        return finish

    def add_up(self, tensor: Tensor, name: str) -> Tensor:
        """Sum over all ranks, in place and returned. All get the same bits: each part is added up in one place."""
        if self.size > 1:
            with self._sending("all-reduce", name, tensor.nbytes, tensor.device):
                dist.all_reduce(tensor)
        return tensor

    def greatest(self, tensor: Tensor, name: str) -> Tensor:
        """The greatest of all ranks, element by element, in place and returned."""
        if self.size > 1:
            with self._sending("all-reduce", name, tensor.nbytes, tensor.device):
                dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gathered(self, value_B: Tensor, name: str, counts: list[int] | None = None) -> Tensor:
        """Rows [n of this rank, ...] of all ranks, one after another; ranks may have different numbers of them (counts, if all
        know them)."""
        if self.size == 1:
            return value_B
        counts = self.counts(len(value_B)) if counts is None else counts
        most = max(counts)
        padded = value_B.new_zeros(most, *value_B.shape[1:])
        padded[: len(value_B)] = value_B
        all_RB = value_B.new_empty(self.size * most, *value_B.shape[1:])
        with self._sending("all-gather", name, all_RB.nbytes, all_RB.device):
            all_gather(all_RB, padded)
        return torch.cat([part[:n] for part, n in zip(all_RB.split(most), counts, strict=True)]) if most else value_B

    def meet(self, name: str, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait until all ranks are here: what the slowest one costs the others, apart from what sending costs.

        The host waits; what a GPU still does is not waited for. meanwhile: is called again and again until all are here. Whoever
        has messages under way must go on sending them there: another rank's host may wait for its whole GPU (as when a kernel
        is loaded, or memory given back), and with that for a message that is not sent before this rank's turn.
        """
        if self.size == 1:
            return
        with self._sending("wait", name, 0):
            work = dist.all_reduce(torch.zeros(1), async_op=True)
            assert work is not None
            while meanwhile is not None and not work.is_completed():
                meanwhile()
                time.sleep(LOOK)
            work.wait()

    def communication(self) -> dict[str, Any] | None:
        """What has travelled and was worked on since this was last asked for, of all ranks (docs/clusters.md); None for a process
        alone."""
        if self.size == 1:
            return None
        everyones = self.everyones((self.meter.read(), self.work.read()), "meters")
        return record_of([meter for meter, _ in everyones], self.rank) | {"work": [work for _, work in everyones]}

    @contextmanager
    def _sending(self, kind: Kind, name: str, payload: int, on: torch.device | None = None) -> Iterator[None]:
        self.connected(on or CPU)
        with self.together(name), self.meter.standing(self.meter.count(kind, name, payload, self.size), on or CPU):
            yield

    def connected(self, device: torch.device) -> None:
        """Wait until messages may be sent from a device: `Links` are not disturbed."""
        if self.links is not None and device.type == "cuda" and not self.links.done:
            with self.together("links"):
                self.links.wait()

    def together(self, name: str) -> AbstractContextManager[None]:
        """Within, this rank waits for the others to do the same."""
        return nullcontext() if self.pulse is None else self.pulse.collective(name)


ALONE = Ranks()


def letter(text: bytes, room: int) -> Tensor:
    """Its length, and itself if there is room, uint8 [HEAD + room]: what is short is one message, as each waits for all ranks."""
    found = torch.zeros(HEAD + room, dtype=torch.uint8)
    found[:HEAD].view(torch.int64)[0] = len(text)
    if 0 < len(text) <= room:
        found[HEAD : HEAD + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found


def length_of(found: Tensor) -> int:
    """Of the text of a letter."""
    return int(found[:HEAD].clone().view(torch.int64))


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """One array of all numbers of some; no other one than theirs, if they lie one after another in memory."""
    end, storage = parts[0].data_ptr(), parts[0].untyped_storage().data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return torch.cat([part.flatten() for part in parts])
        end += part.nbytes
    return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))


@contextmanager
def lead_first(ranks: Ranks) -> Iterator[None]:
    """The lead does this before all others, who end without a word if it is refused: one message is enough."""
    if not ranks.is_lead and not ranks.agreed(False):
        time.sleep(LAST_WORDS)  # whoever started the ranks ends all when the first one goes: that is to be the lead
        raise SystemExit(2)
    try:
        yield
    except BaseException:
        if ranks.is_lead:
            ranks.agreed(False)
        raise
    if ranks.is_lead:
        ranks.agreed(True)


@contextmanager
def each_its_part(ranks: Ranks) -> Iterator[None]:
    """All ranks do this, each with its share of the work, without saying anything to one another. If something is wrong with one
    share all end, and the lead says why."""
    refused: VerglasError | None = None
    try:
        yield
    except VerglasError as error:
        if ranks.size == 1:
            raise
        refused = error
    reasons = [reason for reason in ranks.everyones(refused) if reason is not None]
    if reasons and ranks.is_lead:
        raise reasons[0]
    if reasons:
        time.sleep(LAST_WORDS)
        raise SystemExit(2)
