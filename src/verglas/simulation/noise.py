"""What is in an image besides the particle: coloured noise, and junk with a structure of its own.

Noise has two independent parts: white noise of the camera, and ice, whose power falls as 1 / (1 + (s L)^2) and which is
seen through the CTF. Both are Gaussian, so one field with the summed spectrum is drawn. The zeroth coefficient is left
out: the images are what background normalisation would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import centred_rfft2
from verglas.core.shells import friedel_weight_X
from verglas.simulation.imaging import HalfPlane
from verglas.simulation.truth import stream

ICE_LENGTH = 18.0  # Å: the ice's power is halved at 1 / 18 Å
JUNK_BEADS = 24


@dataclass(frozen=True)
class NoiseModel:
    """Noise of one optics group; its variance per pixel is 1 on average over the particles that `of` was shown.

    white: part of the power that is white; ice_YX: spectrum of the rest before the CTF, both per coefficient such that
    1 everywhere is unit-variance white noise.
    """

    plane: HalfPlane
    white: float
    ice_YX: Tensor

    @classmethod
    def of(cls, plane: HalfPlane, ice_fraction: float, ctf_BYX: Tensor) -> NoiseModel:
        """ice_fraction: the ice's share of the power before the CTF; ctf_BYX: CTFs of a sample of the particles."""
        shape_YX = 1 / (1 + plane.s2_YX() * ICE_LENGTH**2)
        weight_X = friedel_weight_X(plane.group.box, plane.device).float()
        full = plane.group.box**2 - 1  # all coefficients but the zeroth
        weight_YX = weight_X.expand(plane.shape).clone()
        weight_YX[0, 0] = 0
        ice_YX = ice_fraction * shape_YX / ((shape_YX * weight_YX).sum() / full)
        seen = (ctf_BYX.square().mean(0) * ice_YX * weight_YX).sum() / full
        total = 1 - ice_fraction + float(seen)
        # With the zeroth coefficient gone the others carry the whole variance.
        scale = plane.group.box**2 / full / total
        return cls(plane, (1 - ice_fraction) * scale, ice_YX * scale)

    def transforms(self, white_BYX: Tensor, ctf_BYX: Tensor) -> Tensor:
        """Transforms of noise images, given unit-variance white noise [B, box, box] and the CTFs."""
        fourier_BYX = centred_rfft2(white_BYX)
        fourier_BYX[:, 0, 0] = 0
        return fourier_BYX * (self.white + self.ice_YX * ctf_BYX.square()).sqrt()


class WhiteNoise:
    """Unit-variance white noise for particles named by their index.

    On the CPU every particle has its own stream (counter-based Philox), so batches do not matter. On a GPU the device's
    own generator is seeded per batch: fast, but another batch size gives other noise.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.generator = None if device.type == "cpu" else torch.Generator(device)

    def __call__(self, index_B: Tensor, box: int) -> Tensor:
        """index_B: positions of the particles in the whole set (CPU). Returns float32 [B, box, box]."""
        if self.generator is not None:
            self.generator.manual_seed(((self.seed << 32) + int(index_B[0])) % 2**63)
            return torch.randn(len(index_B), box, box, device=self.device, generator=self.generator)
        out_BYX = np.empty((len(index_B), box, box), np.float32)
        for row, index in enumerate(index_B.tolist()):
            bits = np.random.Philox(key=[self.seed, 0x6E6F697365], counter=[0, 0, 0, index])
            np.random.Generator(bits).standard_normal(out=out_BYX[row], dtype=np.float32)
        return torch.from_numpy(out_BYX)


@dataclass(frozen=True)
class Junk:
    """Images that show no particle: threads of Gaussian blobs, each with its own course and strength.

    xy_JM2: Å from the centre; weight_JM: mass of each blob; sigma_J: Å.
    """

    xy_JM2: Tensor
    weight_JM: Tensor
    sigma_J: Tensor

    @classmethod
    def draw(cls, n: int, mass: float, extent: float, seed: int) -> Junk:
        """`n` threads in a square of `extent` Å; their masses run from 0 (an empty image) to 1.5 times `mass`."""
        random = stream(seed, "junk shape")
        steps_JM2 = random.normal(0, extent / 14, (n, JUNK_BEADS, 2))
        xy_JM2 = steps_JM2.cumsum(1)
        xy_JM2 += random.uniform(-0.2, 0.2, (n, 1, 2)) * extent - xy_JM2.mean(1, keepdims=True)
        weight_JM = random.uniform(0, 1, (n, JUNK_BEADS))
        weight_JM *= mass * random.uniform(0, 1.5, (n, 1)) / weight_JM.sum(1, keepdims=True)
        sigma_J = random.uniform(3.0, 9.0, n)
        return cls(*(torch.from_numpy(a).float() for a in (xy_JM2, weight_JM, sigma_J)))

    def transforms(self, index_J: Tensor, plane: HalfPlane) -> Tensor:
        """Transforms [B, box, box/2 + 1] complex64 of the threads `index_J`: sums of shifted Gaussians, separable in x and y."""
        xy_JM2, weight_JM, sigma_J = (a[index_J].to(plane.device) for a in (self.xy_JM2, self.weight_JM, self.sigma_J))
        s_YX2 = plane.frequency_K2.view(*plane.shape, 2)
        phase_JMX = torch.exp(-2j * math.pi * xy_JM2[..., 0, None] * s_YX2[0, :, 0])
        phase_JMY = torch.exp(-2j * math.pi * xy_JM2[..., 1, None] * s_YX2[:, 0, 1])
        summed_JYX = torch.einsum("jmy,jmx->jyx", phase_JMY * weight_JM[..., None], phase_JMX)
        envelope_JYX = torch.exp(-2 * math.pi**2 * sigma_J[:, None, None].square() * plane.s2_YX())
        return summed_JYX * envelope_JYX / plane.group.box**2
