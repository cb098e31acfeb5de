"""What happens to particle images before they are compared: pure functions on batches, any device, any real dtype.

Greyscale convention: protein white, background of mean 0 and standard deviation 1. Lengths in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2, centred_rfft2, crop_half_plane
from verglas.core.masks import radius_grid

SMALLEST_DEVIATION = 1e-10  # of the background; below it there is nothing to normalise


def normalise_background(image_BYX: Tensor, radius: float, ramp: bool = True) -> Tensor:
    """Background of mean 0 and standard deviation 1, judged by the pixels farther than `radius` px from the centre.

    ramp: subtract the plane (least squares through those pixels) instead of the mean alone. A background without any
    variation keeps its scale. ValueError if `radius` leaves fewer than ten pixels outside.
    """
    box = image_BYX.shape[-1]
    outside_P = radius_grid(box, 2, image_BYX.device, torch.float64).flatten() > radius
    count = int(outside_P.sum())
    if count < 10:
        raise ValueError(f"a background radius of {radius} px leaves {count} pixels of a {box} px box")
    flat_BP = image_BYX.flatten(-2)
    background = _plane(box, image_BYX.device)[:, : 3 if ramp else 1]
    # One small product per image: coefficients of the plane from the pixels outside, in float64 for its condition.
    solver_CP = torch.linalg.pinv(background[outside_P])
    coefficients_BC = flat_BP[..., outside_P].double() @ solver_CP.T
    flat_BP = flat_BP - (coefficients_BC @ background.T).to(image_BYX.dtype)
    deviation_B = flat_BP[..., outside_P].double().square().mean(-1).sqrt()
    scale_B = torch.where(deviation_B < SMALLEST_DEVIATION, 1.0, 1 / deviation_B)
    return (flat_BP * scale_B.to(image_BYX.dtype)[..., None]).unflatten(-1, (box, box))


def _plane(box: int, device: torch.device) -> Tensor:
    """Columns 1, x, y (in half boxes) of every pixel, float64 [P, 3]."""
    axis = (torch.arange(box, device=device, dtype=torch.float64) - box // 2) / (box // 2)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.ones_like(x), x, y], -1).flatten(0, 1)


def whole_pixels(origin_B2: Tensor, pixel_size: float) -> Tensor:
    """Integer part of origins (Å) in pixels, int64 [B, 2]: rounded, halves away from zero."""
    pixels = origin_B2 / pixel_size
    return (pixels.sign() * (pixels.abs() + 0.5).floor()).long()


def shift_whole_pixels(image_BYX: Tensor, shift_B2: Tensor) -> Tensor:
    """Move the content of image b by the integers shift_B2[b] = (x, y); nothing wraps around, vacated pixels are 0."""
    box_y, box_x = image_BYX.shape[-2:]
    shift_B2 = shift_B2.to(image_BYX.device)
    from_x_BX = torch.arange(box_x, device=image_BYX.device) - shift_B2[:, :1]
    from_y_BY = torch.arange(box_y, device=image_BYX.device) - shift_B2[:, 1:]
    inside_x_BX, inside_y_BY = (from_x_BX >= 0) & (from_x_BX < box_x), (from_y_BY >= 0) & (from_y_BY < box_y)
    particle_B = torch.arange(len(image_BYX), device=image_BYX.device)[:, None, None]
    moved = image_BYX[particle_B, from_y_BY.clamp(0, box_y - 1)[:, :, None], from_x_BX.clamp(0, box_x - 1)[:, None, :]]
    return moved * (inside_y_BY[:, :, None] & inside_x_BX[:, None, :])


def transform(image_BYX: Tensor, box: int | None = None) -> Tensor:
    """Centred transform (forward 1/N^2), cropped to a `box` px field of frequencies: complex [B, box, box/2+1]."""
    fourier = centred_rfft2(image_BYX)
    return fourier if box is None or box == image_BYX.shape[-1] else crop_half_plane(fourier, box)


def resample(image_BYX: Tensor, box: int) -> Tensor:
    """Images of the same field on `box` x `box` pixels by cropping (or padding) their transforms; grey values are kept.

    The centre stays the centre: pixel N/2 becomes pixel box/2. The pixel size becomes N/box times the old one.
    """
    if box % 2 or image_BYX.shape[-1] % 2:
        raise ValueError(f"boxes must be even, got {image_BYX.shape[-1]} and {box}")
    return centred_irfft2(transform(image_BYX, box), box)
