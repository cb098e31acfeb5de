"""Mini-batches by the kernels of `farfield` and `descend`, on arrays that are changed in place.

A mini-batch is small: on a GPU launches, and walks over the whole object, took four times as long as its transforms. So positions
are put into order once a pass, a mini-batch walks over the object once (`descend`; least squares twice), and on one GPU what some
mini-batches do is recorded once (a CUDA graph) and repeated for the others of their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from verglas.kernels import farfield
from verglas.kernels.descend import best_lengths, descend, dose, follow
from verglas.kernels.farfield import Step
from verglas.ptychography import fused
from verglas.ptychography.model import Place
from verglas.ptychography.problem import Problem
from verglas.ptychography.summing import Summing
from verglas.ptychography.unknowns import Unknowns

AT_ONCE = 6  # mini-batches of a record


@dataclass(frozen=True)
class Recorded:
    """A graph of some mini-batches, and where it looks for their places, one after the other."""

    graph: torch.cuda.CUDAGraph
    place: Place


class InPlace:
    """Steps of fields `names` (object, and perhaps probe). damping: of the curvature, length: of the step before least squares
    finds that of its parts; both as in `minibatch.py`."""

    def __init__(self, problem: Problem, names: tuple[str, ...], damping: float, length: float, least_squares: bool) -> None:
        self.problem, self.names, self.damping, self.length, self.least_squares = problem, names, damping, length, least_squares
        self.x = Unknowns()
        self.gradient, self.curvature = Unknowns(), Unknowns()
        self.totals_3 = torch.zeros(3, dtype=torch.float64, device=problem.like.device)
        self.recorded: dict[tuple[int, ...], Recorded] = {}

    def run(self, x: Unknowns, batches: list[Tensor]) -> tuple[Unknowns, Tensor]:
        """A pass: the new unknowns, and [3] float64: sums of loss, mismatch and counts as each batch met them."""
        self._take(x)
        batches = fused.in_order(self.problem, x, batches)
        self.problem.counts.expect(batches)
        whole = self.problem.model.place(x["positions_B2"], torch.cat(batches))
        sizes = [len(rows_B) for rows_B in batches]
        if self._records and len(set(sizes)) <= 2:  # else recording is not worth it
            begin = 0
            for first in range(0, len(sizes), AT_ONCE):
                several = tuple(sizes[first : first + AT_ONCE])
                self._repeat(_part(whole, begin, sum(several)), several)
                begin += sum(several)
        else:
            for rows_B, begin in zip(batches, accumulate([0, *sizes]), strict=False):
                self._batch(_part(whole, begin, len(rows_B), rows_B))
        return x.changed(**{name: self.x[name].clone() for name in self.names}), self.totals_3.clone()

    @property
    def _records(self) -> bool:
        """Whether what a mini-batch does is always the same, and nothing waits for anything."""
        problem = self.problem
        alone = problem.share.alone and problem.regulariser.weight == 0 and problem.counts.blocks is None
        return problem.like.device.type == "cuda" and alone

    def _take(self, x: Unknowns) -> None:
        """Copies of what is given, at places in memory that stay the same."""
        given = {name: x[name] for name in ("object_OLYX", "probe_MYX", "scale_B", "background_YX")}
        if not self.x.items() or any(self.x[name].shape != value.shape for name, value in given.items()):
            self.recorded, like = {}, self.problem.like
            self.x = Unknowns(**{name: value.clone().contiguous() for name, value in given.items()})
            self.gradient = Unknowns(**{name: torch.zeros_like(self.x[name]) for name in self.names})
            self.curvature = Unknowns(**{name: like.new_zeros(x[name].shape[-2:]) for name in self.names})
        for name, value in given.items():
            self.x[name].copy_(value)
        self.totals_3.zero_()

    def _repeat(self, place: Place, sizes: tuple[int, ...]) -> None:
        """Mini-batches by the record of those of their sizes; the first ones are computed, then recorded."""
        known = self.recorded.get(sizes)
        if known is None:
            self._several(place, sizes)  # compiles what is to be recorded
            self.recorded[sizes] = self._record(place, sizes)
            return
        known.place.rows_B.copy_(place.rows_B)
        known.place.corner_B2.copy_(place.corner_B2)
        if known.place.fraction_B2 is not None and place.fraction_B2 is not None:
            known.place.fraction_B2.copy_(place.fraction_B2)
        known.graph.replay()

    def _record(self, place: Place, sizes: tuple[int, ...]) -> Recorded:
        fraction_B2 = None if place.fraction_B2 is None else place.fraction_B2.clone()
        own = Place(place.rows_B.clone(), place.corner_B2.clone(), fraction_B2)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(place.rows_B.device)
        stream.wait_stream(torch.cuda.current_stream(place.rows_B.device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._several(own, sizes)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(place.rows_B.device).wait_stream(stream)
        return Recorded(graph, own)

    def _several(self, place: Place, sizes: tuple[int, ...]) -> None:
        for size, begin in zip(sizes, accumulate((0, *sizes)), strict=False):
            self._batch(_part(place, begin, size))

    def _batch(self, place: Place) -> None:
        """One mini-batch."""
        problem, x, gradient = self.problem, self.x, self.gradient
        with_probe = "probe_MYX" in self.names
        if with_probe:
            self.curvature["probe_MYX"].zero_()
        most = dose(x["probe_MYX"], place.corner_B2, x["scale_B"][place.rows_B], self.curvature["object_OLYX"])
        totals_3: Tensor | None = None
        loss_of_shape = problem.regulariser.add_gradient(x["object_OLYX"], gradient, len(place.rows_B), problem.positions)
        exit_BMYX, done = None, 0
        for some_B in problem.chunks(place.rows_B):
            part = _part(place, done, len(some_B), some_B)
            done += len(some_B)
            lit, counted = fused.patterns_of(problem, x, part)
            found = farfield.farfield(lit, counted, gradient["object_OLYX"][0, 0], with_probe, self.curvature.probe_MYX)
            totals_3 = found.totals_3 if totals_3 is None else totals_3 + found.totals_3
            if found.light_MYX is not None:
                gradient["probe_MYX"].add_(fused.unmoved(found.light_MYX, part))
            exit_BMYX = found.exit_BMYX if done == len(place.rows_B) == len(some_B) else None
        totals_3 = torch.zeros_like(self.totals_3) if totals_3 is None else totals_3  # of no positions of this rank
        totals_3 = Summing(problem.share, gradient, self.curvature, complete=False, early=False).finish(totals_3)
        if loss_of_shape:
            totals_3[0] += loss_of_shape
        self.totals_3 += totals_3
        for name in self.names:
            value = None if self.least_squares else _planes(x[name])
            if name == "probe_MYX" or not problem.share.alone:
                most = problem.share.greatest(name, self.curvature[name])
            descend(value, _planes(gradient[name]), self.curvature[name], most, self.damping, self.length)
        if self.least_squares:
            self._follow(place, exit_BMYX)

    def _follow(self, place: Place, exit_BMYX: Tensor | None) -> None:
        """The step with the lengths that serve the positions best."""
        problem, x, step = self.problem, self.x, self.gradient
        change = Step(step["object_OLYX"][0, 0], step.probe_MYX)
        sums_4, done = torch.zeros(4, dtype=torch.float64, device=problem.like.device), 0
        for some_B in problem.chunks(place.rows_B):
            part = _part(place, done, len(some_B), some_B)
            done += len(some_B)
            lit, counted = fused.patterns_of(problem, x, part)
            moved = change if change.light_MYX is None else change._replace(light_MYX=fused.light(change.light_MYX, part))
            sums_4 += best_lengths(farfield.products(lit, moved, counted, exit_BMYX), problem.like)
        sums_22 = problem.share.total(sums_4)[0].view(2, 2)
        factor_2 = sums_22[:, 0] / sums_22[:, 1].clamp_min(1e-30)
        for number, name in enumerate(self.names):
            follow(_planes(x[name]), _planes(step[name]), factor_2[number])


def _part(place: Place, begin: int, count: int, rows_B: Tensor | None = None) -> Place:
    """The place of `count` rows from `begin` on; rows_B: the very tensor of them that was handed out, where that matters."""
    here = slice(begin, begin + count)
    fraction_B2 = None if place.fraction_B2 is None else place.fraction_B2[here]
    return Place(place.rows_B[here] if rows_B is None else rows_B, place.corner_B2[here], fraction_B2)


def _planes(value: Tensor) -> Tensor:
    """[P, Y, X], of the same memory."""
    return value.view(-1, *value.shape[-2:])
