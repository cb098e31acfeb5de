"""The fine grid between points and modes: its sizes, its pruned transforms, and what undoes the window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.nufft.window import Window, window_for

UPSAMPLINGS = (1.25, 1.5, 1.75, 2.0)  # of which the one is taken that costs least
CELL_TAPS = {"cuda": 7.0, "cpu": 2.0}  # taps of one point that take as long as one cell (both types, benchmarks/NOTES.md)


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
        points: int = 0,
    ) -> FineGrid:  # fmt: skip
        """For modes of `shape`; accuracy: relative error wanted (root mean square); dtype: float32 or float64, of the grid;
        upsampling: None for what costs least with so many points.

        InputError for what no window serves.
        """
        least, rounding = (3e-7, 5e-8) if dtype == torch.float32 else (1e-14, 1e-16)
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise InputError("nufft", f"modes of shape {tuple(shape)}", "two or three axes of at least one mode")
        if not least <= accuracy < 1:
            raise InputError("nufft", f"accuracy {accuracy:g} in {dtype}", f"{least:g} to 1", "Use complex128 for less error.")
        if upsampling is not None and not 1.2 <= upsampling <= 4:
            raise InputError("nufft", f"upsampling {upsampling:g}", "1.2 to 4")
        found: list[FineGrid] = []
        for factor in UPSAMPLINGS if upsampling is None else (upsampling,):
            try:
                window = window_for(accuracy, factor, len(shape), rounding)
            except ValueError as error:
                if factor in (upsampling, UPSAMPLINGS[-1]):
                    raise InputError("nufft", str(error), "", "Ask for a larger upsampling.") from error
                continue
            sizes = tuple(smooth_size(max(math.ceil(factor * n - 1e-9), 2 * window.width)) for n in shape)
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
        """Modes [B, *shape] of what was spread: transforms axis by axis, the fastest first, keeping the modes after each."""
        values = torch.view_as_complex(grid_BZYX2)
        if len(self.shape) == 2:
            values = values[:, 0]
        for axis in range(len(self.shape) - 1, -1, -1):
            values = self.modes_along(values, axis, sign)
        return values

    def grid(self, modes: Tensor, sign: int) -> Tensor:
        """What is to be interpolated to get the modes' sum at points: the transpose of `modes`, [B, Z, Y, X, 2]."""
        values = modes
        for axis in range(len(self.shape)):
            values = self.cells_along(values, axis, sign)
        if len(self.shape) == 2:
            values = values[:, None]
        return torch.view_as_real(values.contiguous())

    def modes_along(self, values: Tensor, axis: int, sign: int) -> Tensor:
        """Modes of one axis of `shape`, from its cells: complex [B, ...], the other axes as they are."""
        return _around(_dft(values, axis + 1, sign), axis + 1, self.shape[axis]) * self._deconvolution(axis)

    def cells_along(self, values: Tensor, axis: int, sign: int) -> Tensor:
        """The transpose of `modes_along`."""
        return _dft(_padded(values * self._deconvolution(axis), axis + 1, self.sizes[axis]), axis + 1, sign)

    def _deconvolution(self, axis: int) -> Tensor:
        """1 / phi^(k) along one axis of the modes, shaped to multiply them."""
        factor = 1 / self.window.transform(self.shape[axis], self.sizes[axis])
        return torch.from_numpy(factor).to(self.device, self.dtype).view(-1, *[1] * (len(self.shape) - 1 - axis))


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


def _dft(values: Tensor, axis: int, sign: int) -> Tensor:
    """sum_l v[l] exp(sign 2 pi i k l / n) along an axis."""
    return torch.fft.fft(values, dim=axis) if sign < 0 else torch.fft.ifft(values, dim=axis, norm="forward")


def _around(values: Tensor, axis: int, modes: int) -> Tensor:
    """The modes -(N // 2) .. (N - 1) // 2 of an axis in FFT order, ascending."""
    size = values.shape[axis]
    below = values.narrow(axis, size - modes // 2, modes // 2)
    return torch.cat([below, values.narrow(axis, 0, modes - modes // 2)], axis)


def _padded(values: Tensor, axis: int, size: int) -> Tensor:
    """The transpose of `_around`."""
    modes, shape = values.shape[axis], list(values.shape)
    shape[axis] = size
    out = values.new_zeros(shape)
    out.narrow(axis, size - modes // 2, modes // 2).copy_(values.narrow(axis, 0, modes // 2))
    out.narrow(axis, 0, modes - modes // 2).copy_(values.narrow(axis, modes // 2, modes - modes // 2))
    return out
