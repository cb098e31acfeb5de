"""What can be done to a map: flip, rotate, symmetrise, filter, resample, crop, pad, normalise. Pure functions on [Z, Y, X].

Every operation keeps the centre voxel N/2 of a map where it is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from verglas.core.fourier import fourier_resize
from verglas.core.masks import low_pass_filter, radius_grid
from verglas.postprocess.curves import half_transform
from verglas.postprocess.random_phases import squared_radius
from verglas.postprocess.sharpening import low_pass


def flip_hand(map_ZYX: Tensor) -> Tensor:
    """Mirror image: x -> -x about the centre voxel (the first column keeps its place, it has no partner)."""
    return map_ZYX.roll(-1, dims=2).flip(2)


def rotate(map_ZYX: Tensor, rotation_33: Tensor, shift_3: Tensor | None = None, order: int = 3) -> Tensor:
    """The map turned by A and then moved: out(A r + shift) = map(r), r = (x, y, z) about the centre voxel, pixels.

    A as in `verglas.core.rotations.matrix_from_euler`. Spline interpolation of `order`; zero beyond the box.
    """
    flip = torch.arange(2, -1, -1)  # (x, y, z) <-> array axes (z, y, x)
    inverse = rotation_33.double().T[flip][:, flip].numpy()
    centre = np.full(3, map_ZYX.shape[0] // 2, dtype=np.float64)
    shift = np.zeros(3) if shift_3 is None else shift_3.double()[flip].numpy()
    offset = centre - inverse @ (centre + shift)
    turned = ndimage.affine_transform(map_ZYX.double().numpy(), inverse, offset, order=order, mode="constant", cval=0.0)
    return torch.from_numpy(turned)


def symmetrise(map_ZYX: Tensor, symmetry_G33: Tensor) -> Tensor:
    """Mean over the rotations of a point group (identity first, as `verglas.core.symmetry` gives them)."""
    total = map_ZYX.double().clone()
    for rotation_33 in symmetry_G33[1:]:
        total += rotate(map_ZYX, rotation_33)
    return total / len(symmetry_G33)


def low_passed(map_ZYX: Tensor, pixel_size: float, cutoff: float) -> Tensor:
    """Raised cosine of two shells about the shell nearest to `cutoff` Å."""
    return torch.fft.irfftn(low_pass(half_transform(map_ZYX), pixel_size, cutoff), s=map_ZYX.shape, norm="forward")


def high_passed(map_ZYX: Tensor, pixel_size: float, cutoff: float) -> Tensor:
    """What a low pass at `cutoff` Å takes away."""
    box = map_ZYX.shape[0]
    radius = squared_radius(box, map_ZYX.device).double().sqrt()
    kept = 1 - low_pass_filter(radius, int(box * pixel_size / cutoff + 0.5), 2)
    return torch.fft.irfftn(half_transform(map_ZYX) * kept, s=map_ZYX.shape, norm="forward")


def window(map_ZYX: Tensor, box: int, fill: float = 0.0) -> Tensor:
    """Crop or pad every axis to `box` px in real space about the centre voxel; new voxels get `fill`."""
    margins: list[int] = []
    for old in reversed(map_ZYX.shape):  # `pad` takes the last axis first
        before = box // 2 - old // 2
        margins += [before, box - old - before]
    return torch.nn.functional.pad(map_ZYX, margins, value=fill)


def resampling_boxes(box: int, old_pixel: float, new_pixel: float, tolerance: float = 1e-4) -> tuple[int, int]:
    """(padded box at the old pixel size, box at the new one), both even, whose ratio gives `new_pixel`.

    The smallest padding (at most to twice the box) with a relative error of the pixel size below `tolerance`, else the best.
    """
    best, best_error = (box, box), math.inf
    for padded in range(box, 2 * box + 1, 2):
        size = max(2 * round(padded * old_pixel / (2 * new_pixel)), 2)
        error = abs(padded * old_pixel / (size * new_pixel) - 1)
        if error < best_error * (1 - 1e-9):
            best, best_error = (padded, size), error
        if error <= tolerance:
            break
    return best


def resample(map_ZYX: Tensor, old_pixel: float, new_pixel: float) -> tuple[Tensor, float]:
    """The map at `new_pixel` Å (even box nearest to the same extent) and the pixel size really reached.

    The map is padded in real space first so that a ratio of even boxes gives the pixel size, then resized in Fourier space.
    """
    padded, size = resampling_boxes(map_ZYX.shape[0], old_pixel, new_pixel)
    reached = padded * old_pixel / size
    resized = fourier_resize(window(map_ZYX.double(), padded), size)
    return window(resized, max(2 * round(map_ZYX.shape[0] * old_pixel / (2 * reached)), 2)), reached


def normalise(map_ZYX: Tensor, radius: float | None = None) -> Tensor:
    """Mean 0 and standard deviation 1 of what lies outside `radius` px (default: the inscribed sphere's surface).

    A map that is constant out there (masked) is scaled by its overall standard deviation instead.
    """
    box = map_ZYX.shape[0]
    outside = radius_grid(box, 3) > (box / 2 - 1 if radius is None else radius)
    background = map_ZYX.double()[outside]
    deviation = background.std()
    if deviation <= 1e-6 * map_ZYX.double().std():
        deviation = map_ZYX.double().std()
    return (map_ZYX.double() - background.mean()) / deviation
