"""`dose`, `descend`, `follow` and `best_lengths` in plain torch; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4  # share by which squares are raised
LEAST = 1e-30


def dose_reference(light_MYX: Tensor, corner_B2: Tensor, scale_B: Tensor, into_YX: Tensor) -> Tensor:
    """See README.md."""
    power_YX = light_MYX.abs().square().sum(0)
    into_YX.zero_()
    for (y, x), scale in zip(corner_B2.tolist(), scale_B, strict=True):
        into_YX[y : y + power_YX.shape[0], x : x + power_YX.shape[1]] += scale * power_YX
    return into_YX.amax()


def descend_reference(
    value_PYX: Tensor | None, gradient_PYX: Tensor, curvature_YX: Tensor, most: Tensor, damping: float, length: float
) -> None:
    """See README.md."""
    bottom_YX = torch.add(2 * damping * most, curvature_YX, alpha=2 * (1 - damping))
    gradient_PYX.mul_(-length).div_(bottom_YX.clamp_(min=torch.finfo(bottom_YX.dtype).tiny))
    if value_PYX is not None:
        value_PYX.add_(gradient_PYX)
        gradient_PYX.zero_()


def follow_reference(value_PYX: Tensor, step_PYX: Tensor, factor: Tensor) -> None:
    """See README.md."""
    value_PYX.add_(step_PYX.mul_(factor.to(step_PYX.real.dtype)))
    step_PYX.zero_()


def best_lengths_reference(product_B5: Tensor) -> Tensor:
    """See README.md."""
    length_B2, weight_B = lengths_of(product_B5), product_B5[:, 0]
    terms = (length_B2[:, 0] * weight_B, weight_B, length_B2[:, 1], torch.ones_like(weight_B))
    return torch.stack([one.sum() for one in terms])


def lengths_of(product_B5: Tensor) -> Tensor:
    """[B, 2] (s, t) of each position."""
    aa, pp, ap = product_B5[:, :3].unbind(1)
    ac, pc = (-0.5 * product_B5[:, 3:]).unbind(1)
    aa, pp = aa * (1 + RIDGE), pp * (1 + RIDGE)
    determinant = (aa * pp - ap * ap).clamp_min(LEAST)
    both = torch.stack([(pp * ac - ap * pc) / determinant, (aa * pc - ap * ac) / determinant], 1)
    alone = torch.stack([ac / aa.clamp_min(LEAST), torch.zeros_like(aa)], 1)
    return torch.where(pp[:, None] > 0, both, alone)
