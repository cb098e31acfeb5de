"""Engines that change object and probe after every mini-batch of positions: ePIE, rPIE and least squares (LSQ-ML).

All three go down the preconditioned gradient of the batch, which is the update of the exit waves spread over object and probe:

    chi = F^-1((sqrt(n / I) - 1) F(exit))                the change that each exit wave asks for
    dO  = sum_b conj(light) chi / ((1 - a) sum |light|^2 + a max),      dP the same with the object's windows
    epie: a = 1 for both    rpie: a = relaxation    lsq: a = 0.1, then times the step that serves each position best

lsq asks for every position for the (s_b, t_b) that make chi_b - s_b dO light_b - t_b patch_b dP smallest, and takes the object's
step as their mean weighted with the light, the probe's as their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.descend import best_lengths
from verglas.ptychography.in_place import InPlace
from verglas.ptychography.noise import Poisson
from verglas.ptychography.problem import Problem, preconditioned
from verglas.ptychography.tiles import Box, bisected
from verglas.ptychography.unknowns import Line, Unknowns

RELAXATION = 0.05
LEAST_SQUARES_DAMPING = 0.1


class MiniBatches:
    """The engines "epie", "rpie" and "lsq", and the first passes of "cg", which go as "rpie". memory: the change of the last
    pass, fields "change.NAME"."""

    def __init__(self, problem: Problem, memory: dict[str, Tensor]) -> None:
        self.problem, self.memory = problem, memory
        options = problem.options
        rpie = (options.relaxation if options.engine == "rpie" else 0.0) or RELAXATION
        self.damping = {"epie": 1.0, "lsq": LEAST_SQUARES_DAMPING}.get(options.engine, rpie)
        self.momentum = 0.0 if options.engine == "cg" else options.momentum
        self.in_place: InPlace | None = None

    def run_pass(self, x: Unknowns, number: int) -> tuple[Unknowns, float]:
        """One pass; returns the new unknowns and the mean error of the batches, each before it changed anything."""
        names = self.problem.fitted(number)
        change = {name.partition(".")[2]: value for name, value in self.memory.items()}
        start = x
        if self.momentum:
            x = x.plus(Unknowns(**change), self.momentum)
        batches = self.batches(x, number)
        if self.problem.why_not_fused is None:
            x, totals_3 = self._by_kernels(names, x["object_OLYX"].shape[1]).run(x, batches)
        else:
            x, totals_3 = self._by_model(x, names, batches)
        if self.momentum:
            self.memory = {f"change.{name}": value for name, value in x.only(*names).plus(start.only(*names), -1.0).items()}
        _, mismatch, counted = totals_3.tolist()
        return x, mismatch / counted

    def _by_kernels(self, names: tuple[str, ...], slices: int) -> InPlace:
        """Steps in place; what the last pass left of them serves again, if it changed the same fields for the same likelihood."""
        length = self._length(names, slices)
        known = self.in_place
        if known is None or (known.names, known.length) != (names, length):
            least_squares = self.problem.options.engine == "lsq"
            self.in_place = known = InPlace(self.problem, names, self.damping, length, least_squares)
        return known

    def _by_model(self, x: Unknowns, names: tuple[str, ...], batches: list[Tensor]) -> tuple[Unknowns, Tensor]:
        totals_3 = torch.zeros(3, dtype=torch.float64, device=self.problem.like.device)
        self.problem.counts.expect(batches)
        for rows_B in batches:
            x, of_batch_3 = self._step(x, names, rows_B)
            totals_3 += of_batch_3
        return x, totals_3

    def _length(self, names: tuple[str, ...], slices: int) -> float:
        """Of a step down the preconditioned gradient."""
        fields = len(names) - 1 + slices  # that each answer for the whole misfit; two may
        twice = 0.5 if isinstance(self.problem.noise, Poisson) else 1.0  # twice the curvature (noise.py)
        return twice * min(1.0, 2 / fields)

    def release(self) -> None:
        """Nothing is kept in memory for further passes."""
        self.in_place = None

    def positions_moved(self, distance: float) -> None:
        """Positions have moved by that, px rms, since the last pass: they go on all the same."""

    def forget(self) -> None:
        """Nothing of the last pass is repeated."""
        self.memory = {}

    def batches(self, x: Unknowns, number: int) -> list[Tensor]:
        """Mini-batches of a pass, in random order: neighbours ("compact") or positions far from one another ("sparse").

        They are the same on any number of ranks; each gets its own positions of every one, perhaps none.
        """
        options, share, total = self.problem.options, self.problem.share, self.problem.positions
        size = options.batch_size or max(16, -(-total // 30))
        count = max(1, -(-total // size))
        draw = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
        if options.batches == "compact":
            parts = compact(share.everyones(x["positions_B2"].cpu() + share.corner_2), count)
        else:
            parts = list(torch.randperm(total, generator=draw).tensor_split(count))
        order = torch.randperm(count, generator=draw).tolist() if options.batches == "compact" else range(count)
        own = [share.own(parts[i].sort().values) for i in order]
        together = torch.cat(own).to(self.problem.like.device)  # one message to the device
        return [self.problem.at_work(rows_B) for rows_B in together.split([len(rows_B) for rows_B in own])]

    def _step(self, x: Unknowns, names: tuple[str, ...], rows_B: Tensor) -> tuple[Unknowns, Tensor]:
        sums = self.problem.sums(x, names, rows_B)
        step = preconditioned(sums.gradient, sums.curvature, self.damping, self.problem.share)
        length = -self._length(names, x["object_OLYX"].shape[1])
        if self.problem.options.engine == "lsq":
            step, length = self._least_squares(x, step.scaled(length), rows_B), 1.0
        x = x.plus(step, length)
        if "background_YX" in names:  # a negative one would make intensities of 0, where slopes have no bound
            x = x.changed(background_YX=x["background_YX"].clamp_min(0))
        return x, sums.totals_3

    def _least_squares(self, x: Unknowns, step: Unknowns, rows_B: Tensor) -> Unknowns:
        """The step with the lengths that serve the positions best."""
        sums_4 = torch.zeros(4, dtype=torch.float64, device=rows_B.device)
        for some_B in self.problem.chunks(rows_B):
            sums_4 += best_lengths(self._products(x, step, some_B), self.problem.like, "reference")
        weighted, weight, of_probe, count = self.problem.share.total(sums_4)[0].to(self.problem.like.dtype)
        scaled = dict(step.items()) | {"object_OLYX": step["object_OLYX"] * (weighted / weight.clamp_min(1e-30))}
        if step.probe_MYX is not None:
            scaled["probe_MYX"] = step.probe_MYX * (of_probe / count)
        return Unknowns(**scaled)

    def _products(self, x: Unknowns, step: Unknowns, rows_B: Tensor) -> Tensor:
        """[B, 5] float64: |a|^2, |p|^2, Re conj(a) p, Re conj(a) c, Re conj(p) c of the exit waves' changes a by the
        step's object and p by its probe, and of their gradient c."""
        problem, model = self.problem, self.problem.model
        waves = model.waves(Line(x), rows_B)
        slope = problem.noise.slope(waves.intensity[0], problem.counts.rows(rows_B)) * problem.counts.weight_YX
        gradient = model.from_the_detector(model.at_detector(waves, x["scale_B"], slope), waves.place)
        by_object = model.waves(Line(x, step.only("object_OLYX")), rows_B).exit[1]
        by_probe = torch.zeros_like(by_object)
        if step.probe_MYX is not None:
            by_probe = model.waves(Line(x, step.only("probe_MYX")), rows_B).exit[1]
        a, p, c = (torch.view_as_real(one).flatten(1) for one in (by_object, by_probe, gradient))
        return torch.stack([(one * other).sum(1) for one, other in ((a, a), (p, p), (a, p), (a, c), (p, c))], 1).double()


def compact(position_B2: Tensor, count: int) -> list[Tensor]:
    """`count` groups of neighbours of about equal size."""
    return [rows_B for rows_B, _ in bisected(position_B2, count, Box(0, 0, 0, 0))]
