"""The line search: its minimum against a dense scan, on polynomials of real predictions and on functions by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ptycho_world import made_up, scan_of
from verglas.ptychography.conjugate_gradients import ConjugateGradients
from verglas.ptychography.line_search import minimum_along, minimum_of_samples
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.problem import Problem, preconditioned
from verglas.ptychography.start import first_guess
from verglas.ptychography.unknowns import Line

SCAN = scan_of(made_up(), seed=2)


@pytest.mark.parametrize("noise", ["amplitude", "poisson"])
@pytest.mark.parametrize("names", [("object_OLYX",), ("object_OLYX", "probe_MYX")], ids=["quadratic", "quartic"])
def test_minimum_of_a_step_is_that_of_a_dense_scan(noise: str, names: tuple[str, ...]) -> None:
    problem = Problem(SCAN, PtychoOptions(noise=noise, double=True))  # type: ignore[arg-type]
    x, _ = first_guess(SCAN, problem.counts, problem.options, problem.like)
    sums = problem.sums(x, names)
    direction = preconditioned(sums.gradient, sums.curvature, 0.02, problem.share).scaled(-1)
    along = ConjugateGradients(problem, {}).along(x, direction)
    found, _ = minimum_along(along, 0.5)

    def loss(step: float) -> float:  # by whole predictions, not by polynomials
        return problem.sums(x.plus(direction, step), ("object_OLYX",)).loss

    low, high = 0.0, 4 * found
    for _ in range(12):  # every round a scan of 9 lengths in a range 4 times narrower
        steps = torch.linspace(low, high, 9, dtype=torch.float64).tolist()
        best = min(range(9), key=lambda i: loss(steps[i]))
        low, high = steps[max(best - 1, 0)], steps[min(best + 1, 8)]
    assert abs(found - (low + high) / 2) < 1e-6 * found
    assert Line(x).at is x


def test_derivatives_along_a_step_are_differences() -> None:
    problem = Problem(SCAN, PtychoOptions(double=True, total_variation=0.1))
    x, _ = first_guess(SCAN, problem.counts, problem.options, problem.like)
    sums = problem.sums(x, problem.fitted(1))
    direction = preconditioned(sums.gradient, sums.curvature, 0.02, problem.share).scaled(-1)
    along = ConjugateGradients(problem, {}).along(x, direction)
    h = 1e-4
    (below, slope_below, _), (_, slope, curvature), (above, slope_above, _) = along(0.3 - h), along(0.3), along(0.3 + h)
    assert slope == pytest.approx((above - below) / (2 * h), rel=1e-5)
    assert curvature == pytest.approx((slope_above - slope_below) / (2 * h), rel=1e-5)
    assert along(0.0)[0] == pytest.approx(sums.loss, rel=1e-12)
    assert along(0.0)[1] == pytest.approx(sums.gradient.dot(direction), rel=1e-9)


@pytest.mark.parametrize("guess", [1e-6, 1e-2, 1.0, 1e4])
def test_any_first_guess_will_do(guess: float) -> None:
    """(t^2 - 1)^2 - t: its slope at 0 is negative, its curvature there too; the minimum is where 4 t^3 - 4 t = 1."""
    found, value = minimum_along(lambda t: ((t * t - 1) ** 2 - t, 4 * t**3 - 4 * t - 1, 12 * t * t - 4), guess)
    assert abs(4 * found**3 - 4 * found - 1) < 1e-6
    assert value == pytest.approx((found**2 - 1) ** 2 - found)


@pytest.mark.parametrize("guess", [1e-6, 1e-2, 0.5, 1.0, 3.0, 1e4])
def test_minimum_of_several_at_once(guess: float) -> None:
    """As above; a cubic is exact there. Of another function it is as good as its lengths are close."""
    looked = []

    def samples(lengths: list[float]) -> list[list[float]]:
        looked.append(lengths)
        return [[(t * t - 1) ** 2 - t, 4 * t**3 - 4 * t - 1, 12 * t * t - 4] for t in lengths]

    found = minimum_of_samples(samples, guess)
    assert abs(4 * found**3 - 4 * found - 1) < 1e-6
    assert len(looked) == 1 or not 0.5 <= guess <= 2
    wavy = minimum_of_samples(lambda all_t: [[-math.sin(t), -math.cos(t), math.sin(t)] for t in all_t], guess=1.2)
    assert wavy == pytest.approx(math.pi / 2, rel=1e-3)


def test_no_minimum_of_several() -> None:
    assert minimum_of_samples(lambda all_t: [[t, 1.0, 0.0] for t in all_t], 1.0) == 0.0
    assert minimum_of_samples(lambda all_t: [[-t, -1.0, 0.0] for t in all_t], 1.0) == 0.0


def test_no_step_uphill() -> None:
    assert minimum_along(lambda t: (t, 1.0, 0.0), 1.0) == (0.0, 0.0)
