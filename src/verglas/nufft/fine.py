"""The fine grid between points and modes: its sizes, its pruned transforms, and what undoes the window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.nufft import axes
from verglas.nufft.window import Window, window_for

UPSAMPLINGS = (1.25, 1.375, 1.5, 1.75, 2.0)  # of which the one is taken that costs least
STEPS = 32  # a unit, in which the upsampling of a grid of small primes is counted
OF_TABLES = 2e-5  # relative error of sums with weights of 16 bits (benchmarks/NOTES.md)
CELL_TAPS = {"cuda": 10.0, "cpu": 2.0}  # taps of one point that take as long as one cell (both types, benchmarks/NOTES.md)


@dataclass(frozen=True)
class FineGrid:
    """shape: of the modes, (Y, X) or (Z, Y, X); sizes: of the grid along the same axes; window: what points are spread with."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    window: Window
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls, shape: tuple[int, ...], accuracy: float, upsampling: float | None, device: torch.device | str, dtype: torch.dtype,
        points: int = 0, tables: bool = False,
    ) -> FineGrid:  # fmt: skip
        """For modes of `shape`; accuracy: relative error wanted (root mean square); dtype: float32 or float64, of the grid;
        upsampling: None for what costs least with so many points; tables: weights of 16 bits.

        InputError for what no window serves.
        """
        least, rounding = (3e-7, 5e-8) if dtype == torch.float32 else (1e-14, 1e-16)
        if tables:
            least, rounding = 1e-4, OF_TABLES
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise InputError("nufft", f"modes of shape {tuple(shape)}", "two or three axes of at least one mode")
        if not least <= accuracy < 1:
            raise InputError("nufft", f"accuracy {accuracy:g} in {dtype}", f"{least:g} to 1",
                             "Without tables there is less error." if tables else "Use complex128 for less error.")  # fmt: skip
        if upsampling is not None and not 1.2 <= upsampling <= 4:
            raise InputError("nufft", f"upsampling {upsampling:g}", "1.2 to 4")
        found: list[FineGrid] = []
        for factor in UPSAMPLINGS if upsampling is None else (upsampling,):
            sizes = tuple(smooth_size(math.ceil(factor * n - 1e-9)) for n in shape)
            # Sizes of small primes are often larger than asked for: then a narrower window may do.
            real = math.floor(min(size / n for size, n in zip(sizes, shape)) * STEPS) / STEPS
            try:
                window = window_for(accuracy, factor if upsampling else max(factor, min(real, 2.0)), len(shape), rounding)
            except ValueError as error:
                if factor in (upsampling, UPSAMPLINGS[-1]):
                    raise InputError("nufft", str(error), "", "Ask for a larger upsampling.") from error
                continue
            sizes = tuple(max(size, smooth_size(2 * window.width)) for size in sizes)
            found.append(cls(tuple(shape), sizes, window, torch.device(device), dtype))
        return min(found, key=lambda grid: grid.taps_of(points))

    def taps_of(self, points: int) -> float:
        """What a transform of so many points costs, in taps of one of them."""
        return points * self.window.width ** len(self.shape) + self.cell_taps * math.prod(self.sizes)

    @property
    def cell_taps(self) -> float:
        """Taps that cost as much as a cell."""
        return CELL_TAPS.get(self.device.type, CELL_TAPS["cpu"])

    @property
    def cells(self) -> tuple[int, int, int]:
        """(Z, Y, X) of the grid; Z = 1 in two dimensions."""
        z, y, x = (1, *self.sizes)[-3:]
        return z, y, x

    @property
    def cells_per_radian(self) -> tuple[float, float, float]:
        """Along (x, y, z)."""
        z, y, x = self.cells
        return x / (2 * math.pi), y / (2 * math.pi), z / (2 * math.pi)

    def in_cells(self, point_MD: Tensor) -> Tensor:
        """Points (x, y) or (x, y, z) in radians as float64 [M, 3] in cells; z = 0 in two dimensions."""
        cells = torch.tensor(self.sizes[::-1], dtype=torch.float64, device=point_MD.device)
        point_M3 = torch.zeros(len(point_MD), 3, dtype=torch.float64, device=point_MD.device)
        point_M3[:, : len(cells)] = point_MD * (cells / (2 * math.pi))
        return point_M3

    def zeros(self, batch: int) -> Tensor:
        """An empty grid [B, Z, Y, X, 2]."""
        return torch.zeros(batch, *self.cells, 2, dtype=self.dtype, device=self.device)

    def taps(self) -> Tensor:
        """The window's polynomials, for the kernels."""
        return torch.from_numpy(self.window.taps_DW).to(self.device, self.dtype).contiguous()

    def modes(self, grid_BZYX2: Tensor, sign: int) -> Tensor:
        """Modes [B, *shape] of what was spread: transforms axis by axis, the fastest first, keeping the modes after each
        (axes.py: after all but the fastest)."""
        values = torch.view_as_complex(grid_BZYX2)
        if self.by_axes:
            return axes.modes_of(_dft(values, 3, sign), self._factors, sign > 0)
        if len(self.shape) == 2:
            values = values[:, 0]
        for axis in range(len(self.shape) - 1, -1, -1):
            values = self.modes_along(values, axis, sign)
        return values

    def grid(self, modes: Tensor, sign: int) -> Tensor:
        """What is to be interpolated to get the modes' sum at points: the transpose of `modes`, [B, Z, Y, X, 2]."""
        values = modes
        if self.by_axes:
            cells = axes.cells_of(values, self._factors, self.sizes, sign > 0)
            return torch.view_as_real(_dft(cells, 3, sign).contiguous())
        for axis in range(len(self.shape)):
            values = self.cells_along(values, axis, sign)
        if len(self.shape) == 2:
            values = values[:, None]
        return torch.view_as_real(values.contiguous())

    def modes_of_planes(self, values: Tensor, sign: int) -> Tensor:
        """Modes along all axes but the slowest, of some planes [B, z, Y, X] (rows [B, y, X] of a grid of two dimensions)."""
        if self.by_axes:
            return axes.modes_of_planes(_dft(values, 3, sign), self._factors, sign > 0)
        for axis in range(len(self.shape) - 1, 0, -1):
            values = self.modes_along(values, axis, sign)
        return values

    def cells_of_planes(self, values: Tensor, sign: int) -> Tensor:
        """The transpose of `modes_of_planes`."""
        if self.by_axes:
            return _dft(axes.cells_of_planes(values, self._factors, self.sizes, sign > 0), 3, sign)
        for axis in range(1, len(self.shape)):
            values = self.cells_along(values, axis, sign)
        return values

    @property
    def by_axes(self) -> bool:
        """Whether axes.cu transforms the slower axes."""
        return axes.serves(self.sizes, self.device, self.dtype)

    def modes_along(self, values: Tensor, axis: int, sign: int) -> Tensor:
        """Modes of one axis of `shape`, from its cells: complex [B, ...], the other axes as they are."""
        lines, at, count = _dft(values, axis + 1, sign), axis + 1, self.shape[axis]
        sizes = [*lines.shape[:at], count, *lines.shape[at + 1 :]]
        # The axis that is transformed next lies innermost, so that it needs no copy of its own; the slowest one needs none.
        out = _empty(lines, sizes, axis if axis > 1 and lines.is_cuda else None) if axis else lines.new_empty(sizes)
        factor, low, high = self._deconvolution(axis), count // 2, count - count // 2
        _times(out.narrow(at, 0, low), lines.narrow(at, lines.shape[at] - low, low), factor[:low])
        _times(out.narrow(at, low, high), lines.narrow(at, 0, high), factor[low:])
        return out if lines.is_cuda else out.mul_(factor)

    def cells_along(self, values: Tensor, axis: int, sign: int) -> Tensor:
        """The transpose of `modes_along`."""
        at, count, cells, factor = axis + 1, self.shape[axis], self.sizes[axis], self._deconvolution(axis)
        low, high = count // 2, count - count // 2
        lines = _empty(values, [*values.shape[:at], cells, *values.shape[at + 1 :]], at if axis and values.is_cuda else None)
        if not values.is_cuda:
            values = values * factor
        _times(lines.narrow(at, cells - low, low), values.narrow(at, 0, low), factor[:low])
        _times(lines.narrow(at, 0, high), values.narrow(at, low, high), factor[low:])
        lines.narrow(at, high, cells - count).zero_()
        return _dft(lines, at, sign)

    @cached_property
    def _factors(self) -> tuple[Tensor, ...]:
        """1 / phi^(k) along each axis of the modes."""
        return tuple(
            torch.from_numpy(1 / self.window.transform(modes, cells)).to(self.device, self.dtype)
            for modes, cells in zip(self.shape, self.sizes, strict=True)
        )

    def _deconvolution(self, axis: int) -> Tensor:
        """1 / phi^(k) along one axis of the modes, shaped to multiply them."""
        return self._factors[axis].view(-1, *[1] * (len(self.shape) - 1 - axis))


@lru_cache(maxsize=256)
def smooth_size(least: int, primes: tuple[int, ...] = (2, 3, 5)) -> int:
    """The smallest even size from `least` on with no prime factor but these."""
    size = least + least % 2
    while True:
        rest = size
        for prime in primes:
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def _dft(values: Tensor, axes: int | tuple[int, ...], sign: int) -> Tensor:
    """sum_l v[l] exp(sign 2 pi i k l / n) along an axis or some."""
    return torch.fft.fftn(values, dim=axes) if sign < 0 else torch.fft.ifftn(values, dim=axes, norm="forward")


def _times(out: Tensor, values: Tensor, factor: Tensor) -> None:
    """out = values, on a GPU times the factor in the same pass; on a CPU two passes, each over contiguous memory, are quicker."""
    if out.is_cuda:
        torch.mul(values, factor, out=out)
    else:
        out.copy_(values)


def _empty(like: Tensor, sizes: list[int], last: int | None) -> Tensor:
    """A tensor whose axes lie in memory as those of another one, but for `last`, which lies innermost."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda axis: (axis == last, -strides[axis], axis))
    return like.new_empty([sizes[axis] for axis in order]).permute([order.index(axis) for axis in range(like.ndim)])
