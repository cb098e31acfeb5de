"""Soft masks. Every edge is a raised cosine that lies outside the radius it is named by."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def raised_cosine(distance: Tensor, radius: float, width: float) -> Tensor:
    """1 inside `radius`, 0 beyond radius + width, half a cosine between (all in one unit, usually pixels)."""
    if width <= 0:
        return (distance <= radius).to(distance.dtype)
    t = ((distance - radius) / width).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(math.pi * t)


def radius_grid(
    box: int, ndim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, part: slice | None = None
) -> Tensor:
    """Distance in pixels from the centre pixel box/2, shape [box] * ndim; part: of the first axis, that is wanted."""
    axis = torch.arange(box, device=device, dtype=dtype) - box // 2
    squares = torch.zeros([1] * ndim, device=device, dtype=dtype)
    for dim in range(ndim):
        view = [1] * ndim
        view[dim] = -1
        along = axis[part] if part is not None and dim == 0 else axis
        squares = squares + (along * along).view(view)
    return squares.sqrt()


def soft_sphere(
    box: int, radius: float, width: float, device: torch.device | str = "cpu", part: slice | None = None
) -> Tensor:
    """Soft spherical mask [Z, Y, X]; radius and width in pixels; part: of the first axis, that is wanted."""
    return raised_cosine(radius_grid(box, 3, device, part=part), radius, width)


def soft_circle(box: int, radius: float, width: float, device: torch.device | str = "cpu") -> Tensor:
    """Soft circular mask [Y, X]; radius and width in pixels."""
    return raised_cosine(radius_grid(box, 2, device), radius, width)


def fill_outside(image: Tensor, mask: Tensor) -> Tensor:
    """Blend `image` [..., *mask.shape] into its own background mean outside the soft `mask` (RELION's --zero_mask).

    The mean is weighted by 1 - mask, so it is the mean of what lies outside.
    """
    dims = tuple(range(-mask.ndim, 0))
    outside = 1 - mask
    mean = (image * outside).sum(dims, keepdim=True) / outside.sum().clamp_min(1e-12)
    return image * mask + mean * outside


def low_pass_filter(shell_radius: Tensor, cutoff: float, width: float = 2.0) -> Tensor:
    """Raised-cosine low pass of total `width` shells centred on `cutoff` shells: 1 below, 0.5 at the cutoff, 0 above."""
    return raised_cosine(shell_radius, cutoff - width / 2, width)
