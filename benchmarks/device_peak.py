"""What is in the memory of a GPU at its peak, by the line of verglas that asked for it; and peaks of stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

GB = 1e9
MOST_EVENTS = 2_000_000


@dataclass
class Peak:
    """Bytes that PyTorch had allocated at most, and held of the device, and how many before; lines: bytes at the peak by the line
    that asked for them, of what was asked for since."""

    allocated: int = 0
    reserved: int = 0
    before: int = 0
    lines: list[tuple[str, int]] = field(default_factory=list)

    def show(self, name: str, most: int = 8) -> None:
        """Print them."""
        print(f"{name}: allocated {self.allocated / GB:.2f} GB (before {self.before / GB:.2f}), held {self.reserved / GB:.2f}")
        for line, size in self.lines[:most]:
            print(f"    {size / GB:7.3f} GB  {line}", flush=True)


@contextmanager
def device_peak(by_line: bool = True) -> Iterator[Peak]:
    """Watch what is done meanwhile. by_line: note every allocation (costs some us each)."""
    found = Peak(before=torch.cuda.memory_allocated())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if by_line:
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=MOST_EVENTS)
    try:
        yield found
        torch.cuda.synchronize()
    finally:
        found.allocated, found.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        if by_line:
            traces = torch.cuda.memory._snapshot()["device_traces"]
            torch.cuda.memory._record_memory_history(None)
            found.lines = lines_at_peak(traces[torch.cuda.current_device()])


def lines_at_peak(trace: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """(line, bytes) of what was there when most was, of a trace of allocations; largest first."""
    now, most, moment = 0, 0, 0
    for number, one in enumerate(trace):
        now += {"alloc": 1, "free_completed": -1}.get(one["action"], 0) * one["size"]
        if now > most:
            most, moment = now, number + 1
    there: dict[int, dict[str, Any]] = {}
    for one in trace[:moment]:
        if one["action"] == "alloc":
            there[one["addr"]] = one
        elif one["action"] == "free_completed":
            there.pop(one["addr"], None)
    sizes: Counter[str] = Counter()
    for one in there.values():
        sizes[_line(one.get("frames", ()))] += one["size"]
    return sizes.most_common()


def _line(frames: Sequence[dict[str, Any]]) -> str:
    """The innermost line of verglas, with its caller."""
    own = [frame for frame in frames if "verglas" in frame["filename"] or "benchmarks" in frame["filename"]]
    names = [f"{frame['filename'].rsplit('/', 1)[-1]}:{frame['line']} {frame['name']}" for frame in (own or list(frames))[:2]]
    return " < ".join(names) or "?"
