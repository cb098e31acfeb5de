"""Padded transforms of maps the plain way, whole: what those that leave out zeros, axis by axis, are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.fourier import centred_rfft3
from verglas.projection.volume import gridding_correction


def padded_transform(map_ZYX: Tensor, size: int) -> Tensor:
    """Gridding-corrected, zero-padded, centred transform times P^3 / N^2 [P, P, P/2+1]: its slices are FFT2(projection) / N^2."""
    box, inner = len(map_ZYX), _middle(len(map_ZYX), size)
    padded_ZYX = map_ZYX.new_zeros(size, size, size)
    padded_ZYX[inner, inner, inner] = map_ZYX / gridding_correction(box, size / box, map_ZYX.device).to(map_ZYX.dtype)
    return centred_rfft3(padded_ZYX) * (size**3 / box**2)


def cropped_map(fourier_ZYX: Tensor, box: int) -> Tensor:
    """Inverse of `padded_transform` up to the gridding correction: centred transform [P, P, P/2+1] -> map [N, N, N]."""
    size, inner = len(fourier_ZYX), _middle(box, len(fourier_ZYX))
    whole_ZYX = torch.fft.fftshift(torch.fft.irfftn(fourier_ZYX, s=(size,) * 3))
    return whole_ZYX[inner, inner, inner] * box**2


def _middle(box: int, size: int) -> slice:
    first = size // 2 - box // 2
    return slice(first, first + box)
