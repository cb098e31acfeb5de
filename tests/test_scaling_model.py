"""The model of runs on more ranks than were there."""

from __future__ import annotations

import math

import pytest
from benchmarks.scaling_model import Fit, figures


def test_parts_are_found_again_and_predict() -> None:
    runs = ((20000, 1), (5000, 1), (20000, 2), (20000, 4))
    points = [(n, ranks, 2.0 + 3e-4 * n / ranks + 0.5 * math.log2(ranks)) for n, ranks in runs]
    fit = Fit.to(points)
    assert fit is not None
    assert (fit.fixed, fit.per_particle, fit.talking) == pytest.approx((2.0, 3e-4, 0.5))
    assert fit.seconds(20000, 8) == pytest.approx(2 + 0.75 + 1.5)
    assert fit.strong(20000, 8) == pytest.approx(8.0 / (8 * 4.25)) and fit.weak(5000, 4) == pytest.approx(3.5 / 4.5)
    found = figures("iterations", points)
    assert found["MODEL, iterations, 8 ranks, 20000 particles s"] == pytest.approx(4.25)
    assert found["MODEL, iterations, largest error"] < 1e-9


def test_no_part_is_negative_and_too_few_points_say_nothing() -> None:
    fit = Fit.to([(1000, 1, 10.0), (1000, 2, 4.9), (1000, 4, 2.45)])  # more than twice as quick: nothing is fixed
    assert fit is not None and min(fit.fixed, fit.per_particle, fit.talking) >= 0
    assert fit.seconds(1000, 4) == pytest.approx(2.45, rel=0.05)
    assert Fit.to([(1000, 1, 10.0)]) is None and figures("x", [(1000, 1, 10.0)]) == {}
