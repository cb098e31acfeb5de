"""The CTF against independent formulas, and the fast form against the definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from verglas.core.fourier import half_plane_pixels
from verglas.optics.ctf import CtfOptions, CtfParameters, GroupCtf, ctf_BK, ctf_reference_BK
from verglas.optics.group import OpticsGroup

GROUP = OpticsGroup("krios", 1, voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1, pixel_size=1.0, box=128)
ABERRATED = replace(
    GROUP,
    voltage_kv=200.0,
    even_zernike=(0.1, 0.5, -2.0, 1.0, 0.3, -0.2, 4.0, 0.7, -1.1),
    odd_zernike=(0.2, -0.4, 1.0),
    magnification=((1.02, 0.004), (-0.01, 0.985)),
)


def particles(n: int, defocus: float = 15000.0, seed: int = 1) -> CtfParameters:
    random = torch.Generator().manual_seed(seed)
    u = torch.rand(6, n, generator=random, dtype=torch.float64)
    return CtfParameters(
        defocus * (0.9 + 0.2 * u[0]), defocus * (0.9 + 0.2 * u[1]), 180 * u[2] - 90, 180 * u[3], 80 * u[4], 0.5 + u[5]
    )


def textbook_ctf(s2, angle, du, dv, astigmatism, kv, cs_mm, contrast, shift):
    """sin(chi) in polar form with the defocus along each direction: no code shared with the package."""
    volts = kv * 1e3
    wavelength = 12.2643247 / np.sqrt(volts * (1 + volts * 0.978466e-6))
    defocus = 0.5 * (du + dv + (du - dv) * np.cos(2 * (angle - np.deg2rad(astigmatism))))
    chi = np.pi * wavelength * defocus * s2 - 0.5 * np.pi * cs_mm * 1e7 * wavelength**3 * s2**2
    return np.sin(chi + np.arctan(contrast / np.sqrt(1 - contrast**2)) + np.deg2rad(shift))


@pytest.mark.parametrize("box", [6, 64])
def test_definition_is_the_textbook_formula(box):
    frequency = half_plane_pixels(box).frequency_K2(1.3, torch.float64)
    p = particles(5)
    u, v = frequency.numpy().T
    for i in range(5):
        expected = textbook_ctf(
            u**2 + v**2, np.arctan2(v, u), *(float(getattr(p, n)[i]) for n in ("defocus_u_B", "defocus_v_B", "angle_B")),
            300.0, 2.7, 0.1, float(p.phase_shift_B[i]),
        )  # fmt: skip
        expected = float(p.scale_B[i]) * expected * np.exp(-float(p.bfactor_B[i]) / 4 * (u**2 + v**2))
        actual = ctf_reference_BK(frequency, p[i : i + 1], GROUP)[0]
        assert np.abs(actual.numpy() - expected).max() < 1e-9


def test_zero_frequency_is_plus_amplitude_contrast_and_underfocus_starts_upwards():
    frequency = torch.tensor([[0.0, 0.0], [0.005, 0.0]], dtype=torch.float64)
    p = replace(particles(1), phase_shift_B=torch.zeros(1), bfactor_B=torch.zeros(1), scale_B=torch.ones(1))
    at_zero, close_by = ctf_reference_BK(frequency, p, GROUP)[0].tolist()
    assert at_zero == pytest.approx(0.1, abs=1e-12)
    assert close_by > at_zero


def test_astigmatism_axis_runs_from_x_to_y():
    """With the axis of defocus u along y, frequencies along y see defocus u alone."""
    along_y = torch.tensor([[0.0, 0.1]], dtype=torch.float64)
    p = CtfParameters(*(torch.tensor([v], dtype=torch.float64) for v in (20000.0, 10000.0, 90.0, 0.0, 0.0, 1.0)))
    expected = textbook_ctf(0.01, 0.0, 20000.0, 20000.0, 0.0, 300.0, 2.7, 0.1, 0.0)
    assert float(ctf_reference_BK(along_y, p, GROUP)) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("group", [GROUP, ABERRATED, replace(GROUP, ctf_corrected=True)], ids=["plain", "aberrated", "corrected"])
@pytest.mark.parametrize(
    "options",
    [
        CtfOptions(),
        CtfOptions(intact_until_first_peak=True),
        CtfOptions(intact_after_first_peak=True),
        CtfOptions(absolute=True),
        CtfOptions(phase_flip=True),
    ],
    ids=["ctf", "until peak", "after peak", "absolute", "flip"],
)
@pytest.mark.parametrize("box, n", [(6, 1), (38, 7)])
def test_fast_form_is_the_definition(box, n, options, group):
    frequency = half_plane_pixels(box).frequency_K2(group.pixel_size, torch.float64)
    p = particles(n)
    expected = ctf_reference_BK(frequency, p, group, options)
    assert (GroupCtf.build(frequency, group)(p, options) - expected).abs().max() < 1e-9
    assert torch.equal(ctf_BK(frequency, p, group, options), GroupCtf.build(frequency, group)(p, options))


@pytest.mark.parametrize("group", [GROUP, ABERRATED], ids=["plain", "aberrated"])
def test_single_precision_holds_at_one_angstrom_and_three_microns(group):
    pixels = half_plane_pixels(128)
    p = replace(particles(200, defocus=30000.0), bfactor_B=torch.zeros(200), scale_B=torch.ones(200))
    expected = ctf_reference_BK(pixels.frequency_K2(1.0, torch.float64), p, group)
    single = GroupCtf.build(pixels.frequency_K2(1.0), group)
    assert single.phase_BK(p).max() > 400
    assert (single(p) - expected).abs().max() < 3e-4
    assert (single(p.to("cpu", torch.float32)) - expected).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group", [GROUP, ABERRATED], ids=["plain", "aberrated"])
def test_single_precision_holds_on_the_gpu(group):
    pixels = half_plane_pixels(128)
    p = particles(200, defocus=30000.0)
    expected = ctf_reference_BK(pixels.frequency_K2(1.0, torch.float64), p, group)
    single = GroupCtf.build(pixels.frequency_K2(1.0).cuda(), group)
    for parameters in (p, p.to("cuda"), p.to("cuda", torch.float32)):
        actual = single(parameters)
        assert actual.is_cuda
        assert (actual.cpu() - expected).abs().max() < 1e-3


def test_phases_do_not_depend_on_the_precision_of_matrix_products():
    frequency = half_plane_pixels(32).frequency_K2(1.0)
    model, p = GroupCtf.build(frequency, GROUP), particles(9, 30000.0)
    before = torch.get_float32_matmul_precision()
    plain = model(p)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(model(p), plain)
    finally:
        torch.set_float32_matmul_precision(before)


def test_damping_comes_before_flipping_and_scale_after():
    frequency = half_plane_pixels(32).frequency_K2(2.0, torch.float64)
    p = particles(3)
    flipped = ctf_reference_BK(frequency, p, GROUP, CtfOptions(phase_flip=True))
    assert torch.allclose(flipped.abs(), p.scale_B[:, None].expand_as(flipped), rtol=0, atol=1e-12)
    assert torch.equal(flipped < 0, ctf_reference_BK(frequency, p, GROUP) < 0)


def test_the_envelope_is_left_out_only_when_promised():
    frequency = half_plane_pixels(16).frequency_K2(2.0)
    p = replace(particles(3), bfactor_B=torch.zeros(3), scale_B=torch.ones(3))
    model = GroupCtf.build(frequency, GROUP)
    assert torch.equal(model(p), model(replace(p, has_envelope=False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_is_smaller_than_the_floor_and_zero_counts_as_positive(dtype):
    flat = replace(GROUP, amplitude_contrast=0.0)
    p = replace(particles(2), phase_shift_B=torch.zeros(2), scale_B=torch.ones(2))
    value = GroupCtf.build(torch.zeros(1, 2, dtype=dtype), flat)(p)
    assert torch.equal(value, torch.full_like(value, 1e-8))


@pytest.mark.parametrize("name, step", [("defocus_u_B", 1e-2), ("bfactor_B", 1e-3), ("scale_B", 1e-4), ("phase_shift_B", 1e-4)])
def test_gradients_are_right(name, step):
    frequency = half_plane_pixels(16).frequency_K2(2.0, torch.float64)
    p = particles(2)
    value = getattr(p, name).clone().requires_grad_()
    model = GroupCtf.build(frequency, GROUP)
    model(replace(p, **{name: value})).sum().backward()
    up, down = (model(replace(p, **{name: getattr(p, name) + s})).sum(1) for s in (step, -step))
    assert torch.allclose(value.grad, (up - down) / (2 * step), rtol=1e-4)


def test_indexing_keeps_particles_together():
    p = particles(6)
    assert len(p[2:4]) == 2
    assert torch.equal(p[torch.tensor([5, 0])].bfactor_B, p.bfactor_B[[5, 0]])


def test_wavelength_at_300_kv():
    """h / sqrt(2 m e V (1 + e V / 2 m c^2)) from CODATA constants, in Å; RELION's own constants differ by 3e-6."""
    h, m, e, c, volts = 6.62607015e-34, 9.1093837e-31, 1.602176634e-19, 299792458.0, 300e3
    expected = 1e10 * h / math.sqrt(2 * m * e * volts * (1 + e * volts / (2 * m * c * c)))
    assert pytest.approx(expected, rel=1e-5) == GROUP.wavelength_angstrom
