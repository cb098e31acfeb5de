"""Noise-free, CTF-free, centred projections of a model: exact sums over atoms, or slices of the transform of a map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from verglas.core.fourier import half_plane_pixels
from verglas.optics.group import IDENTITY
from verglas.projection.volume import FourierVolume
from verglas.simulation.imaging import HalfPlane
from verglas.simulation.model import AtomModel, MapModel
from verglas.simulation.nufft import atom_transforms

_COORDINATES_AT_ONCE = 2**26


class SignalSource(Protocol):
    """Makes the signal of one optics group's images. kernel: what computes it, for the run record."""

    @property
    def kernel(self) -> str:
        """What computes, and why."""
        ...

    def __call__(self, rotation_B33: Tensor, class_B: Tensor) -> Tensor:
        """class_B: 0-based conformation, -1 for none. Returns complex64 [B, box, box/2 + 1], forward 1/box^2."""
        ...


@dataclass(frozen=True)
class AtomSource:
    """Exact images of atoms at each pose, damped by exp(-B s^2 / 4); bfactor in Å^2. Images sum to the model's weight."""

    models: list[AtomModel]
    plane: HalfPlane
    bfactor: float
    threads: int = 1

    @property
    def kernel(self) -> str:
        """What computes, and why."""
        return "exact sums: finufft (CPU device)" if self.plane.device.type == "cpu" else "exact sums: spreading (GPU)"

    def __call__(self, rotation_B33: Tensor, class_B: Tensor) -> Tensor:
        group, device = self.plane.group, self.plane.device
        out_BYX = torch.zeros(len(rotation_B33), *self.plane.shape, dtype=torch.complex64, device=device)
        for index, model in enumerate(self.models):
            members = (class_B == index).nonzero().squeeze(1)
            xyz_N3 = model.xyz_N3.to(device=device, dtype=torch.float32)
            weight_N = model.weight_N.to(device=device, dtype=torch.float32)
            for part in members.split(max(1, _COORDINATES_AT_ONCE // len(xyz_N3))) if len(members) else ():
                xy_BN2 = _rotated_xy(rotation_B33[part], xyz_N3)
                out_BYX[part] = atom_transforms(xy_BN2, weight_N, group.box, group.pixel_size, self.threads)
        return out_BYX.mul_(torch.exp(-self.bfactor / 4 * self.plane.s2_YX()))


def _rotated_xy(rotation_B33: Tensor, xyz_N3: Tensor) -> Tensor:
    """x and y of A r, [B, N, 2]; no matrix product, which may be set to run in less than float32."""
    row_B12 = rotation_B33[:, None, :2].float()
    return sum((row_B12[..., axis] * xyz_N3[:, None, axis] for axis in (1, 2)), row_B12[..., 0] * xyz_N3[:, None, 0])


@dataclass(frozen=True)
class MapTransforms:
    """Padded transforms of conformations that share one box (px) and pixel size (Å)."""

    volumes: list[FourierVolume]
    box: int
    pixel_size: float

    @classmethod
    def of(cls, models: list[MapModel], finest_pixel: float, device: torch.device, padding: float = 2.0) -> MapTransforms:
        """Transforms kept up to the Nyquist frequency of `finest_pixel` Å, or their own where that is lower."""
        box, pixel_size = models[0].map_ZYX.shape[-1], models[0].pixel_size
        radius = min(box // 2, math.ceil(box * pixel_size / (2 * finest_pixel)))
        volumes = [
            FourierVolume.from_map(m.map_ZYX, radius=radius, padding=padding, device=device, dtype=torch.float32) for m in models
        ]
        return cls(volumes, box, pixel_size)


class SliceSource:
    """Slices of the transforms of maps, of any box and pixel size, damped by exp(-B s^2 / 4).

    The grey values of the projections are kept. Frequencies beyond a map's Nyquist, or beyond the circle of the image's
    own, carry no signal. The group's magnification matrix M acts as in RELION: image frequency s samples the model at M s.
    """

    def __init__(self, maps: MapTransforms, plane: HalfPlane, bfactor: float) -> None:
        group = plane.group
        self.maps, self.plane = maps, plane
        self.pixels = half_plane_pixels(group.box).to(plane.device)
        frequency_K2 = self.pixels.frequency_K2(group.pixel_size, torch.float64)
        coordinate_K3 = group.model_coordinates_K3(frequency_K2, maps.box, maps.pixel_size)
        plain = maps.box == group.box and abs(maps.pixel_size / group.pixel_size - 1) < 1e-5 and group.magnification == IDENTITY
        self.where = self.pixels if plain else coordinate_K3.float()
        # Both transforms are means over their own box, and the boxes may cover different areas.
        area = (maps.box * maps.pixel_size / (group.box * group.pixel_size)) ** 2
        inside_K = coordinate_K3.norm(dim=-1) <= (maps.box // 2) * (1 + 1e-6)
        self.factor_K = (area * inside_K * torch.exp(-bfactor / 4 * frequency_K2.square().sum(-1))).float()

    @property
    def kernel(self) -> str:
        """What computes, and why."""
        return self.maps.volumes[0].kernel

    def __call__(self, rotation_B33: Tensor, class_B: Tensor) -> Tensor:
        out_BYX = torch.zeros(len(rotation_B33), *self.plane.shape, dtype=torch.complex64, device=self.plane.device)
        for index, volume in enumerate(self.maps.volumes):
            members = (class_B == index).nonzero().squeeze(1)
            if len(members) == 0:
                continue
            planes_R2K = volume.slices(rotation_B33[members], self.where) * self.factor_K
            out_BYX[members] = self.pixels.scatter(torch.complex(planes_R2K[:, 0], planes_R2K[:, 1]))
        return out_BYX
