"""The expectation of single images written out in NumPy, float64, one sample after the other: what the batches must give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.integer]
Transforms = NDArray[np.complexfloating]


def shifted_by_loop(image: Array, dx: int, dy: int) -> Array:
    """Content moved by whole pixels; what comes in is 0."""
    box, out = len(image), np.zeros_like(image)
    for y in range(box):
        for x in range(box):
            if 0 <= y - dy < box and 0 <= x - dx < box:
                out[y, x] = image[y - dy, x - dx]
    return out


def masked_by_loop(image: Array, radius: float, edge: float) -> Array:
    """Image inside a circle with a raised-cosine edge outside its radius (px), the background's mean beyond."""
    box, inside = len(image), np.zeros_like(image)
    for y in range(box):
        for x in range(box):
            t = (math.hypot(y - box // 2, x - box // 2) - radius) / edge
            inside[y, x] = 1.0 if t <= 0 else 0.0 if t >= 1 else 0.5 + 0.5 * math.cos(math.pi * t)
    mean = (image * (1 - inside)).sum() / (1 - inside).sum()
    return image * inside + mean * (1 - inside)


def transform_at(image: Array, x_K: Array, y_K: Array) -> Transforms:
    """1/N^2 sum f(r) exp(-2 pi i k (r - N/2) / N) at integer frequencies."""
    box = len(image)
    axis = np.arange(box) - box // 2
    along_x = np.exp(-2j * np.pi / box * np.outer(x_K, axis))
    along_y = np.exp(-2j * np.pi / box * np.outer(y_K, axis))
    return np.einsum("ky,yx,kx->k", along_y, image, along_x) / box**2


def contrast(x_K: Array, y_K: Array, u: float, v: float, angle: float, voltage: float, cs: float, amplitude: float) -> Array:
    """CTF at frequencies in 1/Å; u, v in Å; angle in degrees; voltage in kV; cs in mm."""
    wavelength = 12.2643247 / math.sqrt(1e3 * voltage * (1 + 0.978466e-6 * 1e3 * voltage))
    a = math.radians(angle)
    along, across = x_K * math.cos(a) + y_K * math.sin(a), -x_K * math.sin(a) + y_K * math.cos(a)
    s2_K = x_K**2 + y_K**2
    gamma = -np.pi * wavelength * (u * along**2 + v * across**2) + np.pi / 2 * cs * 1e7 * wavelength**3 * s2_K**2
    return -np.sin(gamma - math.asin(amplitude))


def shell_power(image: Array, scale: float, shells: int, radius: int) -> Array:
    """sum |X|^2 per model shell over the half plane, in the model's units. scale: image field / model field."""
    box, out = len(image), np.zeros(shells)
    for y in range(-box // 2 + 1, box // 2 + 1):
        for x in range(box // 2 + 1):
            r = int(math.hypot(x, y) + 0.5)
            shell = int(r / scale + 0.5)
            if r > box // 2 or (x == 0 and y < 0) or shell >= shells:
                continue
            if y == -math.ceil(radius * scale) and shell == radius:  # the row that RELION's transforms of that size lack
                continue
            out[shell] += abs(transform_at(image, np.array([x]), np.array([y]))[0]) ** 2
    return out * scale**4


@dataclass(frozen=True)
class OneParticle:
    """A masked image X at coefficients K, its contrast s C, the noise per coefficient; shift phases need box and frequencies."""

    x_K: Array
    y_K: Array
    box: int
    image_K: Transforms
    contrast_K: Array
    sigma2_K: Array

    def shifted(self, shift: Array) -> Transforms:
        """The image moved by (x, y) px."""
        return self.image_K * np.exp(-2j * np.pi / self.box * (self.x_K * shift[0] + self.y_K * shift[1]))

    def log_probability(self, slice_K: Transforms, shift: Array, counts_K: Flags) -> float:
        """-1/2 sum |X - C P|^2 / sigma^2 over the coefficients that count."""
        difference_K = self.shifted(shift) - self.contrast_K * slice_K
        return float(-0.5 * (np.abs(difference_K) ** 2 / self.sigma2_K)[counts_K].sum())

    def log_probabilities(self, slices: Transforms, shifts: Array, counts_K: Flags) -> Array:
        """Of every pair, [slices, shifts]."""
        return np.array([[self.log_probability(one, shift, counts_K) for shift in shifts] for one in slices])

    def correlations(self, slices: Transforms, shifts: Array, counts_K: Flags) -> Array:
        """Re sum (C P)* X / |C P| of every pair, [slices, shifts]."""
        out = np.zeros((len(slices), len(shifts)))
        for i, one in enumerate(slices):
            seen_K = (self.contrast_K * one)[counts_K]
            for j, shift in enumerate(shifts):
                cross = (seen_K.conj() * self.shifted(shift)[counts_K]).real.sum()
                out[i, j] = cross / np.sqrt((np.abs(seen_K) ** 2).sum())
        return out


def smallest_set(weight: Array, fraction: float) -> Flags:
    """The largest weights that together hold more than a fraction of the sum."""
    order = np.argsort(-weight, axis=None)
    flat = weight.ravel()[order]
    count = int(np.argmax(np.cumsum(flat) > fraction * flat.sum())) + 1
    chosen = np.zeros(weight.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(weight.shape)
