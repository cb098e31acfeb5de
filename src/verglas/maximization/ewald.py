"""Slices on the Ewald sphere: what an image says about the model when the electrons' wavelength is not negligible.

An image's transform is the sum of two sidebands, each of which samples the model V on one sheet of the sphere, not on the plane
z = 0 (DeRosier 2000, Ultramicroscopy 81, 83; Russo & Henderson 2018, Ultramicroscopy 187, 56):

    X(k) = P V(k, -h) + Q V(k, +h)       P = (i/2) E exp(i gamma),  Q = conj(P),  P + Q = CTF = -sin(gamma) E
    h = (1 - sqrt(1 - L² k²)) / L        about L k²/2; L: wavelength; E: envelope and scale; the map's mirror image has -h

Signs are those of relion_reconstruct --ewald; `reverse` is its --reverse_curvature. The image gives conj(P) X to the one sheet,
conj(Q) X to the other. In the first the other sheet's share, conj(P) Q V(+h) = -exp(-2 i gamma) E² V(+h) / 4, is as good as
V(-h) where the sheets are nearer than the object is resolved, and averages out over defoci elsewhere. With c, the correlation of
both, for an object that fills a sphere of diameter D,

    weight = E² (1 - c cos(2 gamma)) / 4       c = 3 (sin x - x cos x) / x³,  x = 2 pi h D

on either sheet. Where they coincide (c = 1) both together are CTF X and CTF², the plain reconstruction.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.kernels.weigh import ImageFactors, weigh
from verglas.maximization.reconstruct import Geometry, GroupSlices, Slices
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup


class EwaldSlices(GroupSlices):
    """As `GroupSlices`, for both sheets of the sphere. diameter: of the object, Å; reverse: the sheets of the mirror image."""

    def __init__(
        self, group: OpticsGroup, geometry: Geometry, use_ctf: bool, device: torch.device | str, diameter: float,
        reverse: bool = False,
    ) -> None:  # fmt: skip
        if group.ctf_premultiplied:
            raise InputError("--ewald", f"images of {group.name} are multiplied by their CTF", "images as they were taken")
        super().__init__(group, geometry, use_ctf, device)
        width = geometry.box * geometry.pixel_size
        height_K = sphere_height(self.coordinates_K3[:, :2].double().square().sum(1) / width**2, group.wavelength_angstrom)
        sheet_K3 = self.coordinates_K3.clone()
        sheet_K3[:, 2] = (1 if reverse else -1) * height_K * width
        self.sheets = sheet_K3, sheet_K3 * sheet_K3.new_tensor([1, 1, -1])
        self.correlation_K = sphere_correlation(2 * math.pi * diameter * height_K).float()

    def parts(self, image_BYX: Tensor, origin_B2: Tensor, ctf: CtfParameters | None) -> list[Slices]:
        """conj(P) X and conj(Q) X with their weights, each on its sheet; the plane, if the group needs no CTF."""
        if self.ctf is None or ctf is None:
            return super().parts(image_BYX, origin_B2, ctf)
        bare = replace(self.tables, quadratic_3K=None, shared_K=None)
        fourier_BYX = torch.fft.rfft2(image_BYX.to(self.device, non_blocking=True), norm="forward")
        data_B2K, _ = weigh(fourier_BYX, bare, ImageFactors(self.turn_per_angstrom * origin_B2))
        value_BK = torch.complex(data_B2K[:, 0], data_B2K[:, 1])
        here = ctf.to(self.ctf.u2_K.device)
        minus_gamma_BK = self.ctf.phase_BK(here)
        envelope_BK = here.scale_B[:, None] * torch.exp(-0.25 * here.bfactor_B[:, None] * self.ctf.u2_K)
        weight_BK = (envelope_BK.square() * (1 - self.correlation_K * torch.cos(2 * minus_gamma_BK)) / 4).to(minus_gamma_BK)
        p_BK = 0.5j * torch.polar(envelope_BK.to(minus_gamma_BK), -minus_gamma_BK)
        sheets = zip((p_BK.conj(), p_BK), self.sheets, strict=True)
        return [(torch.view_as_real(factor * value_BK).transpose(1, 2).contiguous(), weight_BK, k_K3) for factor, k_K3 in sheets]


def sphere_height(k2: Tensor, wavelength: float) -> Tensor:
    """Distance of the Ewald sphere from the plane, 1/Å, at squared frequencies k² (1/Å²)."""
    # The difference of two numbers near 1 / L, written without it.
    return wavelength * k2 / (1 + (1 - wavelength**2 * k2).clamp_min(0).sqrt())


def sphere_correlation(x: Tensor) -> Tensor:
    """3 (sin x - x cos x) / x³, 1 at 0."""
    safe = x.abs().clamp_min(0.05)
    far = 3 * (safe.sin() - safe * safe.cos()) / safe**3
    return torch.where(x.abs() < 0.05, 1 - x.square() / 10, far)
