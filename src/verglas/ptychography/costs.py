"""What sending costs the ranks of a run, measured at its start: links between GPUs differ tenfold from computer to computer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from verglas.distributed.ranks import Ranks

SAMPLE = {"cuda": 2**23, "cpu": 2**18}  # numbers of 4 bytes: 34 MB and 1 MB
TRIALS = 3  # of which the quickest counts


@dataclass(frozen=True)
class Costs:
    """Seconds. start: of a message of hardly any length; link: of each byte that a rank sends; memory: of each byte that a rank
    reads or writes in its own memory."""

    start: float
    link: float
    memory: float

    @property
    def text(self) -> str:
        """'450 GB/s between ranks'."""
        return f"{1e-9 / max(self.link, 1e-15):.2g} GB/s between ranks"


def measured(ranks: Ranks, device: torch.device) -> Costs:
    """Those of the slowest rank, the same on all: some all-reduces and copies, a few milliseconds."""
    small, large = (torch.zeros(count, device=device) for count in (1, SAMPLE[device.type]))
    other = torch.empty_like(large)
    sent = 2 * (ranks.size - 1) / ranks.size * large.nbytes
    start = _seconds(lambda: ranks.add_up(small, "trial"), device)
    link = max(_seconds(lambda: ranks.add_up(large, "trial"), device) - start, 0.0) / sent
    memory = _seconds(lambda: other.copy_(large), device) / (2 * large.nbytes)
    return Costs(*(max(one) for one in zip(*ranks.everyones((start, link, memory), "costs"), strict=True)))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the quickest trial after a first one."""
    found = []
    for _ in range(1 + TRIALS):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])
