"""Reconstruction from particles whose poses are known: images in, weighted sums out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import PixelList, centred_rfft2, half_plane_pixels
from verglas.maximization.accumulate import Accumulator
from verglas.optics.aberrations import aberration_phase_K
from verglas.optics.ctf import CtfParameters, GroupCtf
from verglas.optics.group import OpticsGroup
from verglas.particles.loader import ImageLoader
from verglas.particles.table import ParticleTable


@dataclass(frozen=True)
class Geometry:
    """The model's grid and what is kept of it. box: px; pixel_size: Å; radius: largest frequency (integer)."""

    box: int
    pixel_size: float
    radius: int
    padding: float = 2.0


class GroupSlices:
    """Turns images of one optics group into CTF-weighted slices; tables are built once.

    pixels: kept frequencies of these images; coordinates_K3: the same in the model's integer frequencies (pixel size,
    box and magnification accounted for). field: area of these images over that of the model's box, which undoes the 1/N^2
    of the forward transform where the two differ.
    """

    def __init__(self, group: OpticsGroup, geometry: Geometry, use_ctf: bool, device: torch.device | str) -> None:
        scale = group.box * group.pixel_size / (geometry.box * geometry.pixel_size)
        self.field = scale**2
        radius = min(group.box // 2, int(np.ceil(geometry.radius * scale - 1e-6)))
        self.pixels: PixelList = half_plane_pixels(group.box, radius, device)
        frequency_K2 = self.pixels.frequency_K2(group.pixel_size, torch.float64)
        self.coordinates_K3 = group.model_coordinates_K3(frequency_K2, geometry.box, geometry.pixel_size).float()
        self.ctf = GroupCtf.build(frequency_K2, group, torch.float32) if use_ctf else None
        self.premultiplied = group.ctf_premultiplied
        self.pixel_size, self.box, self.device = group.pixel_size, group.box, device
        odd_K = aberration_phase_K(frequency_K2, group) if use_ctf else None
        self.demodulation_K = None if odd_K is None else torch.polar(torch.ones_like(odd_K), -odd_K).to(torch.complex64)

    def __call__(self, image_BYX: Tensor, origin_B2: Tensor, ctf: CtfParameters | None) -> tuple[Tensor, Tensor]:
        """Images, origins (Å) and CTFs -> data [B, 2, K] = CTF X and weight [B, K] = CTF^2, X centred by the origin."""
        fourier_BYX = centred_rfft2(image_BYX.to(self.device, non_blocking=True))
        self._shift(fourier_BYX, origin_B2)
        value_BK = self.pixels.gather(fourier_BYX)
        if abs(self.field - 1) > 1e-6:
            value_BK = value_BK * self.field
        if self.demodulation_K is not None:
            value_BK = value_BK * self.demodulation_K
        data_BK2 = torch.view_as_real(value_BK)
        data_B2K = torch.empty(len(value_BK), 2, self.pixels.count, device=value_BK.device)
        if self.ctf is None or ctf is None:
            data_B2K.copy_(data_BK2.transpose(1, 2))
            return data_B2K, torch.ones_like(data_B2K[:, 0])
        ctf_BK = self.ctf(ctf)
        if self.premultiplied:
            data_B2K.copy_(data_BK2.transpose(1, 2))
        else:
            torch.mul(ctf_BK, data_BK2[..., 0], out=data_B2K[:, 0])
            torch.mul(ctf_BK, data_BK2[..., 1], out=data_B2K[:, 1])
        return data_B2K, ctf_BK.square_()

    def _shift(self, fourier_BYX: Tensor, origin_B2: Tensor) -> None:
        """Move the content by +origin: F(k) *= exp(-2 pi i k . origin), in place; separable in x and y."""
        turns_B2 = (-2 * torch.pi / (self.box * self.pixel_size)) * origin_B2.to(self.device)
        index = torch.arange(self.box, device=self.device, dtype=torch.float64)
        signed = torch.where(index <= self.box // 2, index, index - self.box)
        for axis, frequency in ((0, index[: self.box // 2 + 1]), (1, signed)):
            angle = turns_B2[:, axis, None] * frequency
            phase = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
            fourier_BYX *= phase[:, None, :] if axis == 0 else phase[:, :, None]


def model_geometry(table: ParticleTable, max_resolution: float | None, padding: float = 2.0) -> Geometry:
    """The first optics group's grid; radius from `max_resolution` (Å), rounded up, or N/2."""
    group = table.groups[0]
    radius = group.box // 2
    if max_resolution:
        radius = max(1, min(radius, int(np.ceil(group.box * group.pixel_size / max_resolution))))
    return Geometry(group.box, group.pixel_size, radius, padding)


def accumulate(
    table: ParticleTable, half_B: np.ndarray, loader: ImageLoader, geometry: Geometry, use_ctf: bool,
    device: torch.device | str, advance: Callable[[int], None] = lambda n: None,
) -> list[Accumulator]:  # fmt: skip
    """Backproject every image of `loader` into one accumulator per distinct value of `half_B` (its order ascending)."""
    values = np.unique(half_B[loader.indices])
    sums = [Accumulator(geometry.box, geometry.radius, geometry.padding, device) for _ in values]
    rotation_B33, origin_B2, ctf = table.rotations(), table.origins(), table.ctf() if use_ctf else None
    slicers: dict[int, GroupSlices] = {}
    for batch in loader:
        if batch.group_index not in slicers:
            slicers[batch.group_index] = GroupSlices(batch.group, geometry, use_ctf, device)
        slicer = slicers[batch.group_index]
        rows = torch.from_numpy(batch.index_B)
        data_B2K, weight_BK = slicer(batch.image_BYX, origin_B2[rows], None if ctf is None else ctf[rows])
        for accumulator, mine in _split(sums, values, half_B[batch.index_B]):
            accumulator.add(data_B2K[mine], weight_BK[mine], rotation_B33[rows[mine]], slicer.coordinates_K3)
        advance(len(batch))
    return sums


def _split(
    sums: list[Accumulator], values: np.ndarray, half_B: np.ndarray
) -> Iterator[tuple[Accumulator, Tensor | slice]]:
    """The rows of a batch that belong to each accumulator; a slice, which copies nothing, where that is all of them."""
    for accumulator, value in zip(sums, values):
        mine = np.flatnonzero(half_B == value)
        if len(mine) == len(half_B):
            yield accumulator, slice(None)
        elif len(mine):
            yield accumulator, torch.from_numpy(mine)
