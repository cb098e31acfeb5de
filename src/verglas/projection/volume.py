"""From a real-space map to slices: padding, gridding correction, packed storage (RELION facts 1.5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import PixelList, centred_irfft3, centred_rfft3
from verglas.core.masks import radius_grid
from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels import choose
from verglas.kernels.project import project

HALF_PRECISION_PEAK = 16384.0  # float16 volumes are scaled to this: 65504 never reached, 2.7e8 above the smallest normal


def padded_size(box: int, padding: float) -> int:
    """Even size of the padded map; the padding in force is then padded_size / box."""
    size = int(padding * box + 0.5)
    return size + size % 2


def gridding_correction(box: int, padding: float, device: torch.device | str = "cpu") -> Tensor:
    """sinc^2(rho / (N padding)) on the map grid [Z, Y, X], rho = distance from the centre in voxels.

    What trilinear interpolation on the padded grid multiplies the map by; taken radially, as RELION does.
    """
    return torch.sinc(radius_grid(box, 3, device) / (box * padding)).square_()


@dataclass(frozen=True)
class FourierVolume:
    """Packed, padded transform of a map, in units of the forward-normalised 2-D transform of its projections.

    values: [V, 2] (re, im), or [3, V, 2] for GPU kernels (rows along x, y and z); stored times 1 / `scale`.
    """

    values: Tensor
    rows: RowTable
    box: int
    padding: float
    scale: float = 1.0

    @classmethod
    def from_map(
        cls, map_ZYX: Tensor, radius: int | None = None, padding: float = 2.0, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FourierVolume:  # fmt: skip
        """Transform of `map_ZYX` up to image frequency `radius` (default N/2), ready to be sliced on `device`.

        dtype float16 (GPU only) stores half-precision copies along all three axes: memory 12 bytes a voxel.
        """
        device = map_ZYX.device if device is None else torch.device(device)
        box = map_ZYX.shape[0]
        size = padded_size(box, padding)
        padding = size / box
        radius = box // 2 if radius is None else min(radius, box // 2)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        fourier = padded_transform(map_ZYX.to(device, work), size)
        rows = packed_sphere(float(int(radius * padding + 0.5)), device)
        if dtype != torch.float16:
            return cls(pack(fourier, rows), rows, box, padding)
        copies = torch.stack([pack(fourier, rows, axes) for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1))])
        scale = float(copies.abs().max()) / HALF_PRECISION_PEAK or 1.0
        return cls((copies / scale).half(), rows, box, padding, scale)

    def slices(self, rotation_R33: Tensor, pixels: PixelList | Tensor) -> Tensor:
        """Slices [R, 2, K] at poses A (object to image frame) and pixels (or coordinates [K, 3] in image frequencies)."""
        coordinates = pixels.coordinates_K3(self.work_dtype) if isinstance(pixels, PixelList) else pixels
        sampling = sampling_matrices(rotation_R33, self.padding).to(self.values.device, self.work_dtype)
        if self.values.ndim == 3 or self.values.dtype == torch.float16:
            from verglas.kernels.project.triton import project_triton

            return project_triton(self.values, self.rows, sampling, coordinates, self.scale)
        return project(self.values, self.rows, sampling, coordinates)

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.float32 if self.values.dtype == torch.float16 else self.values.dtype

    @property
    def kernel(self) -> str:
        """Name and reason of the kernel that `slices` runs, for the run record."""
        choice = choose(self.values.device, self.work_dtype)
        return f"project: {choice.name} ({choice.reason}), volume {str(self.values.dtype).removeprefix('torch.')}"


def sampling_matrices(rotation_R33: Tensor, padding: float) -> Tensor:
    """S = padding * A^-1: from image frequencies to voxels of the padded volume; A may hold magnification (facts 1.9)."""
    return padding * torch.linalg.inv(rotation_R33.double())


def padded_transform(map_ZYX: Tensor, size: int) -> Tensor:
    """Gridding-corrected, zero-padded, centred transform times P^3 / N^2: its slices are FFT2(projection) / N^2."""
    box = map_ZYX.shape[0]
    padded = map_ZYX.new_zeros(size, size, size)
    first = size // 2 - box // 2
    inner = slice(first, first + box)
    padded[inner, inner, inner] = map_ZYX / gridding_correction(box, size / box, map_ZYX.device).to(map_ZYX.dtype)
    return centred_rfft3(padded).mul_(size**3 / box**2)


def cropped_map(fourier_ZYX: Tensor, box: int) -> Tensor:
    """Inverse of `padded_transform` up to the gridding correction: centred transform [P, P, P/2+1] -> map [N, N, N]."""
    size = fourier_ZYX.shape[0]
    first = size // 2 - box // 2
    inner = slice(first, first + box)
    return centred_irfft3(fourier_ZYX, size)[inner, inner, inner].mul(box**2 / size**3)


def pack(fourier_ZYX: Tensor, rows: RowTable, axes: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    """Copy a centred half transform [P, P, P/2+1] into packed rows, [V, 2]; zero beyond the table's radius.

    axes: which volume axis (0 = x) runs along the packed x, y, z.
    """
    size = fourier_ZYX.shape[0]
    values_V2 = fourier_ZYX.real.new_zeros(rows.count, 2)
    real = torch.view_as_real(fourier_ZYX)
    for begin, coordinates in coordinate_chunks(rows):
        inside = coordinates.double().square().sum(1) <= rows.radius**2
        place = [torch.empty(0)] * 3
        for packed_axis, axis in enumerate(axes):
            place[axis] = coordinates[inside, packed_axis].long()
        x, y, z = place
        turned = x < 0
        x, y, z = x.abs(), torch.where(turned, -y, y) % size, torch.where(turned, -z, z) % size
        found = real[z, y, x]
        found[:, 1] *= torch.where(turned, -1.0, 1.0)
        values_V2[begin : begin + len(inside)][inside] = found
    return values_V2


def unpack(values_V2: Tensor, rows: RowTable, size: int) -> Tensor:
    """Inverse of `pack`: packed rows to a centred half transform [P, P, P/2+1], zero elsewhere.

    Voxels at and beyond `rows.radius` must hold 0: what lies outside the transform's own range lands on its origin.
    """
    columns = size // 2 + 1
    fourier = torch.zeros(size * size * columns, 2, dtype=values_V2.dtype, device=values_V2.device)
    for first, coordinates in coordinate_chunks(rows):
        x, y, z = coordinates.long().unbind(1)
        target = ((z % size) * size + y % size) * columns + x
        fits = (x < columns) & (y.abs() <= size // 2) & (z.abs() <= size // 2)
        # Added, not copied: -P/2 and +P/2 are one index of the transform, and one of them holds 0.
        fourier.index_add_(0, torch.where(fits, target, 0), values_V2[first : first + len(x)])
    return torch.view_as_complex(fourier.view(size, size, columns, 2))


def coordinate_chunks(rows: RowTable, voxels: int = 2**21) -> Iterator[tuple[int, Tensor]]:
    """(first voxel, (x, y, z) int32 of a run of planes): bounded memory where the whole list would not be."""
    starts = rows.slab_starts_Z().tolist()
    low = 0
    while low < rows.edge:
        high = low + 1
        while high < rows.edge and starts[high + 1] - starts[low] <= voxels:
            high += 1
        yield starts[low], _plane_coordinates(rows, low, high)
        low = high


def _plane_coordinates(rows: RowTable, low: int, high: int) -> Tensor:
    lengths = rows.length_ZY[low:high].flatten()
    numbers = torch.arange(len(lengths), device=rows.device, dtype=torch.int32)
    if rows.device.type == "cpu":  # numpy's repeat is several times faster than torch's
        row = torch.from_numpy(np.repeat(numbers.numpy(), lengths.numpy()))
    else:
        row = torch.repeat_interleave(numbers, lengths)
    first = rows.start_ZY[low:high].flatten() - rows.start_ZY[low, 0]
    x = torch.arange(len(row), device=rows.device, dtype=torch.int32) - first[row]
    return torch.stack([x, row % rows.edge - rows.half, row // rows.edge + (low - rows.half)], -1)
