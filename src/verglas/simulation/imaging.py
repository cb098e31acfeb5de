"""What the microscope does to a projection: displacement, CTF, beam tilt; whole batches on one device.

Everything happens on the stored half plane [B, box, box/2 + 1] of verglas.core.fourier, corners included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import signed_frequencies
from verglas.core.shells import friedel_weight_X
from verglas.optics.aberrations import aberration_phase_K
from verglas.optics.ctf import CtfParameters, GroupCtf
from verglas.optics.group import OpticsGroup


@dataclass(frozen=True)
class HalfPlane:
    """Frequencies of one optics group's images on a device; frequency_K2 in 1/Å over the flattened half plane."""

    group: OpticsGroup
    frequency_K2: Tensor

    @classmethod
    def of(cls, group: OpticsGroup, device: torch.device) -> HalfPlane:
        """All frequencies of the group's box, rows in FFT order."""
        y = signed_frequencies(group.box)[:, None].expand(group.box, group.box // 2 + 1)
        x = torch.arange(group.box // 2 + 1)[None].expand_as(y)
        frequency_K2 = torch.stack([x, y], -1).reshape(-1, 2).double() / (group.box * group.pixel_size)
        return cls(group, frequency_K2.to(device=device, dtype=torch.float32))

    @property
    def shape(self) -> tuple[int, int]:
        return self.group.box, self.group.box // 2 + 1

    @property
    def device(self) -> torch.device:
        return self.frequency_K2.device

    def s2_YX(self) -> Tensor:
        """Squared frequency, 1/Å^2."""
        return self.frequency_K2.square().sum(-1).view(self.shape)

    def variance_B(self, fourier_BYX: Tensor) -> Tensor:
        """Variance over the pixels of each image, by Parseval: the power of all coefficients but the zeroth."""
        weight_X = friedel_weight_X(self.group.box, self.device).float()
        power_B = ((fourier_BYX.real.square() + fourier_BYX.imag.square()) * weight_X).sum((-1, -2))
        return power_B - fourier_BYX[:, 0, 0].abs().square()

    def displacement_BYX(self, shift_B2: Tensor) -> Tensor:
        """exp(-2 pi i s . shift): what moves the content of images by `shift` Å (x, y)."""
        y_Y = self.frequency_K2.view(*self.shape, 2)[:, 0, 1].double()
        x_X = self.frequency_K2.view(*self.shape, 2)[0, :, 0].double()
        along_y = _unit_phase(shift_B2[:, 1, None].double() * y_Y)
        along_x = _unit_phase(shift_B2[:, 0, None].double() * x_X)
        return along_y[:, :, None] * along_x[:, None, :]


def _unit_phase(turns: Tensor) -> Tensor:
    angle = (-2 * math.pi * turns).float()
    return torch.complex(torch.cos(angle), torch.sin(angle))


@dataclass(frozen=True)
class Transfer:
    """The microscope of one optics group: CTF and, with beam tilt, an odd phase."""

    plane: HalfPlane
    ctf: GroupCtf
    odd_YX: Tensor | None

    @classmethod
    def of(cls, plane: HalfPlane) -> Transfer:
        """Tables of the group's optics on the plane's device."""
        phase_K = aberration_phase_K(plane.frequency_K2.double(), plane.group)
        odd_YX = None if phase_K is None else _unit_phase(-phase_K / (2 * math.pi)).view(plane.shape)
        return cls(plane, GroupCtf.build(plane.frequency_K2, plane.group), odd_YX)

    def ctf_BYX(self, parameters: CtfParameters) -> Tensor:
        """CTF over the half plane, float32."""
        return self.ctf(parameters).view(-1, *self.plane.shape)

    def image(self, signal_BYX: Tensor, origin_B2: Tensor, ctf_BYX: Tensor | None) -> Tensor:
        """Transforms of images: content displaced by -origin (Å), then CTF and the odd phase of the beam tilt.

        ctf_BYX None leaves the microscope out altogether.
        """
        seen = signal_BYX * self.plane.displacement_BYX(-origin_B2)
        if ctf_BYX is None:
            return seen
        seen = seen * ctf_BYX
        return seen if self.odd_YX is None else seen * self.odd_YX
