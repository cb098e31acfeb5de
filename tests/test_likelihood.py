"""`verglas.likelihood` against sums written out in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import verglas
from verglas.errors import InputError
from verglas.likelihood import BLOCK, scaled_differences, squared_differences


def by_hand(image_BK: Tensor, projection_OK: Tensor, contrast_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """sum_k w |x - c p|^2 in float64, an image at a time."""
    double = (image_BK.to(torch.complex128), contrast_BK.double(), weight_BK.double())
    projection_OK = projection_OK.to(torch.complex128)
    return torch.stack([(w * (x - c * projection_OK).abs().square()).sum(1) for x, c, w in zip(*double)])


def a_set(n: int, projections: int, k: int, dtype: torch.dtype = torch.complex64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, projections, contrasts, weights; spectra that fall by a factor of 30, as real ones do."""
    generator = torch.Generator().manual_seed(n + projections + k)
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    fall_K = torch.linspace(0, -3.4, k, dtype=real).exp()
    image_BK, projection_OK = (fall_K * torch.randn(m, k, dtype=dtype, generator=generator) for m in (n, projections))
    contrast_BK = torch.sin(torch.arange(k) * (1 + torch.rand(n, 1, generator=generator))).to(real)
    return image_BK, projection_OK, contrast_BK, torch.rand(n, k, dtype=real, generator=generator) / fall_K


def planes(values: Tensor) -> Tensor:
    return torch.stack([values.real, values.imag], 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 101), (40, BLOCK + 3, 265), (30, 200, 1600)])
def test_single_precision_is_exact_to_1e_5_of_the_spread(shape: tuple[int, int, int]) -> None:
    sets = a_set(*shape)
    expected = by_hand(*sets)
    found = squared_differences(*sets)
    spread = expected.std() if shape[1] > 1 else expected
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found.double() - expected).abs().max() < 1e-5 * spread.item()


def test_double_precision() -> None:
    sets = a_set(5, 17, 99, torch.complex128)
    torch.testing.assert_close(squared_differences(*sets), by_hand(*sets), rtol=1e-12, atol=0)


def test_layouts_of_images_and_projections_mix() -> None:
    image, projection, contrast, weight = a_set(6, 31, 77, torch.complex128)
    expected = by_hand(image, projection, contrast, weight)
    for x in (image, planes(image)):
        for p in (projection, planes(projection)):
            torch.testing.assert_close(squared_differences(x, p, contrast, weight), expected, rtol=1e-12, atol=0)


def test_one_contrast_and_weight_for_all_images_and_no_image_term() -> None:
    image, projection, contrast, weight = a_set(6, 31, 77, torch.complex128)
    expected = by_hand(image, projection, contrast[:1].expand_as(contrast), weight[:1].expand_as(weight))
    torch.testing.assert_close(squared_differences(image, projection, contrast[0], weight[0]), expected, rtol=1e-12, atol=0)
    without = squared_differences(image, projection, contrast[0], weight[0], image_term=False)
    constant = (image.abs().square() * weight[0]).sum(1, keepdim=True)
    torch.testing.assert_close(without + constant, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("code", ["", "torch.set_float32_matmul_precision('medium')",
                                  "torch.set_float32_matmul_precision('high')",
                                  "torch.backends.mkldnn.matmul.fp32_precision = 'tf32'"])  # fmt: skip
def test_settings_of_the_process_stay(code: str) -> None:
    program = f"""
import torch
from verglas.likelihood import squared_differences
{code}
before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
one = torch.ones(3, 4)
squared_differences(one.cfloat(), one.cfloat(), one, one)
assert before == (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision), before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6, 0.0])
def test_scaled_differences_where_they_nearly_vanish(noise: float) -> None:
    generator = torch.Generator().manual_seed(2)
    projection = torch.randn(20000, dtype=torch.complex128, generator=generator)
    contrast, weight = torch.randn(2, 20000, dtype=torch.float64, generator=generator)
    weight = weight.abs()
    image = 1.3 * contrast * projection + noise * torch.randn(20000, dtype=torch.complex128, generator=generator)
    factors = torch.cat([torch.tensor([0.0, -2.0, 1e6]), 1.3 + torch.logspace(-7, 0, 15)]).double()
    expected = by_hand(image[None], factors[:, None] * projection, contrast[None], weight[None])[0]
    torch.testing.assert_close(scaled_differences(image, projection, contrast, weight, factors), expected, rtol=1e-9, atol=0)


def test_scaled_differences_of_nothing() -> None:
    image, zero, one = torch.ones(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.complex64), torch.ones(3)
    assert scaled_differences(image, zero, one, one, torch.tensor([0.0, 2.0])).tolist() == [3, 3]


def test_what_does_not_go_together_is_refused() -> None:
    image, projection, contrast, weight = a_set(3, 4, 5)
    for wrong in [
        (image[0], projection, contrast, weight), (image, projection[:, :4], contrast, weight),
        (image, projection, contrast[:2], weight), (image, projection, contrast, weight.double()),
        (image, projection, contrast, weight.cfloat()), (image, projection[:0], contrast, weight),
        (image.real.int(), projection, contrast, weight),
    ]:  # fmt: skip
        with pytest.raises(InputError, match="squared_differences"):
            squared_differences(*wrong)
    good = (image[0], projection[0], contrast[0], weight[0])
    for wrong in [(*good, torch.tensor(1.0)), (*good[:3], weight, torch.ones(2)), (image[0].real, *good[1:], torch.ones(2))]:
        with pytest.raises(InputError, match="scaled_differences"):
            scaled_differences(*wrong)


def test_reached_from_the_package() -> None:
    assert verglas.likelihood.squared_differences is squared_differences
