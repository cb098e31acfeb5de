"""`along` as sums over pixels; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.along import NoiseOfPixels


def along_reference(
    coefficients_DBYX: Tensor, counts_BYX: Tensor, weight_YX: Tensor, step: float, noise: NoiseOfPixels
) -> Tensor:
    """See README.md; Horner's scheme gives I and its derivatives together."""
    now = coefficients_DBYX[-1]
    first = second = torch.zeros_like(now)
    for coefficient_BYX in coefficients_DBYX[:-1].flip(0):
        second = second * step + 2 * first
        first = first * step + now
        now = now * step + coefficient_BYX
    slope = noise.slope(now, counts_BYX)
    terms = (
        noise.loss(now, counts_BYX),
        slope * first,
        noise.curvature(now, counts_BYX) * first.square() + slope * second,
    )
    return torch.stack([(term * weight_YX).sum(dtype=torch.float64) for term in terms])
