"""Phases for the eye: without the slope that data leave open, and without jumps of 2 pi. numpy; Y X pixels."""

from __future__ import annotations

import math

import numpy as np
from scipy import fft


def levelled(object_YX: np.ndarray, seen_YX: np.ndarray) -> np.ndarray:
    """The object without its mean phase and its most common phase slope where seen_YX (bool) holds; modulus kept."""
    made_YX = np.where(seen_YX, object_YX, 0)
    slopes = [np.angle(_steps(made_YX, axis).sum()) for axis in (0, 1)]
    rows, columns = (np.arange(edge) - edge / 2 for edge in object_YX.shape)
    flat_YX = object_YX * np.exp(-1j * (slopes[0] * rows[:, None] + slopes[1] * columns))
    return flat_YX * np.exp(-1j * np.angle(flat_YX[seen_YX].sum()))


def _steps(object_YX: np.ndarray, axis: int) -> np.ndarray:
    """object(r + 1) conj(object(r)) along an axis: its phase is the slope."""
    after = object_YX[1:] if axis == 0 else object_YX[:, 1:]
    before = object_YX[:-1] if axis == 0 else object_YX[:, :-1]
    return after * before.conj()


def unwrapped(phase_YX: np.ndarray) -> np.ndarray:
    """The phase without jumps: that least-squares solution of its wrapped differences (a Poisson equation, solved by cosine
    transforms; Ghiglia and Romero 1994) decides which multiple of 2 pi is added to each pixel."""
    rows, columns = phase_YX.shape
    down, right = (_wrapped(np.diff(phase_YX, axis=axis)) for axis in (0, 1))
    divergence_YX = np.zeros(phase_YX.shape)
    divergence_YX[:-1] += down
    divergence_YX[1:] -= down
    divergence_YX[:, :-1] += right
    divergence_YX[:, 1:] -= right
    eigen_YX = 2 * np.cos(math.pi * np.arange(rows) / rows)[:, None] + 2 * np.cos(math.pi * np.arange(columns) / columns) - 4
    eigen_YX[0, 0] = 1.0
    smooth_YX = fft.dctn(divergence_YX, norm="ortho") / eigen_YX
    smooth_YX[0, 0] = 0.0
    smooth_YX = fft.idctn(smooth_YX, norm="ortho")
    smooth_YX += np.angle(np.exp(1j * (phase_YX - smooth_YX)).sum())
    return phase_YX + 2 * math.pi * np.round((smooth_YX - phase_YX) / (2 * math.pi))


def _wrapped(angle: np.ndarray) -> np.ndarray:
    """The same angle between -pi and pi."""
    return np.angle(np.exp(1j * angle))
