"""From a real-space map to slices: padding, gridding correction, packed storage (RELION facts 1.5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verglas.core.fourier import PixelList
from verglas.core.masks import radius_grid
from verglas.core.rows import RowTable, packed_sphere
from verglas.core.transfers import to_device
from verglas.kernels import choose
from verglas.kernels.project import project
from verglas.projection.pruned import voxels_of

if TYPE_CHECKING:
    from verglas.kernels.project.cells import Cells

# Voxels worked on at a time: bounded temporaries on a CPU, on a GPU also few launches.
VOXELS_AT_ONCE = {"cpu": 2**19, "cuda": 2**23}
HALVED_AT_ONCE = 2**27  # voxels
LARGEST_HALF = 65504.0  # of float16
HALF_PRECISION_PEAK = 16384.0  # float16 volumes are scaled to this: 65504 never reached, 2.7e8 above the smallest normal


def padded_size(box: int, padding: float) -> int:
    """Even size of the padded map; the padding in force is then padded_size / box."""
    size = int(padding * box + 0.5)
    return size + size % 2


def gridding_correction(
    box: int, padding: float, device: torch.device | str = "cpu", part: slice | None = None
) -> Tensor:
    """sinc^2(rho / (N padding)) on the map grid [Z, Y, X], rho = distance from the centre in voxels; part: of z, that is wanted.

    What trilinear interpolation on the padded grid multiplies the map by; taken radially, as RELION does.
    """
    return torch.sinc(radius_grid(box, 3, device, part=part) / (box * padding)).square_()


@dataclass(frozen=True)
class FourierVolume:
    """Packed, padded transform of a map, in units of the forward-normalised 2-D transform of its projections.

    values: [V, 2] (re, im); cells: the same in half precision, each voxel together with its neighbours, from which slices in
    half precision are cut twice as fast; None if those are not wanted.
    """

    values: Tensor
    rows: RowTable
    box: int
    padding: float
    cells: Cells | None = None

    @classmethod
    def from_map(
        cls, map_ZYX: Tensor, radius: int | None = None, padding: float = 2.0, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FourierVolume:  # fmt: skip
        """Transform of `map_ZYX` up to image frequency `radius` (default N/2), ready to be sliced on `device`.

        dtype: of the voxels; float16 (GPU only) adds cells to float32 ones: 49 bytes a voxel, 29 where that is > 0.5 GB.
        """
        device = map_ZYX.device if device is None else torch.device(device)
        box = map_ZYX.shape[0]
        size = padded_size(box, padding)
        padding = size / box
        radius = box // 2 if radius is None else min(radius, box // 2)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        rows = packed_sphere(float(int(radius * padding + 0.5)), device)
        return cls.of_voxels(voxels_of(to_device(map_ZYX, device, work), rows, size), rows, box, padding, dtype)

    @classmethod
    def of_voxels(cls, values_V2: Tensor, rows: RowTable, box: int, padding: float, dtype: torch.dtype) -> FourierVolume:
        """Voxels that are packed already, stored as `dtype` (see `from_map`)."""
        if dtype != torch.float16:
            return cls(values_V2, rows, box, padding)
        from verglas.kernels.project.cells import make_cells

        half_V2, scale = in_half(values_V2)
        return cls(values_V2, rows, box, padding, make_cells(half_V2, rows, scale))

    def slices(
        self, rotation_R33: Tensor, pixels: PixelList | Tensor, factor_K: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Slices [R, 2, K] at poses A (object to image frame) and pixels (or coordinates [K, 3] in image frequencies).

        factor_K: multiplies each coefficient. out: contiguous [R, 2, K] to fill and return, in its precision (what is beyond the
        range of float16 becomes its largest); by default new, in that of the voxels.
        """
        coordinates = pixels.coordinates_K3(self.values.dtype) if isinstance(pixels, PixelList) else pixels
        return self.sampled(sampling_matrices(rotation_R33, self.padding), coordinates, factor_K, out)

    def sampled(
        self, sampling_R33: Tensor, coordinates: Tensor, factor_K: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """As `slices`, given the matrices S that take image frequencies to voxels."""
        dtype = self.values.dtype
        sampling = sampling_R33.to(self.values.device, dtype)
        if self.cells_serve(out):
            from verglas.kernels.project.cells import project_cells

            assert self.cells is not None
            return project_cells(self.cells, sampling, coordinates, factor_K, out)
        if out is not None and out.dtype == dtype and out.device.type == "cpu":
            from verglas.kernels.project.cpu import project_cpu

            return project_cpu(self.values, self.rows, sampling, coordinates, factor_K, out)
        slices_R2K = project(self.values, self.rows, sampling, coordinates)
        if factor_K is not None:
            slices_R2K = slices_R2K * factor_K.to(slices_R2K)
        if out is None:
            return slices_R2K
        return out.copy_(slices_R2K.clamp(-LARGEST_HALF, LARGEST_HALF) if out.dtype == torch.float16 else slices_R2K)

    def cells_serve(self, out: Tensor | None) -> bool:
        """Whether slices for `out` are cut from cells: those in half precision, if there are cells."""
        return self.cells is not None and out is not None and out.dtype == torch.float16

    @property
    def kernel(self) -> str:
        """Name and reason of the kernel that `slices` runs, for the run record."""
        choice = choose(self.values.device, self.values.dtype)
        half = "" if self.cells is None else " and float16"
        return f"project: {choice.name} ({choice.reason}), volume {str(self.values.dtype).removeprefix('torch.')}{half}"


def in_half(values_V2: Tensor) -> tuple[Tensor, float]:
    """Voxels in float16, and what they are to be multiplied by: their peak is `HALF_PRECISION_PEAK`."""
    parts = [slice(first, first + HALVED_AT_ONCE) for first in range(0, len(values_V2), HALVED_AT_ONCE)]
    scale = max((float(values_V2[part].abs().max()) for part in parts), default=0.0) / HALF_PRECISION_PEAK or 1.0
    half_V2 = torch.empty(values_V2.shape, dtype=torch.float16, device=values_V2.device)
    for part in parts:
        half_V2[part] = values_V2[part] / scale
    return half_V2, scale


def sampling_matrices(rotation_R33: Tensor, padding: float) -> Tensor:
    """S = padding * A^-1: from image frequencies to voxels of the padded volume; A may hold magnification (facts 1.9).

    By cofactors: the general inverse takes longer than the slices themselves.
    """
    a, b, c = rotation_R33.double().unbind(-2)
    cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -1)
    determinant = (a * torch.linalg.cross(b, c)).sum(-1)
    return padding * cofactors / determinant[..., None, None]


def pack(fourier_ZYX: Tensor, rows: RowTable, axes: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    """Copy a centred half transform [P, P, P/2+1] into packed rows, [V, 2]; zero beyond the table's radius.

    axes: which volume axis (0 = x) runs along the packed x, y, z.
    """
    size = fourier_ZYX.shape[0]
    columns = size // 2 + 1
    values_V2 = fourier_ZYX.real.new_zeros(rows.count, 2)
    words = torch.view_as_real(fourier_ZYX.contiguous()).view(-1, 2)
    for part, packed in coordinate_chunks(rows):
        inside = radius2(packed) <= rows.radius**2
        x, y, z = (packed[axes.index(axis)].long() for axis in range(3))
        turned = x < 0
        y, z = torch.where(turned, -y, y) % size, torch.where(turned, -z, z) % size
        found = words[torch.where(inside, (z * size + y) * columns + x.abs(), 0)]
        found[:, 1] *= torch.where(turned, -1.0, 1.0).to(found.dtype)
        torch.mul(found, inside[:, None], out=values_V2[part])
    return values_V2


def unpack(values_V2: Tensor, rows: RowTable, size: int) -> Tensor:
    """Inverse of `pack`: packed rows to a centred half transform [P, P, P/2+1], zero elsewhere.

    Voxels at and beyond `rows.radius` must hold 0.
    """
    columns = size // 2 + 1
    fourier = values_V2.new_zeros(size, size, columns, 2)
    for part, coordinates in coordinate_chunks(rows):
        x, y, z = coordinates.long()
        fits = (x < columns) & (y.abs() <= size // 2) & (z.abs() <= size // 2)
        target = torch.where(fits, (z % size * size + y % size) * columns + x, 0)
        # Added, not copied: -P/2 and +P/2 are one index of the transform, and one of them holds 0, as does what does not fit.
        fourier.view(-1, 2).index_add_(0, target, values_V2[part])
    return torch.view_as_complex(fourier)


def radius2(coordinates_3V: Tensor) -> Tensor:
    """Squared distance from the origin, float32 (exact for integers below 4096)."""
    x, y, z = coordinates_3V.float()
    return x * x + y * y + z * z


def coordinate_chunks(
    rows: RowTable, voxels: int | None = None, planes: range | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(which voxels, their (x, y, z) as int32 [3, n]) of runs of planes: bounded memory whatever the box. planes: which, counted
    from 0; all if not said."""
    voxels = voxels or min(VOXELS_AT_ONCE.get(rows.device.type, 2**23), max(2**19, rows.count // 32))
    starts = rows.slab_starts
    low, end = (0, rows.edge) if planes is None else (planes.start, planes.stop)
    while low < end:
        high = low + 1
        while high < end and starts[high + 1] - starts[low] <= voxels:
            high += 1
        yield slice(starts[low], starts[high]), _plane_coordinates(rows, low, high, starts[high] - starts[low])
        low = high


def _plane_coordinates(rows: RowTable, low: int, high: int, count: int) -> Tensor:
    """Of planes low..high-1, which hold `count` voxels."""
    if rows.device.type == "cpu":
        from verglas.kernels.coordinates import plane_coordinates_cpu

        return plane_coordinates_cpu(rows, low, high)
    lengths = rows.length_ZY[low:high].flatten()
    numbers = torch.arange(len(lengths), device=rows.device, dtype=torch.int32)
    row = torch.repeat_interleave(numbers, lengths, output_size=count)
    first = (rows.start_ZY[low:high].flatten() - rows.start_ZY[low, 0]).int()
    x = torch.arange(len(row), device=rows.device, dtype=torch.int32) - first[row]
    return torch.stack([x, row % rows.edge - rows.half, row // rows.edge + (low - rows.half)])
