"""A particle whose map and projections are known in closed form: a sum of round Gaussians. Lengths in Å."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blobs:
    """Gaussians of one width `sigma` at centre_P3 (x, y, z from the centre of the map) with heights height_P."""

    centre_P3: Tensor
    height_P: Tensor
    sigma: float

    @classmethod
    def random(cls, n: int, spread: float, sigma: float, seed: int = 0) -> Blobs:
        """`n` Gaussians in a ball of radius `spread`, heights 0.5 to 1.5, no symmetry."""
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        length = spread * torch.rand(n, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
        height = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
        return cls(direction / direction.norm(dim=1, keepdim=True) * length, height, sigma)

    def map(self, box: int, pixel_size: float) -> Tensor:
        """Grey values [Z, Y, X], float64."""
        axis = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel_size
        x_PX, y_PY, z_PZ = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * self.sigma**2)) for c in self.centre_P3.T)
        return torch.einsum("p,pz,py,px->zyx", self.height_P, z_PZ, y_PY, x_PX)

    def transform(self, frequency_RK3: Tensor) -> Tensor:
        """Integral of density times exp(-2 pi i s.r) over space, at frequencies (x, y, z) in 1/Å: complex128 [R, K]."""
        out = torch.zeros(frequency_RK3.shape[:-1], dtype=torch.complex128)
        for centre_3, height in zip(self.centre_P3, self.height_P):
            angle = -2 * math.pi * (frequency_RK3 @ centre_3)
            out += height * torch.polar(torch.ones_like(angle), angle)
        envelope = torch.exp(-2 * math.pi**2 * self.sigma**2 * frequency_RK3.square().sum(-1))
        return out * envelope * (2 * math.pi) ** 1.5 * self.sigma**3

    def slices(self, rotation_R33: Tensor, frequency_K2: Tensor, field: float, depth: float) -> Tensor:
        """Transforms [R, K] of projections at poses A, at image frequencies in 1/Å.

        field: edge of the image in Å, whose area the forward transform divides by; depth: Å per step of the sum along z.
        """
        frequency_RK3 = torch.einsum("rji,kj->rki", rotation_R33[:, :2].double(), frequency_K2.double())
        return self.transform(frequency_RK3) / (field**2 * depth)
