"""Likelihoods of counts n under predicted intensities I: minus the logarithm, up to what does not depend on I.

    amplitude    (sqrt(I) - sqrt(n))^2      Gaussian noise of variance 1/4 of sqrt(n), nearly that of Poisson counts
    poisson      I - n ln I

Both have their minimum at I = n and curvature 1 / (2 n), 1 / n there: an `amplitude` is half of a `poisson`.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

FLOOR = 1e-10  # counts: predictions are no lower, so that a dark pixel has a finite slope


class Noise(Protocol):
    """A likelihood, pixel by pixel; intensity and counts broadcast against each other."""

    def loss(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """Minus the logarithm of the likelihood."""

    def slope(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """First derivative of `loss` with respect to the intensity."""

    def curvature(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """Second derivative."""


class Amplitude:
    """Gaussian noise of the square root of counts."""

    def loss(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """(sqrt(I) - sqrt(n))^2"""
        return (intensity.clamp_min(FLOOR).sqrt() - counts.sqrt()).square()

    def slope(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """1 - sqrt(n / I)"""
        return 1 - (counts / intensity.clamp_min(FLOOR)).sqrt()

    def curvature(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """sqrt(n / I) / (2 I)"""
        intensity = intensity.clamp_min(FLOOR)
        return (counts / intensity).sqrt() / (2 * intensity)


class Poisson:
    """Counted photons."""

    def loss(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """I - n ln I, less its minimum n - n ln n."""
        intensity = intensity.clamp_min(FLOOR)
        return intensity - counts + torch.xlogy(counts, counts / intensity)

    def slope(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """1 - n / I"""
        return 1 - counts / intensity.clamp_min(FLOOR)

    def curvature(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """n / I^2"""
        return counts / intensity.clamp_min(FLOOR).square()


def noise_named(name: Literal["amplitude", "poisson"]) -> Noise:
    """The likelihood of that name."""
    return Poisson() if name == "poisson" else Amplitude()
