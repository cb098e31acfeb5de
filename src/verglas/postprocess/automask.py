"""Solvent masks: low-pass, threshold, keep the large pieces, grow, soften."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from verglas.core.masks import radius_grid, raised_cosine
from verglas.core.threshold import otsu_threshold
from verglas.postprocess.curves import half_transform
from verglas.postprocess.options import MaskOptions
from verglas.postprocess.sharpening import low_pass

_SMALLEST_PIECE = 0.05


def automatic_threshold(smooth_ZYX: Tensor) -> float:
    """Density that separates particle from solvent in a low-pass filtered map [Z, Y, X] (protein positive).

    Only the sphere inscribed in the box is asked. Otsu's threshold finds the particle's core. Solvent is what lies below
    it; the result is half way between the solvent's median and Otsu's threshold, which keeps weaker domains, but not less
    than three robust standard deviations of the solvent above its median, which keeps noise out.
    """
    inside = radius_grid(smooth_ZYX.shape[0], 3) < smooth_ZYX.shape[0] // 2
    values = smooth_ZYX.cpu()[inside].double().numpy()
    core = otsu_threshold(values)
    solvent = values[values < core]
    median = float(np.median(solvent))
    spread = 1.4826 * float(np.median(np.abs(solvent - median)))
    return max(0.5 * (median + core), median + 3 * spread)


def without_small_pieces(binary_ZYX: np.ndarray, smallest: float = _SMALLEST_PIECE) -> np.ndarray:
    """Drop connected pieces (faces, edges, corners touch) below `smallest` times the largest."""
    labels, n = ndimage.label(binary_ZYX, structure=np.ones((3, 3, 3)))
    if n < 2:
        return binary_ZYX
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= smallest * sizes.max())[labels] & binary_ZYX


def grow(binary_ZYX: np.ndarray, pixels: float) -> np.ndarray:
    """Add the voxels nearer than `pixels` to the region; a negative number takes away those near the outside."""
    if pixels == 0 or binary_ZYX.all() or not binary_ZYX.any():
        return binary_ZYX
    if pixels > 0:
        return ndimage.distance_transform_edt(~binary_ZYX) < pixels
    return ndimage.distance_transform_edt(binary_ZYX) >= -pixels


def soften(binary_ZYX: np.ndarray, edge: float) -> Tensor:
    """Binary region [Z, Y, X] -> float32 mask with a raised cosine of `edge` px outside it."""
    if binary_ZYX.all() or not binary_ZYX.any():
        return torch.from_numpy(binary_ZYX.astype(np.float32))
    distance = torch.from_numpy(ndimage.distance_transform_edt(~binary_ZYX))
    return raised_cosine(distance, 0.0, edge).float()


def make_mask(map_ZYX: Tensor, pixel_size: float, options: MaskOptions) -> tuple[Tensor, float]:
    """Soft mask [Z, Y, X] in [0, 1] and the threshold used.

    With a given threshold every voxel at or above it counts (as in relion_mask_create); with the automatic one, pieces
    smaller than a twentieth of the largest are dropped.
    """
    smooth_ZYX = map_ZYX.double().cpu()
    if options.mask_lowpass > 0:
        filtered = low_pass(half_transform(smooth_ZYX), pixel_size, options.mask_lowpass)
        smooth_ZYX = torch.fft.irfftn(filtered, s=smooth_ZYX.shape, norm="forward")
    automatic = options.mask_threshold is None
    threshold = automatic_threshold(smooth_ZYX) if options.mask_threshold is None else options.mask_threshold
    binary_ZYX = (smooth_ZYX >= threshold).numpy()
    if automatic:
        binary_ZYX = without_small_pieces(binary_ZYX)
    return soften(grow(binary_ZYX, options.mask_extend), options.mask_edge), threshold
