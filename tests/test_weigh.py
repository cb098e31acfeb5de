"""`weigh`: the Numba version against the plain definition in float64, and the definition against its parts."""

from __future__ import annotations

import pytest
import torch

from verglas.core.fourier import centred_rfft2, half_plane_pixels
from verglas.kernels.weigh import GroupTables, ImageFactors, weigh
from verglas.optics.ctf import CtfParameters, GroupCtf, ctf_reference_BK
from verglas.optics.group import OpticsGroup

GROUP = OpticsGroup("g", 1, 300.0, 2.7, 0.1, 1.1, 24)
PIXELS = half_plane_pixels(24)


def parameters(n: int, envelope: bool) -> CtfParameters:
    generator = torch.Generator().manual_seed(n)
    u = 5000 + 25000 * torch.rand(n, generator=generator, dtype=torch.float64)
    angle = 360 * torch.rand(n, generator=generator, dtype=torch.float64)
    zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    return CtfParameters(u, 0.9 * u, angle, zero + 20, zero + 80 * envelope, one - 0.3 * envelope, has_envelope=envelope)


def case(envelope: bool, odd: bool, premultiplied: bool, with_ctf: bool) -> tuple[torch.Tensor, GroupTables, ImageFactors]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(5, 24, 24, generator=generator, dtype=torch.float64)
    ctf = GroupCtf.build(PIXELS.frequency_K2(1.1, torch.float64), GROUP)
    particles = parameters(5, envelope)
    odd_K = torch.randn(PIXELS.count, generator=generator, dtype=torch.float64) if odd else None
    tables = GroupTables(PIXELS, ctf.quadratic_3K if with_ctf else None, ctf.shared_K, ctf.u2_K, odd_K, 1.7, premultiplied)
    turn = torch.randn(5, 2, generator=generator, dtype=torch.float64) * 0.3
    envelope_B2 = torch.stack([particles.bfactor_B, particles.scale_B], 1) if envelope else None
    factors = ImageFactors(turn, torch.stack(ctf.coefficients(particles), 1), envelope_B2)
    return torch.fft.rfft2(image, norm="forward"), tables, factors


@pytest.mark.parametrize("envelope, odd, premultiplied, with_ctf", [
    (False, False, False, True), (True, False, False, True), (False, True, False, True), (True, True, True, True),
    (False, True, False, False),
])  # fmt: skip
def test_compiled_version_matches_the_definition(envelope: bool, odd: bool, premultiplied: bool, with_ctf: bool) -> None:
    fourier, tables, factors = case(envelope, odd, premultiplied, with_ctf)
    data, weight = weigh(fourier, tables, factors, "reference")
    fast_data, fast_weight = weigh(fourier.to(torch.complex64), tables, factors, "cpu")
    assert (fast_weight - weight).abs().max() < 2e-4  # float32 phases of some 300 radians
    assert (fast_data - data).abs().max() < 2e-4 * data.abs().max()
    if not with_ctf:
        assert (weight == 1).all() and (fast_weight == 1).all()


def test_definition_is_centring_shift_and_ctf() -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(3, 24, 24, generator=generator, dtype=torch.float64)
    particles, frequency = parameters(3, True), PIXELS.frequency_K2(1.1, torch.float64)
    ctf = GroupCtf.build(frequency, GROUP)
    turn = torch.tensor([[-2 * torch.pi * 4 / 24, -2 * torch.pi * -3 / 24]] * 3, dtype=torch.float64)
    tables = GroupTables(PIXELS, ctf.quadratic_3K, ctf.shared_K, ctf.u2_K)
    envelope = torch.stack([particles.bfactor_B, particles.scale_B], 1)
    factors = ImageFactors(turn, torch.stack(ctf.coefficients(particles), 1), envelope)
    data, weight = weigh(torch.fft.rfft2(image, norm="forward"), tables, factors, "reference")
    moved = PIXELS.gather(centred_rfft2(image.roll((-3, 4), (1, 2))))  # content moved by x + 4, y - 3
    expected = ctf_reference_BK(frequency, particles, GROUP)
    inside = (PIXELS.x_K < 12) & (PIXELS.y_K.abs() < 12)  # a shift is not defined at the Nyquist frequency
    product = (expected * moved)[:, inside]
    assert torch.allclose(weight, expected**2, atol=1e-10)
    assert torch.allclose(torch.complex(data[:, 0], data[:, 1])[:, inside], product, atol=1e-12)


def test_double_precision_is_never_lowered_in_silence() -> None:
    fourier, tables, factors = case(False, False, False, True)
    data, weight = weigh(fourier, tables, factors)
    assert data.dtype == weight.dtype == torch.float64
    with pytest.raises(TypeError, match="complex64"):
        weigh(fourier, tables, factors, "cpu")
