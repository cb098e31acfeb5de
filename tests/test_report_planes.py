"""Fields, moves and waves on the report's page."""

from __future__ import annotations

import math

import numpy as np

from verglas.report import Curve, Field, Moves
from verglas.report.figures import draw_curve
from verglas.report.page import block
from verglas.report.planes import binned, draw_field, draw_moves, wave_picture


def test_a_field_says_its_scale() -> None:
    field_YX = np.tile(np.linspace(0, 1, 50), (40, 1))
    field_YX[:3] = np.nan
    drawn = draw_field(Field("a", field_YX, "phase / rad", pixel_size=8e-9), "f")
    assert "100 nm" in drawn and "phase / rad" in drawn and "<image" in drawn  # 50 px of 8 nm: a quarter is 100 nm
    assert "nm" not in draw_field(Field("a", field_YX, "counts"), "f")
    assert block(Field("a", field_YX, "x", cyclic=True), "f").half


def test_large_fields_are_binned() -> None:
    large_YX = np.arange(12.0)[:, None] * np.ones(9)
    assert np.allclose(binned(large_YX, 3, False)[:, 0], [1, 4, 7, 10]) and binned(large_YX, 3, False).shape == (4, 3)
    angles_YX = np.array([[math.pi - 0.1, -math.pi + 0.1], [math.pi - 0.1, -math.pi + 0.1]])
    assert np.isclose(abs(binned(angles_YX, 2, True)[0, 0]), math.pi)  # not 0
    assert len(draw_field(Field("a", np.random.default_rng(0).normal(size=(2500, 2400)), "x"), "f")) < 4e6


def test_moves_are_drawn_as_arrows() -> None:
    start_B2 = np.random.default_rng(0).uniform(0, 90, (25, 2))
    still, moved = (draw_moves(Moves("p", start_B2, start_B2 + by, "px", 3.0), "m") for by in (0.0, 2.0))
    assert "column / px" in still and "row / px" in moved and len(moved) > len(still) + 25 * 20


def test_waves_have_phase_as_hue() -> None:
    phases = np.array([[0, 2 * math.pi / 3, 4 * math.pi / 3]])
    picture = wave_picture(np.exp(1j * phases))
    assert picture.shape == (1, 3, 4) and (picture[..., 3] == 255).all()
    assert np.array_equal(picture[0, :, :3].argmax(-1), [0, 1, 2]) and picture[0, 0, 0] == 255
    assert wave_picture(np.array([[1.0, 0.0]]))[0, 1, :3].max() == 0


def test_curves_by_powers_of_ten() -> None:
    passes = np.arange(1, 6)
    drawn = draw_curve(Curve("Error", passes, [10.0**-passes], [""], "pass", "error", log_y=True), "c")
    assert "−3" in drawn or "-3" in drawn
