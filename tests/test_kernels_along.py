"""Both versions of `along`: against each other and against the definition, pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from verglas.kernels.along import along
from verglas.ptychography.noise import noise_named


@pytest.mark.parametrize("noise, offset", [("amplitude", 0.375), ("amplitude", 0.0), ("poisson", 0.0)])
@pytest.mark.parametrize("degree, shape", [(2, (1, 1, 1)), (4, (3, 7, 5))])
def test_versions_agree(noise: str, offset: float, degree: int, shape: tuple[int, int, int]) -> None:
    draw = torch.Generator().manual_seed(degree)
    coefficients = torch.randn(degree + 1, *shape, generator=draw, dtype=torch.float64)
    coefficients[0] += 12  # a prediction of 0 has no second derivative
    counts = 1 + torch.poisson(3 * torch.ones(shape, dtype=torch.float64), generator=draw)
    weight = (torch.rand(shape[1:], generator=draw) > 0.2).double()
    likelihood = noise_named(noise, offset)  # type: ignore[arg-type]
    step = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    intensity = sum(one * step**power for power, one in enumerate(coefficients))
    loss = (likelihood.loss(intensity, counts) * weight).sum()
    (first,) = torch.autograd.grad(loss, step, create_graph=True)
    (second,) = torch.autograd.grad(first, step)
    expected = torch.stack([loss.detach(), first.detach(), second])
    for name in ("reference", "cpu"):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            arrays = (one.to(dtype) for one in (coefficients, counts, weight))
            found = along(*arrays, 0.4, likelihood, name)
            assert found.dtype == torch.float64
            assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1), (name, dtype)
    dark = (coefficients, torch.zeros_like(counts), weight, 0.4, likelihood)  # autograd has no second derivative there
    assert torch.allclose(along(*dark, "cpu"), along(*dark, "reference"), rtol=1e-12)
