"""`weigh` as a physicist would write it; any device, any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import PixelList

SMALLEST = 1e-8  # |CTF| is never less, so that dividing by it is safe


@dataclass(frozen=True)
class GroupTables:
    """What all images of one optics group share. quadratic_3K: x^2, xy, y^2 in 1/Å^2 (None: no CTF); shared_K: radians.

    u2_K: squared frequency; odd_K: phase of odd aberrations or None; field: see README.md; premultiplied: data are X' alone.
    """

    pixels: PixelList
    quadratic_3K: Tensor | None
    shared_K: Tensor | None
    u2_K: Tensor | None
    odd_K: Tensor | None = None
    field: float = 1.0
    premultiplied: bool = False


@dataclass(frozen=True)
class ImageFactors:
    """What differs between images. turn_B2: radians per frequency in x and y; phase_B4: factors of x^2, xy, y^2 and 1.

    envelope_B2: B-factor (Å^2) and scale, None where all are 0 and 1.
    """

    turn_B2: Tensor
    phase_B4: Tensor | None = None
    envelope_B2: Tensor | None = None


def weigh_reference(fourier_BYX: Tensor, tables: GroupTables, factors: ImageFactors) -> tuple[Tensor, Tensor]:
    """See README.md; in the precision of `fourier_BYX`."""
    pixels, dtype, device = tables.pixels, fourier_BYX.real.dtype, fourier_BYX.device
    value_BK = pixels.gather(fourier_BYX)
    turn_B2 = factors.turn_B2.to(device, dtype)  # tens of radians at most: single precision keeps 1e-5 of them
    angle_BK = turn_B2[:, :1] * pixels.x_K + turn_B2[:, 1:] * pixels.y_K
    if tables.odd_K is not None:
        angle_BK = angle_BK - tables.odd_K.to(dtype)
    sign_K = tables.field * (1 - 2 * ((pixels.x_K + pixels.y_K) % 2)).to(dtype)
    value_BK = value_BK * torch.polar(torch.ones_like(angle_BK), angle_BK) * sign_K
    data_B2K = torch.view_as_real(value_BK).transpose(1, 2)
    ctf_BK = _ctf(tables, factors, dtype, device)
    if ctf_BK is None:
        return data_B2K.contiguous(), torch.ones_like(data_B2K[:, 0])
    return (data_B2K if tables.premultiplied else data_B2K * ctf_BK[:, None]).contiguous(), ctf_BK.square()


def _ctf(tables: GroupTables, factors: ImageFactors, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if tables.quadratic_3K is None or tables.shared_K is None or factors.phase_B4 is None:
        return None
    phase_B4 = factors.phase_B4.to(device, dtype)
    q0, q1, q2 = tables.quadratic_3K.to(dtype)
    a, b, c, p = (phase_B4[:, i, None] for i in range(4))
    ctf_BK = torch.sin(tables.shared_K.to(dtype) + a * q0 + b * q1 + c * q2 + p)
    if factors.envelope_B2 is not None and tables.u2_K is not None:
        envelope_B2 = factors.envelope_B2.to(device, dtype)
        ctf_BK = ctf_BK * envelope_B2[:, 1:] * torch.exp(-0.25 * envelope_B2[:, :1] * tables.u2_K.to(dtype))
    return torch.where(ctf_BK < 0, ctf_BK.clamp_max(-SMALLEST), ctf_BK.clamp_min(SMALLEST))
