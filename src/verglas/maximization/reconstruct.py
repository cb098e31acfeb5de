"""Reconstruction from particles whose poses are known: images in, weighted sums out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import half_plane_pixels
from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels.weigh import GroupTables, ImageFactors, weigh
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.least_squares import NormalSums
from verglas.optics.aberrations import aberration_phase_K
from verglas.optics.ctf import CtfParameters, GroupCtf
from verglas.optics.group import OpticsGroup
from verglas.particles.loader import ImageBatch
from verglas.particles.table import ParticleTable
from verglas.projection.volume import padded_size

Sums: TypeAlias = Accumulator | NormalSums
"""What slices are added to: padded voxels, or the normal equations."""


class Addable(Protocol):
    """What slices can be added to: `Sums`, `apart.ApartSums`."""

    def add(self, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """As `Accumulator.add`."""


A = TypeVar("A", bound=Addable)


@dataclass(frozen=True)
class Geometry:
    """The model's grid and what is kept of it. box: px; pixel_size: Å; radius: largest frequency (integer)."""

    box: int
    pixel_size: float
    radius: int
    padding: float = 2.0

    def rows(self, device: torch.device | str = "cpu") -> RowTable:
        """Of the padded sums."""
        padding = padded_size(self.box, self.padding) / self.box
        return packed_sphere(float(int(self.radius * padding + 0.5)), device)


Slices: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""data [B, 2, K], weight [B, K] and where they lie: coordinates [K, 3] in the model's integer frequencies."""


class GroupSlices:
    """Turns images of one optics group into CTF-weighted slices; tables are built once.

    coordinates_K3: the kept frequencies of these images in the model's integer frequencies (pixel size, box and
    magnification accounted for).
    """

    def __init__(self, group: OpticsGroup, geometry: Geometry, use_ctf: bool, device: torch.device | str) -> None:
        scale = group.box * group.pixel_size / (geometry.box * geometry.pixel_size)
        # Magnification below 1 brings frequencies from outside the circle in: the smallest singular value says how far.
        shrink = float(np.linalg.svd(np.array(group.magnification), compute_uv=False).min())
        radius = min(group.box // 2, int(np.ceil(geometry.radius * scale / shrink - 1e-6)))
        pixels = half_plane_pixels(group.box, radius, device)
        frequency_K2 = pixels.frequency_K2(group.pixel_size, torch.float64)
        self.coordinates_K3 = group.model_coordinates_K3(frequency_K2, geometry.box, geometry.pixel_size).float()
        self.ctf = GroupCtf.build(frequency_K2, group, torch.float32) if use_ctf and not group.ctf_corrected else None
        # The forward transform's 1/N^2 would make images of a larger field weaker than the model's: undone by the areas.
        self.tables = GroupTables(
            pixels, None if self.ctf is None else self.ctf.quadratic_3K, None if self.ctf is None else self.ctf.shared_K,
            None if self.ctf is None else self.ctf.u2_K, aberration_phase_K(frequency_K2, group) if use_ctf else None,
            scale**2, group.ctf_premultiplied,
        )  # fmt: skip
        self.turn_per_angstrom = -2 * torch.pi / (group.box * group.pixel_size)
        self.device = device

    def __call__(self, image_BYX: Tensor, origin_B2: Tensor, ctf: CtfParameters | None) -> tuple[Tensor, Tensor]:
        """Images, origins (Å) and CTFs -> data [B, 2, K] = CTF X and weight [B, K] = CTF^2, X centred by the origin."""
        fourier_BYX = torch.fft.rfft2(image_BYX.to(self.device, non_blocking=True), norm="forward")
        phase_B4, envelope_B2 = None, None
        if self.ctf is not None and ctf is not None:
            phase_B4 = torch.stack(self.ctf.coefficients(ctf), 1)
            if ctf.has_envelope:
                envelope_B2 = torch.stack([ctf.bfactor_B, ctf.scale_B], 1)
        return weigh(fourier_BYX, self.tables, ImageFactors(self.turn_per_angstrom * origin_B2, phase_B4, envelope_B2))

    def parts(self, image_BYX: Tensor, origin_B2: Tensor, ctf: CtfParameters | None) -> list[Slices]:
        """What an image adds to the model: here one plane."""
        return [(*self(image_BYX, origin_B2, ctf), self.coordinates_K3)]


def model_geometry(table: ParticleTable, max_resolution: float | None, padding: float = 2.0) -> Geometry:
    """The first optics group's grid; radius from `max_resolution` (Å), rounded up, or N/2."""
    group = table.groups[0]
    radius = group.box // 2
    if max_resolution:
        radius = max(1, min(radius, int(np.ceil(group.box * group.pixel_size / max_resolution))))
    return Geometry(group.box, group.pixel_size, radius, padding)


def accumulate(
    table: ParticleTable, half_B: np.ndarray, loader: Iterable[ImageBatch], geometry: Geometry, use_ctf: bool,
    device: torch.device | str, advance: Callable[[int], None] = lambda n: None, new: Callable[[], A] | None = None,
    cut: Callable[..., GroupSlices] = GroupSlices,
) -> Sequence[A | Accumulator]:  # fmt: skip
    """Backproject every image of `loader` into one accumulator per distinct value of `half_B` (its order ascending).

    half_B: of all rows of the table, those of which the loader reads a part included. new: makes what slices are added to, by
    default an `Accumulator`. cut: makes what turns images of a group into slices.
    """
    values = np.unique(half_B)
    whole = geometry.box, geometry.radius, geometry.padding, device
    sums: list[A | Accumulator] = [new() if new else Accumulator(*whole) for _ in values]
    rotation_B33, origin_B2, ctf = table.rotations(), table.origins(), table.ctf() if use_ctf else None
    slicers: dict[int, GroupSlices] = {}
    for batch in loader:
        if batch.group_index not in slicers:
            slicers[batch.group_index] = cut(batch.group, geometry, use_ctf, device)
        slicer = slicers[batch.group_index]
        rows = torch.from_numpy(batch.index_B)
        parts = slicer.parts(batch.image_BYX, origin_B2[rows], None if ctf is None else ctf[rows])
        for accumulator, mine in _split(sums, values, half_B[batch.index_B]):
            for data_B2K, weight_BK, coordinates_K3 in parts:
                accumulator.add(data_B2K[mine], weight_BK[mine], rotation_B33[rows[mine]], coordinates_K3)
        advance(len(batch))
    return sums


def _split(
    sums: Sequence[A], values: np.ndarray, half_B: np.ndarray
) -> Iterator[tuple[A, Tensor | slice]]:
    """The rows of a batch that belong to each accumulator; a slice, which copies nothing, where that is all of them."""
    for accumulator, value in zip(sums, values):
        mine = np.flatnonzero(half_B == value)
        if len(mine) == len(half_B):
            yield accumulator, slice(None)
        elif len(mine):
            yield accumulator, torch.from_numpy(mine)
