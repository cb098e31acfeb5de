"""Likelihoods of counts n under predicted intensities I: minus the logarithm, up to what does not depend on I.

    amplitude    (sqrt(I) - sqrt(n))^2      Gaussian noise of variance 1/4 of sqrt(n), nearly that of Poisson counts
    poisson      I - n ln I

Both have their minimum at I = n and curvature 1 / (2 n), 1 / n there: an `amplitude` is half of a `poisson`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from verglas.kernels.along import FLOOR, NoiseOfPixels


@dataclass(frozen=True)
class Amplitude:
    """Gaussian noise of the square root of counts.

    offset: counts added to both I and n. 3/8 makes the variance of sqrt(n) nearly that of a Gaussian down to single counts
    (Anscombe 1948). Without any, the slope in a pixel that nothing is predicted for hangs on the phase of a wave of rounding
    errors: single and double precision went ways of their own there.
    """

    offset: float = 0.0
    poisson: bool = False

    def loss(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """(sqrt(I) - sqrt(n))^2"""
        return (self._root(intensity) - (counts + self.offset).sqrt()).square()

    def slope(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """1 - sqrt(n / I)"""
        return 1 - (counts + self.offset).sqrt() / self._root(intensity)

    def curvature(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """sqrt(n / I) / (2 I)"""
        root = self._root(intensity)
        return (counts + self.offset).sqrt() / (2 * root * root * root)

    def _root(self, intensity: Tensor) -> Tensor:
        return (intensity + self.offset).clamp_min(FLOOR).sqrt()


@dataclass(frozen=True)
class Poisson:
    """Counted photons."""

    offset: float = 0.0
    poisson: bool = True

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


def noise_named(name: Literal["amplitude", "poisson"], offset: float = 0.0) -> NoiseOfPixels:
    """The likelihood of that name; offset: of `Amplitude`."""
    return Poisson() if name == "poisson" else Amplitude(offset)
