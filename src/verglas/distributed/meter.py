"""What travels between the ranks of a run: the bytes that this rank sent and the seconds it stood still for them, by name.

Bytes are those of the ring algorithms (Patarasuk & Yuan 2009, J. Parallel Distrib. Comput. 69, 117), which send the least a rank
must where all send alike: 2 (P - 1) / P of the tensor for an all-reduce, (P - 1) / P of all that is gathered for an all-gather,
of what it has for the others for an all-to-all. For a reduce to one rank or a broadcast (P - 1) / P is the mean of all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Kind = Literal["all-reduce", "reduce", "all-gather", "all-to-all", "broadcast", "wait"]


@dataclass
class Entry:
    """What was sent under one name since the last reading: how often, bytes of the tensors themselves (payload), bytes that this
    rank sent of them, seconds that it stood still (its device, where that does the sending), seconds that passed behind its
    computing."""

    kind: Kind
    count: int = 0
    payload: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    hidden_seconds: float = 0.0


class Meter:
    """Entries by name; one name stands for one kind of collective. Seconds on a GPU are read from its clock, without waiting."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._pending: list[tuple[Entry, torch.cuda.Event, torch.cuda.Event]] = []

    def count(self, kind: Kind, name: str, payload: int, size: int) -> Entry:
        """Note that `payload` bytes (of an all-gather: of all ranks together) go through a collective of `size` ranks."""
        entry = self.entries.setdefault(name, Entry(kind))
        assert entry.kind == kind, f"{name} is sent by {entry.kind}"
        entry.count += 1
        entry.payload += payload
        entry.bytes += share_sent(kind, size) * payload
        return entry

    @contextmanager
    def standing(self, entry: Entry, on: torch.device) -> Iterator[None]:
        """The `with` is time in which this rank, or its GPU if the tensors are there, does nothing else."""
        if on.type != "cuda":
            started = time.perf_counter()
            yield
            entry.seconds += time.perf_counter() - started
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._pending.append((entry, first, last))

    def read(self) -> dict[str, Entry]:
        """All entries since the last reading; waits for what the GPU has not done yet."""
        for entry, first, last in self._pending:
            last.synchronize()
            entry.seconds += first.elapsed_time(last) / 1000
        found, self.entries, self._pending = self.entries, {}, []
        return found


def share_sent(kind: Kind, size: int) -> float:
    """Bytes that each of `size` ranks sends for one byte of payload."""
    return {"all-reduce": 2.0, "wait": 0.0}.get(kind, 1.0) * (size - 1) / size


def record_of(entries: list[dict[str, Entry]], rank: int) -> dict[str, Any]:
    """The entries of all ranks in terms of JSON: `by_name` those of `rank`, totals of every rank beside them."""

    def total(field: str, waits: bool = False) -> list[float]:
        return [sum(getattr(e, field) for e in one.values() if (e.kind == "wait") == waits) for one in entries]

    rounded = {"bytes_of_ranks": [int(value) for value in total("bytes")]}
    seconds = {"seconds_of_ranks": total("seconds"), "hidden_seconds_of_ranks": total("hidden_seconds"),
               "waiting_seconds_of_ranks": total("seconds", True)}  # fmt: skip
    by_name = {name: asdict(entry) | {"bytes": int(entry.bytes)} for name, entry in sorted(entries[rank].items())}
    return {"ranks": len(entries), **rounded, **seconds, "by_name": by_name}
