"""Of several that transform, the quickest: found out with the first transform of each type."""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor


class Engine(Protocol):
    """What transforms between the points and modes of a plan."""

    @property
    def kernel(self) -> str:
        """What computes, for a run record."""
        ...

    def run(self, kind: int, sign: int, given: Tensor) -> Tensor:
        """Type 1 or 2, without gradients."""
        ...

    def forget(self) -> None:
        """Free what is kept from one transform to the next."""
        ...


class Quickest:
    """The first transform of a type is done twice by each: the first run compiles and sorts, the second one is timed."""

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.chosen: dict[int, Engine] = {}
        self.seconds: dict[int, list[float]] = {}

    @property
    def kernel(self) -> str:
        """What computes, for a run record, and how long each took."""
        names = [engine.kernel.split(",")[0] for engine in self.engines]
        told = []
        for kind, engine in sorted(self.chosen.items()):
            times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in zip(names, self.seconds[kind]))
            told.append(f"type {kind}: {engine.kernel} ({times})")
        return "; ".join(told) or f"the quickest of {' and '.join(names)}"

    def run(self, kind: int, sign: int, given: Tensor) -> Tensor:
        """Type 1 or 2."""
        if kind not in self.chosen:
            self.seconds[kind] = [_seconds(engine, kind, sign, given) for engine in self.engines]
            self.chosen[kind] = self.engines[self.seconds[kind].index(min(self.seconds[kind]))]
            if len(self.chosen) == 2:
                for engine in self.engines:
                    if engine not in self.chosen.values():
                        engine.forget()
        return self.chosen[kind].run(kind, sign, given)

    def forget(self) -> None:
        """Free what is kept from one transform to the next; what is the quickest stays known."""
        for engine in self.engines:
            engine.forget()


def _seconds(engine: Engine, kind: int, sign: int, given: Tensor) -> float:
    engine.run(kind, sign, given)
    started = _now(given)
    engine.run(kind, sign, given)
    return _now(given) - started


def _now(given: Tensor) -> float:
    """s, after all that is under way on the device."""
    if given.is_cuda:
        torch.cuda.synchronize(given.device)
    return time.perf_counter()
