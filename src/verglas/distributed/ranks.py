"""The processes (ranks) of one run, and what they say to one another.

A run of one process has `ALONE`, whose methods do nothing: nobody needs to ask how many there are. Ranks are started by
torchrun, by srun or by --gpus (verglas.cli.launch), never by verglas itself; `join` makes them one group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from verglas.distributed.place import LAST_WORDS, Place

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)  # a collective that takes longer is taken to hang; the slowest wait is for files


@dataclass(frozen=True)
class Ranks:
    """rank 0, the lead, writes and decides; the others compute. local_size: how many there are on this host; store: small numbers
    that all can see; sequence: numbers what all ranks do in the same order."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    store: dist.Store | None = None
    sequence: Iterator[int] = field(default_factory=count)

    @property
    def is_lead(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def agreed(self, value: T) -> T:
        """The lead's value, on all ranks. Not for large tensors: it is pickled."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def everyones(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def of_lead(self, tensor: Tensor) -> Tensor:
        """The lead's tensor, on all ranks; theirs has the same shape."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
        return tensor

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place and returned. All get the same bits: each part is added up in one place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, value_B: Tensor) -> Tensor:
        """Rows [n of this rank, ...] of all ranks, one after another; ranks may have different numbers of them."""
        if self.size == 1:
            return value_B
        counts = self.everyones(len(value_B))
        most = max(counts)
        padded = value_B.new_zeros(most, *value_B.shape[1:])
        padded[: len(value_B)] = value_B
        all_RB = value_B.new_empty(self.size * most, *value_B.shape[1:])
        dist.all_gather_into_tensor(all_RB, padded)
        return torch.cat([part[:n] for part, n in zip(all_RB.split(most), counts, strict=True)]) if most else value_B


ALONE = Ranks()


@contextmanager
def joined(place: Place | None, device: torch.device) -> Iterator[Ranks]:
    """Meet all other processes of the run, for as long as the `with`; None: there are none. device: what this one computes on."""
    if place is None:
        yield ALONE
        return
    if place.meeting is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.meeting[0], str(place.meeting[1])
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.size)
    cuda = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE, device_id=device if cuda else None)
    store = dist.PrefixStore("verglas", dist.distributed_c10d._get_default_store())
    yield Ranks(place.rank, place.size, place.local_size, store)
    dist.destroy_process_group()  # not after an error: the others may be waiting in the middle of something


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
