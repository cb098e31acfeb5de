"""Maximum likelihood by conjugate gradients over all positions at once.

    z = gradient / curvature        a diagonal preconditioner: object, probe and the rest get steps of their own length
    direction = -z + beta direction
    beta = max(0, min(Hestenes-Stiefel, Dai-Yuan)):  <z, g - g'> / <d, g - g'>  and  <g, z> / <d, g - g'>,   ': of the last pass

Dai-Yuan's direction always falls; where the gradient turned away, Hestenes-Stiefel's smaller beta forgets the past. One
pass is one gradient and one exact line search (line_search.py).

The first passes (option warm_up) go by mini-batches: on a simulated Siemens star of 100 positions the error was 0.0037 after 5 of
them and 0.0020 after 5 more of conjugate gradients, which alone needed 22 passes for that, and stayed ahead to the end.
With a known probe they only bring noise: there are none. Where positions are corrected, passes go by mini-batches as long as
positions move: an exact fit to wrong positions sets fast what a noisy one lets go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.along import along as misfit_along
from verglas.ptychography import fused
from verglas.ptychography.line_search import Along, minimum_along, minimum_of_samples
from verglas.ptychography.minibatch import MiniBatches
from verglas.ptychography.problem import Problem, preconditioned
from verglas.ptychography.unknowns import Line, Unknowns

# Of the curvature's greatest: where hardly any light falls steps stay small. With a known probe less of it is nearer to the fit
# after 32 passes, and so near that single and double precision agree to 1e-3 there (NOTES.md); with a fitted one it costs passes.
DAMPING, KNOWN_DAMPING = 0.02, 0.005
MOVING = 0.03  # px rms from one pass to the next: positions that move more are on their way
PATIENCE = 40  # passes that correct positions, after which these may move as they like


class ConjugateGradients:
    """The engine "cg". memory: last gradient and direction, fields "gradient.NAME", "direction.NAME", "length"; and "moved",
    by how much positions have since."""

    def __init__(self, problem: Problem, memory: dict[str, Tensor]) -> None:
        self.problem, self.memory = problem, memory
        self.first = MiniBatches(problem, {})

    def run_pass(self, x: Unknowns, number: int) -> tuple[Unknowns, float]:
        """One pass; returns the new unknowns and the error of the old ones."""
        problem = self.problem
        if self._by_mini_batches(number):
            self.memory = {}
            return self.first.run_pass(x, number)
        self.first.release()
        names = problem.fitted(number)
        sums = problem.sums(x, names)
        damping = DAMPING if "probe_MYX" in names else KNOWN_DAMPING
        towards = preconditioned(sums.gradient, sums.curvature, damping, problem.share).scaled(-1)
        direction = self._direction(sums.gradient, towards)
        guess = float(self.memory.get("length", torch.tensor(0.5))) or 0.5
        if problem.why_not_fused is None or not problem.kept.line:
            length = minimum_of_samples(lambda lengths: self.samples(x, direction, lengths), guess)
        else:
            length, _ = minimum_along(self.along(x, direction), guess)
        self.memory = {"length": torch.tensor(length)}
        self.memory |= {f"gradient.{name}": value for name, value in sums.gradient.items()}
        self.memory |= {f"direction.{name}": value for name, value in direction.items()}
        return x.plus(direction, length), sums.mismatch / sums.counted

    def _by_mini_batches(self, number: int) -> bool:
        """Whether pass `number` is one of the first, or positions still move or rest."""
        options = self.problem.options
        if number <= options.warm_up and options.probe_from == 1:
            return True
        if self.problem.rests_B is not None:
            return True
        if not options.positions_from or number > options.positions_from + PATIENCE:
            return False
        return number <= options.positions_from or float(self.memory.get("moved", 0.0)) > MOVING

    def positions_moved(self, distance: float) -> None:
        """Positions have moved by that, px rms, since the last pass."""
        self.memory["moved"] = torch.tensor(distance)

    def forget(self) -> None:
        """Start from the gradient alone: something else has changed the unknowns."""
        self.memory = {}

    def _remembered(self, kind: str, names: list[str]) -> Unknowns | None:
        """What the last pass left, if it changed the same fields."""
        there = {name.partition(".")[2]: value for name, value in self.memory.items() if name.startswith(f"{kind}.")}
        return Unknowns(**there) if sorted(there) == sorted(names) else None

    def _direction(self, gradient: Unknowns, towards: Unknowns) -> Unknowns:
        names = [name for name, _ in gradient.items()]
        last, before = self._remembered("direction", names), self._remembered("gradient", names)
        if last is None or before is None:
            return towards
        change = gradient.plus(before, -1.0)
        pairs = (last, change), (towards, change), (towards, gradient), (last, gradient)
        along, of_change, of_gradient, of_last = self.problem.share.dots(*pairs)
        if not along > 0:
            return towards
        beta = max(0.0, min(-of_change, -of_gradient) / along)
        return towards.plus(last, beta) if of_gradient + beta * of_last < 0 else towards

    def along(self, x: Unknowns, direction: Unknowns) -> Along:
        """The loss as a function of the length of a step, with two derivatives; keeps the coefficients of all intensities."""
        problem = self.problem
        line = Line(x, direction)
        chunks = [(rows_B, torch.stack(problem.model.waves(line, rows_B).intensity)) for rows_B in problem.chunks()]
        shape = problem.regulariser.along(x["object_OLYX"], direction["object_OLYX"])

        def at(step: float) -> tuple[float, float, float]:
            totals_3 = torch.zeros(3, dtype=torch.float64, device=problem.like.device)
            for rows_B, coefficients_DBYX in chunks:
                counts_BYX = problem.counts.rows(rows_B)
                totals_3 += misfit_along(coefficients_DBYX, counts_BYX, problem.counts.weight_YX, step, problem.noise)
            loss, slope, curvature = problem.share.total(totals_3)[0].tolist()
            a, b, c = shape
            return loss + a + (b + c * step) * step, slope + b + 2 * c * step, curvature + 2 * c

        return at

    def samples(self, x: Unknowns, direction: Unknowns, lengths: list[float]) -> list[list[float]]:
        """(loss, first, second derivative) of the loss at several lengths of a step; keeps no coefficients."""
        problem = self.problem
        a, b, c = problem.regulariser.along(x["object_OLYX"], direction["object_OLYX"])
        if problem.why_not_fused is None:
            totals_K3 = fused.misfit_along(problem, x, direction, lengths)
        else:
            totals_K3 = self._misfit_along(Line(x, direction), lengths)
        rows = problem.share.total(totals_K3)[0].tolist()
        return [[f + a + (b + c * t) * t, d + b + 2 * c * t, e + 2 * c] for t, (f, d, e) in zip(lengths, rows, strict=True)]

    def _misfit_along(self, line: Line, lengths: list[float]) -> Tensor:
        """[K, 3] float64: misfit of this rank's positions and two derivatives at lengths of a step, chunk by chunk."""
        problem = self.problem
        totals_K3 = torch.zeros(len(lengths), 3, dtype=torch.float64, device=problem.like.device)
        for rows_B in problem.chunks():
            coefficients_DBYX = torch.stack(problem.model.waves(line, rows_B).intensity)
            counts_BYX, weight_YX = problem.counts.rows(rows_B), problem.counts.weight_YX
            here = [misfit_along(coefficients_DBYX, counts_BYX, weight_YX, length, problem.noise) for length in lengths]
            totals_K3 += torch.stack(here)
        return totals_K3
