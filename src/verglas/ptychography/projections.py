"""Difference map and relaxed averaged alternating reflections: engines that keep an exit wave for every position.

    psi <- beta (psi + M(2 O psi - psi) - O psi) + (1 - beta) O psi

O psi: light x patch of the object and probe that fit all exit waves best; M psi: psi with the counted intensities at the
detector, phases kept. beta = 1 is the difference map, less is RAAR. Object and probe then follow the exit waves in turn:

    object = sum_b conj(light) psi / sum_b |light|^2,       probe = sum_b conj(patch) psi / sum_b |patch|^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.kernels.along import FLOOR
from verglas.ptychography.model import Waves
from verglas.ptychography.problem import Problem
from verglas.ptychography.unknowns import Line, Unknowns

RELAXATION = 0.15
RIDGE = 1e-3  # of the greatest light: pixels that hardly any light reaches keep what they had


class Projections:
    """The engines "dm" and "raar". memory: "exit", waves [B, O, M, Y, X] of all positions."""

    def __init__(self, problem: Problem, memory: dict[str, Tensor]) -> None:
        if problem.scan.geometry.slice_distances:
            raise InputError("--engine", problem.options.engine, "cg, lsq, rpie or epie for an object of several slices")
        self.problem, self.memory = problem, memory
        self.beta = 1.0 if problem.options.engine == "dm" else 1 - (problem.options.relaxation or RELAXATION)

    def run_pass(self, x: Unknowns, number: int) -> tuple[Unknowns, float]:
        """One pass; returns the new unknowns and the error of the old ones."""
        problem, names = self.problem, self.problem.fitted(number)
        if "exit" not in self.memory:
            everything = [problem.model.waves(Line(x), rows_B).exit[0] for rows_B in problem.chunks()]
            self.memory = {"exit": torch.cat(everything)}
        mismatch = 0.0
        for rows_B in problem.chunks():
            waves = problem.model.waves(Line(x), rows_B)
            counts_BYX = problem.counts.rows(rows_B)
            mismatch += float(problem.mismatch(waves, counts_BYX))
            self.memory["exit"][rows_B] = self._next(x, waves, counts_BYX)
        x = self._follow(x, "object_OLYX")
        if "probe_MYX" in names:
            x = self._follow(x, "probe_MYX")
        return x, problem.share.sum_of(mismatch) / problem.counts.total

    def positions_moved(self, distance: float) -> None:
        """Positions have moved by that, px rms, since the last pass: they go on all the same."""

    def forget(self) -> None:
        """Start from the exit waves of object and probe."""
        self.memory = {}

    def _next(self, x: Unknowns, waves: Waves, counts_BYX: Tensor) -> Tensor:
        """The new exit waves of a chunk."""
        model, rows_B = self.problem.model, waves.place.rows_B
        now, product = self.memory["exit"][rows_B], waves.exit[0]
        at_detector = model.to_the_detector(2 * product - now, waves.place)
        power_BYX = model.binned(torch.view_as_real(at_detector).square().sum((1, 2, -1)))
        scale_B11 = x["scale_B"][rows_B, None, None]
        wanted_BYX = (counts_BYX - x["background_YX"]).clamp_min(0) / scale_B11
        factor_BYX = (wanted_BYX / power_BYX.clamp_min(FLOOR)).sqrt()
        factor_BYX = torch.where(self.problem.counts.weight_YX > 0, factor_BYX, 1.0)
        projected = model.from_the_detector(model.unbinned(factor_BYX)[:, None, None] * at_detector, waves.place)
        return self.beta * (now + projected - product) + (1 - self.beta) * product

    def _follow(self, x: Unknowns, name: str) -> Unknowns:
        """Object or probe that fits the exit waves best."""
        problem = self.problem
        into = Unknowns(**{name: torch.zeros_like(x[name])})
        for rows_B in problem.chunks():
            waves = problem.model.waves(Line(x), rows_B)
            problem.model.spread(x, waves, self.memory["exit"][rows_B], into)
        problem.share.add_up(into)
        weight = problem.curvature(x.changed(scale_B=torch.ones_like(x["scale_B"])), (name,), problem.everything)[name]
        ridge = RIDGE * problem.share.greatest(name, weight)
        return x.changed(**{name: (into[name] + ridge * x[name]) / (weight + ridge)})
