"""All versions of `dose`, `descend`, `follow` and `best_lengths` against their definition."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from verglas.kernels.descend import best_lengths, descend, dose, follow
from verglas.kernels.descend.reference import lengths_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
VERSIONS = ["reference", "cpu", pytest.param("triton", marks=NEEDS)]


def device_of(name: str) -> str:
    """A GPU for Triton, unless its interpreter runs."""
    return "cuda" if name == "triton" and not INTERPRETED else "cpu"


def fields(planes: int, device: str) -> list[Tensor]:
    """Value, gradient, curvature of an odd number of pixels, more than one program takes; a corner of it without light."""
    draw = torch.Generator().manual_seed(planes)
    value, gradient = (torch.randn(planes, 37, 41, generator=draw, dtype=torch.complex64) for _ in range(2))
    curvature = torch.rand(37, 41, generator=draw)
    curvature[:5, :5] = 0
    gradient[:, :5, :5] = 0
    return [one.to(device) for one in (value, gradient, curvature)]


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("name", VERSIONS)
def test_steps_down(name: str, planes: int, damping: float) -> None:
    value, gradient, curvature = fields(planes, device_of(name))
    most = curvature.amax()
    bottom = 2 * ((1 - damping) * curvature + damping * most)
    step = -0.7 * gradient / bottom.clamp_min(torch.finfo(torch.float32).tiny)
    start, first = value.clone(), gradient.clone()
    descend(value, gradient, curvature, most, damping, 0.7, name)
    assert (value - start - step).abs().max() <= 1e-6 * float((start.abs() + step.abs()).max())
    assert not gradient.any()
    _, gradient, curvature = fields(planes, value.device.type)
    descend(None, gradient, curvature, most, damping, 0.7, name)
    assert torch.allclose(gradient, step, rtol=1e-5) and first.any()


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("modes", [1, 2])
def test_dose(name: str, modes: int) -> None:
    """Windows that reach to all edges of an object of several tiles; what was there before is gone."""
    draw, device = torch.Generator().manual_seed(modes), device_of(name)
    light = torch.randn(modes, 12, 20, generator=draw, dtype=torch.complex64)
    corner = torch.stack([torch.randint(0, high, (9,), generator=draw) for high in (40 - 12 + 1, 150 - 20 + 1)], 1)
    corner[0], corner[1], scale = torch.tensor([0, 0]), torch.tensor([28, 130]), 0.5 + torch.rand(9, generator=draw)
    expected = torch.zeros(40, 150)
    for (y, x), bright in zip(corner.tolist(), scale, strict=True):
        expected[y : y + 12, x : x + 20] += bright * light.abs().square().sum(0)
    into = torch.full((40, 150), 7.0, device=device)
    most = dose(light.to(device), corner.to(device), scale.to(device), into, name)
    assert (into.cpu() - expected).abs().max() < 1e-5 * expected.max() and float(most) == float(into.max())


@pytest.mark.parametrize("name", VERSIONS)
def test_follows(name: str) -> None:
    value, step, _ = fields(2, device_of(name))
    expected = value - 0.3 * step
    follow(value, step, torch.tensor([5.0, -0.3], dtype=torch.float64, device=value.device)[1], name)
    assert (value - expected).abs().max() < 1e-6 and not step.any()


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("fitted", [True, False])
def test_best_lengths(name: str, fitted: bool) -> None:
    """A brute-force least-squares fit of every position, but for the ridge."""
    draw, like = torch.Generator().manual_seed(3), torch.zeros(1, device=device_of(name))
    a, p, c = (torch.randn(300, 50, generator=draw, dtype=torch.float64) for _ in range(3))
    p = p if fitted else torch.zeros_like(p)
    product = torch.stack([(one * other).sum(1) for one, other in ((a, a), (p, p), (a, p), (a, c), (p, c))], 1)
    columns = torch.stack([a, p], 2)[:, :, : 1 + fitted]
    expected = torch.linalg.lstsq(columns, -0.5 * c[:, :, None]).solution[:, :, 0]
    found = lengths_of(product)
    assert (found[:, : 1 + fitted] - expected).abs().max() < 1e-3 and (fitted or not found[:, 1].any())
    weight = product[:, 0]
    sums = torch.stack([(found[:, 0] * weight).sum(), weight.sum(), found[:, 1].sum(), torch.tensor(300.0).double()])
    assert torch.allclose(best_lengths(product.to(like.device), like, name).cpu(), sums, rtol=1e-9)


def test_what_triton_cannot_take() -> None:
    pytest.importorskip("triton")
    value, gradient, curvature = fields(1, "cpu")
    with pytest.raises(TypeError, match="complex128"):
        descend(None, gradient.to(torch.complex128), curvature, curvature.amax(), 0.1, 1.0, "triton")
    with pytest.raises(TypeError, match="contiguous"):
        follow(value.mT, gradient.mT, torch.ones((), dtype=torch.float64), "triton")
