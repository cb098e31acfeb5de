"""Zernike aberrations, beam tilt and magnification against polynomials written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.optics.aberrations import aberration_phase_K, even_phase_K
from verglas.optics.group import OpticsGroup

GROUP = OpticsGroup("krios", 1, voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1, pixel_size=1.1, box=32)
POINTS = half_plane_pixels(32).frequency_K2(1.1, torch.float64)
X, Y = POINTS.unbind(-1)
R2 = X * X + Y * Y

EVEN = [
    torch.ones_like(X),
    2 * X * Y,
    2 * R2 - 1,
    X**2 - Y**2,
    4 * X**3 * Y - 4 * X * Y**3,
    (4 * R2 - 3) * 2 * X * Y,
    6 * R2**2 - 6 * R2 + 1,
    (4 * R2 - 3) * (X**2 - Y**2),
    X**4 - 6 * X**2 * Y**2 + Y**4,
]
ODD = [Y, X, 3 * X**2 * Y - Y**3, (3 * R2 - 2) * Y, (3 * R2 - 2) * X, X**3 - 3 * X * Y**2]


def unit(index: int) -> tuple[float, ...]:
    return (0.0,) * index + (1.0,)


@pytest.mark.parametrize("index", range(9))
def test_even_polynomials_in_file_order(index):
    phase = even_phase_K(POINTS, replace(GROUP, even_zernike=unit(index)))
    assert (phase - EVEN[index]).abs().max() < 1e-12


@pytest.mark.parametrize("index", range(6))
def test_odd_polynomials_in_file_order(index):
    phase = aberration_phase_K(POINTS, replace(GROUP, odd_zernike=unit(index)))
    assert (phase - ODD[index]).abs().max() < 1e-12


def test_beam_tilt_is_coma_and_adds_to_odd_zernike():
    tilt_x, tilt_y = 0.7, -1.3
    tilted = aberration_phase_K(POINTS, replace(GROUP, beam_tilt_mrad=(tilt_x, tilt_y)))
    expected = -2 * math.pi * 2.7e7 * GROUP.wavelength_angstrom**2 * R2 * (tilt_x * X + tilt_y * Y) * 1e-3
    assert (tilted - expected).abs().max() < 1e-12 * expected.abs().max() + 1e-12
    zernike = (0.3, 0.0, -2.0)
    both = aberration_phase_K(POINTS, replace(GROUP, beam_tilt_mrad=(tilt_x, tilt_y), odd_zernike=zernike))
    assert torch.allclose(both, expected + 0.3 * ODD[0] - 2 * ODD[2], rtol=0, atol=1e-11)


def test_magnification_acts_on_the_frequencies_first():
    group = replace(GROUP, magnification=((1.1, 0.2), (0.05, 0.9)), odd_zernike=(0.5, 2.0, 1.0))
    moved = torch.stack([1.1 * X + 0.2 * Y, 0.05 * X + 0.9 * Y], -1)
    expected = aberration_phase_K(moved, replace(group, magnification=((1.0, 0.0), (0.0, 1.0))))
    assert torch.allclose(aberration_phase_K(POINTS, group), expected, rtol=0, atol=1e-12)


def test_nothing_to_correct_is_none():
    assert aberration_phase_K(POINTS, GROUP) is None
    assert even_phase_K(POINTS, replace(GROUP, even_zernike=(0.0, 0.0))) is None


def test_model_coordinates_invert_the_projection_matrix_with_magnification_and_scale():
    """RELION samples the model at inv(s M3^-1 A) (j, i, 0) with s the ratio of field sizes; ours is A^T coordinates."""
    group = replace(GROUP, magnification=((1.02, 0.01), (-0.03, 0.97)))
    model_box, model_pixel = 48, 0.9
    pixels = half_plane_pixels(group.box)
    rotation = random_rotations(1, torch.Generator().manual_seed(3))[0]
    m3 = torch.eye(3, dtype=torch.float64)
    m3[:2, :2] = torch.tensor(group.magnification)
    scale = group.box * group.pixel_size / (model_box * model_pixel)
    expected = pixels.coordinates_K3(torch.float64) @ torch.linalg.inv(torch.linalg.inv(m3) @ rotation * scale).T
    ours = group.model_coordinates_K3(pixels.frequency_K2(group.pixel_size, torch.float64), model_box, model_pixel)
    assert torch.allclose(ours @ rotation, expected, rtol=0, atol=1e-6)
