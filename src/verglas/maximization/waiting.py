"""Sums of a half-set that wait in the memory of the host, where those of both do not fit a GPU.

The sums of one half-set are on the device at a time, in memory that stays where it is: the other one's take their place piece by
piece. What needs both (joining, FSC, the sum of both) takes those that wait a few planes at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.core.transfers import at_once, piece_to_device, piece_to_host
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.solve import SolvedSums, gather_sums

PIECE = 2**22  # voxels that travel at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Waiting:
    """Sums of a half-set with Friedel partners and point group applied, values_V3 [V, 3] (re, im, weight) on the host; frame: all
    else that there is to know of them, with no voxels."""

    values_V3: Tensor
    frame: SolvedSums

    @classmethod
    def of(cls, sums: SolvedSums) -> Waiting:
        """Take sums to the host; who asks gives up those on the device."""
        empty = sums.weight_V.new_empty(0)  # not a part of what is given up
        values_V3 = torch.empty(len(sums.weight_V), 3, dtype=empty.dtype)
        waiting = cls(values_V3, replace(sums, data_V2=empty[:, None], weight_V=empty))
        at_once(pieces(len(values_V3)), lambda part: waiting.set(part, sums.some(part)), sums.device)
        return waiting

    @classmethod
    def of_accumulator(cls, sums: Accumulator, symmetry: str) -> Waiting:
        """The same of an accumulator, which is used up."""
        return cls.of(gather_sums([sums], symmetry, consume=True))

    def some(self, part: slice) -> Tensor:
        """Of a run of voxels, [n, 3] on the device."""
        return piece_to_device(self.values_V3[part], self.device)

    def set(self, part: slice, values_V3: Tensor) -> None:
        """Replace a run of voxels."""
        piece_to_host(values_V3, self.values_V3[part])

    @property
    def device(self) -> torch.device:
        """Where they are worked on."""
        return self.frame.device

    @property
    def data_V2(self) -> Tensor:
        """On the host."""
        return self.values_V3[:, :2]

    @property
    def weight_V(self) -> Tensor:
        """On the host."""
        return self.values_V3[:, 2]

    @property
    def rows(self) -> RowTable:
        """On the device."""
        return self.frame.rows

    @property
    def radius(self) -> int:
        return self.frame.radius

    @property
    def padding(self) -> float:
        return self.frame.padding


Half = SolvedSums | Waiting


def pieces(voxels: int) -> list[slice]:
    """Runs of voxels that travel at a time."""
    return [slice(first, min(first + PIECE, voxels)) for first in range(0, voxels, PIECE)]


def in_turn(halves: list[Half], work: Callable[[SolvedSums], T], keep: bool) -> list[T]:
    """What `work` makes of each half-set's sums. Where one waits, the other one's come first, and then it takes their place.

    keep: all sums are wanted afterwards, else none; `halves` then holds them: another one waits.
    """
    found: dict[int, T] = {}
    for number in sorted(range(len(halves)), key=lambda n: isinstance(halves[n], Waiting)):
        half = halves[number]
        if isinstance(half, Waiting):
            other = next(n for n, one in enumerate(halves) if isinstance(one, SolvedSums))
            halves[number], halves[other] = exchanged(halves[other], half, keep)
            half = halves[number]
        assert isinstance(half, SolvedSums)
        found[number] = work(half)
    if not keep:
        halves.clear()
    return [found[number] for number in sorted(found)]


def exchanged(there: Half, waiting: Waiting, keep: bool = True) -> tuple[SolvedSums, Waiting]:
    """(what waited, now on the device, what was there), in each other's memory; keep: whether the latter is wanted."""
    assert isinstance(there, SolvedSums)

    def exchange(part: slice) -> None:
        mine_V3 = there.some(part) if keep else None
        there.set(part, waiting.some(part))
        if mine_V3 is not None:
            waiting.set(part, mine_V3)

    at_once(pieces(len(there.weight_V)), exchange, there.device)
    return there, waiting


def alike(halves: list[Half]) -> list[Half]:
    """Both half-sets in the precision of the more precise one, if one of them waits: its memory is used by both."""
    dtype = max((half.weight_V.dtype for half in halves), key=lambda one: one.itemsize)
    if not any(isinstance(half, Waiting) for half in halves):
        return halves
    return [_in_precision(half, dtype) for half in halves]


def _in_precision(half: Half, dtype: torch.dtype) -> Half:
    if half.weight_V.dtype == dtype:
        return half
    if isinstance(half, Waiting):
        empty = half.frame.weight_V.to(dtype)
        return Waiting(half.values_V3.to(dtype), replace(half.frame, weight_V=empty, data_V2=empty[:, None]))
    return replace(half, data_V2=half.data_V2.to(dtype), weight_V=half.weight_V.to(dtype))
