"""Transforms of padded maps in which the padded transform is never whole: some of its columns at a time, and of each axis what
is wanted.

From voxels to a map, for one run of columns x after another:

    fill      the planes z that hold anything, all y               [Z, P, c]
    along_y   transform, keep the N rows of the map                [Z, N, c]
    along_z   put at z mod P of lines of P, transform, keep N      [N, N, c]

and once all columns are there, `along_x`: real, keep N. In memory are N x N x columns complex numbers, a quarter of the padded
half transform at padding 2, beside some of its columns. Voxels of a map come about in the reverse order. The middle of the map is
at -N/2 .. N/2 - 1 modulo P, where the sign (-1)^(x+y+z) of a centred transform would move it to.

On GPUs, in single precision, one kernel for each axis does this (`axes`), with the same order and the same arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.projection import axes as kernels
from verglas.projection.axes import Axes, Between, Sums

# Numbers of a transform that are worked on at a time: bounded temporaries on a CPU, on a GPU also few launches.
NUMBERS_AT_ONCE = {"cpu": 2**22, "cuda": 2**25}

# Bytes for each of them in single precision, at the peak: transforms, and where torch does it addresses of voxels and what is
# made of these; on the way from a map to voxels everywhere.
BYTES_OF_NUMBER, BYTES_FROM_MAP = {"cpu": 28, "cuda": 58}, 46


@dataclass(frozen=True)
class Fill:
    """What is transformed. write(fourier_ZYX2, first): write columns first, first + 1, ... into a transform of zeros
    [Z, P, c, 2]; sums: the same for the kernels of GPUs."""

    write: Callable[[Tensor, int], None]
    sums: Sums

    def __call__(self, fourier_ZYX2: Tensor, first: int) -> None:
        self.write(fourier_ZYX2, first)


@dataclass(frozen=True)
class PaddedGrid:
    """box: N; size: P; columns: x = 0 .. columns - 1 hold anything; plane_Z: z of the planes that are worked on, int64;
    planes: the same on the host."""

    box: int
    size: int
    columns: int
    plane_Z: Tensor
    planes: Tensor | None = None

    @classmethod
    def of(cls, rows: RowTable, box: int, size: int, plane_Z: Tensor | None = None) -> PaddedGrid:
        """For the voxels of a table; plane_Z: by default all planes within its radius."""
        reach = min(int(rows.radius), size // 2)
        planes = torch.arange(-reach, reach + 1) if plane_Z is None else plane_Z
        on_host = planes.cpu()
        there = on_host.pin_memory().to(rows.device, non_blocking=True) if rows.device.type == "cuda" else on_host
        return cls(box, size, reach + 1, there, on_host)

    @property
    def on_host(self) -> Tensor:
        """z of the planes, without waiting for a GPU if that can be."""
        return self.plane_Z.cpu() if self.planes is None else self.planes

    def column_runs(self, planes: int | None = None) -> list[slice]:
        """Columns that are worked on at a time; planes: that each of several ranks works on at most, if these have to agree."""
        return runs(self.columns, self.size * (planes or len(self.plane_Z)), self.plane_Z.device)

    def middle(self) -> Tensor:
        """Where the map lies on a padded axis, [N] int64."""
        return torch.arange(-(self.box // 2), self.box - self.box // 2, device=self.plane_Z.device) % self.size

    def filled(self, fill: Fill, part: slice, dtype: torch.dtype) -> Tensor:
        """Some columns, complex [Z, P, c]; dtype: of their real parts."""
        shape = (len(self.plane_Z), self.size, part.stop - part.start, 2)
        fourier_ZYX2 = torch.zeros(shape, dtype=dtype, device=self.plane_Z.device)
        fill(fourier_ZYX2, part.start)
        return torch.view_as_complex(fourier_ZYX2)

    def along_y(self, fourier_ZYX: Tensor, wanted: range) -> Tensor:
        """[Z, P, c] -> [Z, n, c]: the rows y of the map that are wanted."""
        return torch.fft.ifft(fourier_ZYX, dim=1).index_select(1, self.middle()[wanted.start : wanted.stop])

    def along_z(self, cut_ZYX: Tensor) -> Tensor:
        """[Z, n, c] -> [N, n, c]."""
        lines = cut_ZYX.new_zeros(self.size, *cut_ZYX.shape[1:])
        lines[self.plane_Z % self.size] = cut_ZYX
        return torch.fft.ifft(lines, dim=0).index_select(0, self.middle())

    def along_x(self, half_ZYX: Tensor) -> Tensor:
        """[n, m, columns] -> real [n, m, N], in the units of a map."""
        map_ZYX = half_ZYX.real.new_empty(*half_ZYX.shape[:2], self.box)
        for part in runs(len(half_ZYX), half_ZYX.shape[1] * self.size, half_ZYX.device):
            map_ZYX[part] = torch.fft.irfft(half_ZYX[part], n=self.size, dim=2).index_select(2, self.middle())
        return map_ZYX.mul_(self.box**2)

    def from_x(self, map_ZYX: Tensor, z_A: Tensor, y_C: Tensor) -> Tensor:
        """Voxels [n, m, N] of a map at planes z and rows y, gridding-corrected -> [n, m, columns]."""
        half_ZYX = torch.empty(*map_ZYX.shape[:2], self.columns, dtype=map_ZYX.dtype.to_complex(), device=map_ZYX.device)
        for part in runs(len(map_ZYX), map_ZYX.shape[1] * self.size, map_ZYX.device):
            corrected = map_ZYX[part] / correction_at(self.distance(z_A[part], y_C), self.size).to(map_ZYX.dtype)
            lines = map_ZYX.new_zeros(*corrected.shape[:2], self.size).index_copy_(2, self.middle(), corrected)
            half_ZYX[part] = torch.fft.rfft(lines, dim=2)[:, :, : self.columns]
        return half_ZYX.div_(self.box**2)

    def from_z(self, half_ZYX: Tensor) -> Tensor:
        """[N, n, c] -> [Z, n, c]."""
        lines = half_ZYX.new_zeros(self.size, *half_ZYX.shape[1:]).index_copy_(0, self.middle(), half_ZYX)
        return torch.fft.fft(lines, dim=0).index_select(0, self.plane_Z % self.size)

    def from_y(self, cut_ZYX: Tensor) -> Tensor:
        """[Z, N, c] -> [Z, P, c]."""
        lines = cut_ZYX.new_zeros(len(cut_ZYX), self.size, cut_ZYX.shape[2])
        return torch.fft.fft(lines.index_copy_(1, self.middle(), cut_ZYX), dim=1)

    def distance(self, z_A: Tensor, y_C: Tensor) -> Tensor:
        """From the centre of the map, px, float32 [n, m, N], of planes z and rows y (counted from 0)."""
        x_N = torch.arange(self.box, device=z_A.device)
        z, y, x = ((axis - self.box // 2).float().square() for axis in (z_A, y_C, x_N))
        return (z[:, None, None] + y[:, None] + x).sqrt_()

    def filler(self, values_V2: Tensor, rows: RowTable) -> Fill:
        """What fills in voxels nearer than the radius, from packed ones."""

        def fill(fourier_ZYX2: Tensor, first: int) -> None:
            y_Y, address, r2 = self.addresses(rows, range(first, first + fourier_ZYX2.shape[2]))
            inside = r2 < rows.radius**2
            fourier_ZYX2[:, y_Y % self.size] = values_V2[torch.where(inside, address, 0)] * inside[..., None]

        return Fill(fill, Sums(values_V2, rows))

    def axes(self, dtype: torch.dtype) -> Axes | None:
        """The kernels that transform numbers of this precision; None where torch has to."""
        device = self.plane_Z.device
        return Axes(self.box, self.size, device) if kernels.serves(self.box, self.size, device, dtype) else None

    def take(self, fourier_ZYX: Tensor, first: int, rows: RowTable, out_V2: Tensor) -> None:
        """Put columns first, first + 1, ... [Z, P, c] of these planes into packed voxels, if they are within the radius."""
        y_Y, address, r2 = self.addresses(rows, range(first, first + fourier_ZYX.shape[2]))
        inside = r2 <= rows.radius**2
        out_V2[address[inside]] = torch.view_as_real(fourier_ZYX[:, y_Y % self.size][inside])

    def addresses(self, rows: RowTable, x: range) -> tuple[Tensor, Tensor, Tensor]:
        """(y of the rows [Y], where their voxels lie among the packed ones [Z, Y, c], squared radius); at and beyond the radius
        some lie nowhere."""
        reach = self.columns - 1
        y_Y = torch.arange(-reach, reach + 1, device=rows.device)
        x_X = torch.arange(x.start, x.stop, device=rows.device)
        start_ZY = rows.start_ZY[self.plane_Z[:, None] + rows.half, y_Y + rows.half].long()
        z, y, x2 = (axis.int().square() for axis in (self.plane_Z, y_Y, x_X))
        return y_Y, start_ZY[:, :, None] + x_X, z[:, None, None] + y[:, None] + x2


def map_of(
    fill: Fill, grid: PaddedGrid, dtype: torch.dtype, wanted: range | None = None, numbers: int | None = None
) -> Tensor:
    """The map [N, n, N] of what `fill` writes, without gridding correction; wanted: y of the map, all if not said; numbers: most
    complex ones between two axes on a GPU, but for 16 columns."""
    wanted = range(grid.box) if wanted is None else wanted
    axes = grid.axes(dtype)
    if axes is not None:
        return _map_by_kernels(axes, fill.sums, grid, wanted, numbers)
    half_ZYX = torch.empty(grid.box, len(wanted), grid.columns, dtype=dtype.to_complex(), device=grid.plane_Z.device)
    for part in grid.column_runs():
        half_ZYX[:, :, part] = grid.along_z(grid.along_y(grid.filled(fill, part, dtype), wanted))
    return grid.along_x(half_ZYX)


def voxels_of(map_ZYX: Tensor, rows: RowTable, size: int) -> Tensor:
    """Packed voxels [V, 2] of a gridding-corrected, zero-padded, centred transform times P^3 / N^2, whose slices are
    FFT2(projection) / N^2; 0 beyond the table's radius."""
    grid = PaddedGrid.of(rows, len(map_ZYX), size)
    axes = grid.axes(map_ZYX.dtype)
    if axes is not None:
        return _voxels_by_kernels(axes, map_ZYX.contiguous(), rows, grid)
    every = torch.arange(grid.box, device=map_ZYX.device)
    half_ZYX, out_V2 = grid.from_x(map_ZYX, every, every), map_ZYX.new_zeros(rows.count, 2)
    for part in grid.column_runs():
        grid.take(grid.from_y(grid.from_z(half_ZYX[:, :, part])), part.start, rows, out_V2)
    return out_V2


def _map_by_kernels(axes: Axes, sums: Sums, grid: PaddedGrid, wanted: range, numbers: int | None = None) -> Tensor:
    """`map_of` on a GPU."""
    plane_Z, limit2, there_Z = grid.on_host, largest_below(sums.rows.radius), grid.plane_Z.int()
    room = grid.box**2 * len(wanted) // 2  # of the bytes of the map, for which there has to be room anyway
    parts = axes.column_runs(grid.columns, len(plane_Z) * len(wanted), room, numbers)
    every = Between.of_runs(grid.size, [plane_Z], len(wanted), parts, limit2, axes.device, kernels.TOGETHER)
    half_ZYX = axes.half(len(wanted), grid.columns)
    for part, between in zip(parts, every, strict=True):
        cut = torch.empty(len(wanted) * between.counts[0], dtype=torch.complex64, device=axes.device)
        axes.to_y(cut, between, sums, there_Z, wanted, part)
        axes.to_z(half_ZYX, cut, between, part)
        del cut
    return axes.to_x(half_ZYX, grid.columns)


def _voxels_by_kernels(axes: Axes, map_ZYX: Tensor, rows: RowTable, grid: PaddedGrid) -> Tensor:
    """`voxels_of` on a GPU."""
    plane_Z, limit2, box, there_Z = grid.on_host, int(rows.radius**2), grid.box, grid.plane_Z.int()
    parts = axes.column_runs(grid.columns, len(plane_Z) * box, box**3 // 2)
    every = Between.of_runs(grid.size, [plane_Z], box, parts, limit2, axes.device, kernels.TOGETHER)
    half_ZYX = axes.from_x(map_ZYX, torch.arange(box, device=axes.device), 0, grid.columns)
    out_V2 = map_ZYX.new_zeros(rows.count, 2)
    for part, between in zip(parts, every, strict=True):
        cut = torch.empty(box * between.counts[0], dtype=torch.complex64, device=axes.device)
        axes.from_z(half_ZYX, cut, between, part)
        axes.from_y(out_V2, cut, between, rows, there_Z, part)
    return out_V2


def largest_below(radius: float) -> int:
    """The largest squared distance of a voxel nearer than the radius."""
    return math.ceil(radius**2) - 1


def correction_at(distance: Tensor, size: int) -> Tensor:
    """sinc^2(distance / P): what trilinear interpolation on the padded grid multiplies the map by, taken radially. In place."""
    return torch.sinc(distance.div_(size)).square_()


def runs(count: int, elements_each: int, device: torch.device) -> list[slice]:
    """Cut 0..count into slices of some million elements, so that temporaries stay small."""
    most = NUMBERS_AT_ONCE.get(device.type, 2**25)
    if device.type != "cpu":  # at small boxes, temporaries beside which sums are nothing
        most = min(most, max(2**21, count * elements_each // 16))
    step = max(1, most // max(1, elements_each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
