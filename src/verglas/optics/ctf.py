"""Contrast transfer function: CTF = -sin(gamma), protein white, + amplitude contrast at zero frequency.

gamma(x, y) = -pi L (dU e1^2 + dV e2^2) + (pi/2) Cs L^3 u^4 - phase shift - asin(Q0) + even aberrations,
with (x, y) the frequency in 1/Å after the magnification matrix, u^2 = x^2 + y^2, L the wavelength, Cs in Å,
e1 = x cos a + y sin a and e2 = -x sin a + y cos a along the axes of defocus, dU, dV > 0 for underfocus
(Rohou & Grigorieff 2015, J. Struct. Biol. 192, 216; sign of gamma as in RELION).

`ctf_reference_BK` is this definition; `GroupCtf` is the fast form: gamma is linear in (x^2, xy, y^2, 1) with three
numbers per particle, plus a part that the whole group shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from verglas.kernels.weigh.reference import SMALLEST
from verglas.optics.aberrations import even_phase_K
from verglas.optics.group import OpticsGroup


@dataclass(frozen=True)
class CtfParameters:
    """What the CTF needs of each particle; tensors [B].

    defocus: Å, underfocus > 0; angle: degrees from x to the axis of defocus_u; phase shift: degrees; B-factor: Å^2;
    scale: no unit. has_envelope = False promises that every B-factor is 0 and every scale 1, and saves that pass.
    """

    defocus_u_B: Tensor
    defocus_v_B: Tensor
    angle_B: Tensor
    phase_shift_B: Tensor
    bfactor_B: Tensor
    scale_B: Tensor
    has_envelope: bool = True

    def __len__(self) -> int:
        return len(self.defocus_u_B)

    def __getitem__(self, index: Tensor | slice) -> CtfParameters:
        return replace(self, **{name: getattr(self, name)[index] for name in _TENSORS})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> CtfParameters:
        return replace(self, **{name: getattr(self, name).to(device, dtype) for name in _TENSORS})


_TENSORS = tuple(field.name for field in fields(CtfParameters) if field.name != "has_envelope")


@dataclass(frozen=True)
class CtfOptions:
    """Departures from the plain CTF, in the order they are applied.

    intact_until_first_peak: 1 where |gamma| < pi/2; intact_after_first_peak: 1 where |gamma| > pi/2;
    absolute: |CTF|, for images whose phases are already flipped; phase_flip: its sign alone (damping is lost).
    """

    intact_until_first_peak: bool = False
    intact_after_first_peak: bool = False
    absolute: bool = False
    phase_flip: bool = False


PLAIN = CtfOptions()


def ctf_reference_BK(frequency_K2: Tensor, parameters: CtfParameters, group: OpticsGroup, options: CtfOptions = PLAIN) -> Tensor:
    """CTF [B, K] in float64 at frequencies (x, y) in 1/Å [K, 2]: the definition, term by term."""
    u = group.magnified(frequency_K2.double())
    p = parameters.to(frequency_K2.device, torch.float64)
    if group.ctf_corrected:
        return torch.ones(len(p), len(u), dtype=torch.float64, device=u.device)
    angle_B1 = torch.deg2rad(p.angle_B)[:, None]
    e1_BK = u[:, 0] * torch.cos(angle_B1) + u[:, 1] * torch.sin(angle_B1)
    e2_BK = u[:, 1] * torch.cos(angle_B1) - u[:, 0] * torch.sin(angle_B1)
    u2_K = u.square().sum(-1)
    gamma_BK = -math.pi * group.wavelength_angstrom * (p.defocus_u_B[:, None] * e1_BK**2 + p.defocus_v_B[:, None] * e2_BK**2)
    gamma_BK = gamma_BK + 0.5 * math.pi * group.cs_angstrom * group.wavelength_angstrom**3 * u2_K**2
    gamma_BK = gamma_BK - torch.deg2rad(p.phase_shift_B)[:, None] - math.asin(group.amplitude_contrast)
    even_K = even_phase_K(u, group)
    if even_K is not None:
        gamma_BK = gamma_BK + even_K
    return _ctf_from_phase(-gamma_BK, p, u2_K, options)


@dataclass(frozen=True)
class GroupCtf:
    """CTF of one optics group at fixed frequencies: build once per (group, pixel list), evaluate on batches.

    quadratic_3K: x^2, xy, y^2 (1/Å^2, after magnification); shared_K: -gamma without defocus and phase shift (radians);
    u2_K: squared frequency, for the B-factor. With float32 the CTF is off by at most about 1e-4 at 1 Å pixels and
    30,000 Å defocus (|gamma| up to 1,000 radians, each rounding 3e-5); every sum is a plain multiply-add on purpose,
    since a matrix product may be run in TF32.
    """

    wavelength: float
    quadratic_3K: Tensor
    shared_K: Tensor
    u2_K: Tensor
    corrected: bool

    @classmethod
    def build(cls, frequency_K2: Tensor, group: OpticsGroup, dtype: torch.dtype | None = None) -> GroupCtf:
        """Tables at frequencies (x, y) in 1/Å [K, 2], on their device, in their dtype unless another is named."""
        u = group.magnified(frequency_K2.detach().cpu().double())
        x, y = u.unbind(-1)
        u2 = x * x + y * y
        shared = math.asin(group.amplitude_contrast) - 0.5 * math.pi * group.cs_angstrom * group.wavelength_angstrom**3 * u2**2
        even = even_phase_K(u, group)
        if even is not None:
            shared = shared - even
        like = frequency_K2.new_empty(0, dtype=dtype or frequency_K2.dtype)
        quadratic = torch.stack([x * x, x * y, y * y])
        return cls(group.wavelength_angstrom, quadratic.to(like), shared.to(like), u2.to(like), group.ctf_corrected)

    def __call__(self, parameters: CtfParameters, options: CtfOptions = PLAIN) -> Tensor:
        """CTF [B, K] on the device of the tables; keep the parameters there, too, in float64 if it has it."""
        if self.corrected:
            return self.u2_K.new_ones(len(parameters), len(self.u2_K))
        here = parameters.to(self.u2_K.device)
        return _ctf_from_phase(self.phase_BK(here), here, self.u2_K, options)

    def phase_BK(self, parameters: CtfParameters) -> Tensor:
        """-gamma [B, K] in radians."""
        xx_B1, xy_B1, yy_B1, shift_B1 = (c.to(self.shared_K.dtype)[:, None] for c in self.coefficients(parameters))
        phase_BK = torch.addcmul(self.shared_K, xx_B1, self.quadratic_3K[0])
        phase_BK.addcmul_(xy_B1, self.quadratic_3K[1]).addcmul_(yy_B1, self.quadratic_3K[2])
        return phase_BK.add_(shift_B1)

    def coefficients(self, p: CtfParameters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What each particle multiplies x^2, xy, y^2 and 1 by in -gamma; radians times Å^2, and radians; [B] each."""
        angle_B = torch.deg2rad(p.angle_B)
        cosine_B, sine_B = torch.cos(angle_B), torch.sin(angle_B)
        u_B, v_B = (math.pi * self.wavelength * d for d in (p.defocus_u_B, p.defocus_v_B))
        xx_B = u_B * cosine_B**2 + v_B * sine_B**2
        yy_B = u_B * sine_B**2 + v_B * cosine_B**2
        return xx_B, 2 * (u_B - v_B) * cosine_B * sine_B, yy_B, torch.deg2rad(p.phase_shift_B)


def ctf_BK(frequency_K2: Tensor, parameters: CtfParameters, group: OpticsGroup, options: CtfOptions = PLAIN) -> Tensor:
    """CTF [B, K] at frequencies (x, y) in 1/Å [K, 2], in their dtype; for many batches keep a `GroupCtf` instead."""
    return GroupCtf.build(frequency_K2, group)(parameters, options)


def _ctf_from_phase(phase_BK: Tensor, p: CtfParameters, u2_K: Tensor, options: CtfOptions) -> Tensor:
    """sin(phase) with the modifiers in their fixed order: intact, damping, absolute or flip, scale, floor."""
    ctf = torch.sin(phase_BK)
    if options.intact_until_first_peak:
        ctf = torch.where(phase_BK.abs() < math.pi / 2, 1.0, ctf)
    if options.intact_after_first_peak:
        ctf = torch.where(phase_BK.abs() > math.pi / 2, 1.0, ctf)
    if p.has_envelope:
        ctf.mul_(((-0.25 * p.bfactor_B.to(ctf.dtype))[:, None] * u2_K).exp_())
    if options.absolute:
        ctf = ctf.abs()
    elif options.phase_flip:
        ctf = torch.where(ctf < 0, -1.0, torch.ones_like(ctf))
    if p.has_envelope:
        ctf.mul_(p.scale_B.to(ctf.dtype)[:, None])
    # Adding 0 makes a negative zero positive. copysign is three times cheaper than a comparison with torch.where here.
    return torch.copysign(ctf.abs().clamp_min_(SMALLEST), ctf + 0.0)
