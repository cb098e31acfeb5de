"""A model of how long runs take on more ranks than were there: fitted to those that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Point = tuple[int, int, float]  # particles, ranks, seconds
FAR = 8  # ranks that are looked ahead to


@dataclass(frozen=True)
class Fit:
    """t(N, P) = fixed + per_particle N / P + talking log2(P): what every rank does whatever its particles, what is shared, and
    what ranks spend on sending and on waiting for one another (trees grow so, and about so the wait for the slowest)."""

    fixed: float
    per_particle: float
    talking: float

    @classmethod
    def to(cls, points: Sequence[Point]) -> Fit | None:
        """By least squares of relative errors, no part below 0; None of points that do not tell the parts from one another."""
        terms = np.array([[1.0, n / ranks, math.log2(ranks)] for n, ranks, _ in points])
        seconds = np.array([seconds for *_, seconds in points])
        best: tuple[float, np.ndarray] | None = None
        if len({n / ranks for n, ranks, _ in points}) < 2:
            return None
        for count in (3, 2, 1):
            for chosen in combinations(range(3), count):
                some = terms[:, chosen] / seconds[:, None]
                if 1 not in chosen or np.linalg.matrix_rank(some) < count:
                    continue
                found = np.zeros(3)
                found[list(chosen)] = np.linalg.lstsq(some, np.ones(len(some)), rcond=None)[0]
                error = float(np.square(terms @ found / seconds - 1).sum())
                if found.min() >= 0 and (best is None or error < best[0] - 1e-12):
                    best = error, found
        return None if best is None else cls(*best[1].tolist())

    def seconds(self, particles: int, ranks: int) -> float:
        """Of such a run."""
        return self.fixed + self.per_particle * particles / ranks + self.talking * math.log2(ranks)

    def strong(self, particles: int, ranks: int) -> float:
        """Efficiency beside one rank that does all."""
        return self.seconds(particles, 1) / (ranks * self.seconds(particles, ranks))

    def weak(self, each: int, ranks: int) -> float:
        """Efficiency with so many particles on each rank, beside one rank."""
        return self.seconds(each, 1) / self.seconds(each * ranks, ranks)


def figures(name: str, points: Sequence[Point]) -> dict[str, float]:
    """The fitted parts, and what they say of 2, 4 and 8 ranks; nothing where the points do not tell."""
    fit = Fit.to(points)
    if fit is None:
        return {}
    most, fewest = max(n for n, *_ in points), min(n for n, *_ in points)
    title = f"MODEL, {name}"
    error = max(abs(fit.seconds(n, ranks) / seconds - 1) for n, ranks, seconds in points)
    found = {f"{title}, whatever the particles s": fit.fixed, f"{title}, 1000 particles on a rank s": 1000 * fit.per_particle,
             f"{title}, twice as many ranks s": fit.talking, f"{title}, largest error": error}  # fmt: skip
    for ranks in (2, 4, FAR):
        found[f"{title}, {ranks} ranks, {most} particles s"] = fit.seconds(most, ranks)
        found[f"{title}, {ranks} ranks, strong efficiency, {most} particles"] = fit.strong(most, ranks)
        found[f"{title}, {ranks} ranks, weak efficiency, {fewest} particles a rank"] = fit.weak(fewest, ranks)
    return found
