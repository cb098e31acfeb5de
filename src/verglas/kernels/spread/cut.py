"""From the transform of a grid to its modes, and back: cut or padded along three axes, and multiplied, in one pass over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # words of a row at a time


@triton.jit
def _cut_kernel(cells, modes, factor_z, factor_y, factor_x, nz, ny, nx, mz, my, mx, BLOCK: tl.constexpr):
    """A program for each row of modes."""
    row = tl.program_id(0).to(tl.int64)
    ky, kz, batch = (row % my).to(tl.int32), (row // my % mz).to(tl.int32), row // my // mz
    y, z = ky - my // 2, kz - mz // 2
    y, z = tl.where(y < 0, y + ny, y), tl.where(z < 0, z + nz, z)
    factor = tl.load(factor_z + kz) * tl.load(factor_y + ky)
    source = cells + ((batch * nz + z) * ny + y) * (2 * nx)
    for first in range(0, 2 * mx, BLOCK):
        word = first + tl.arange(0, BLOCK)
        mask, kx = word < 2 * mx, word // 2
        x = tl.where(kx < mx // 2, kx - mx // 2 + nx, kx - mx // 2)
        value = tl.load(source + 2 * x + word % 2, mask=mask, other=0.0)
        tl.store(modes + row * (2 * mx) + word, value * (factor * tl.load(factor_x + kx, mask=mask, other=0.0)), mask=mask)


@triton.jit
def _mode_of(cell, n, m):
    """Which mode a cell of the transform holds; -1: none of them."""
    high = m - m // 2
    return tl.where(cell < high, cell + m // 2, tl.where(cell >= n - m // 2, cell - (n - m // 2), -1))


@triton.jit
def _pad_kernel(modes, cells, factor_z, factor_y, factor_x, nz, ny, nx, mz, my, mx, BLOCK: tl.constexpr):
    """The transpose: a program for each row of cells."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // ny // nz
    ky, kz = _mode_of((row % ny).to(tl.int32), ny, my), _mode_of((row // ny % nz).to(tl.int32), nz, mz)
    held = (ky >= 0) & (kz >= 0)
    factor = tl.load(factor_z + kz, mask=held, other=0.0) * tl.load(factor_y + ky, mask=held, other=0.0)
    source = modes + ((batch * mz + kz) * my + ky) * (2 * mx)
    for first in range(0, 2 * nx, BLOCK):
        word = first + tl.arange(0, BLOCK)
        kx = _mode_of(word // 2, nx, mx)
        mask = (word < 2 * nx) & (kx >= 0) & held
        value = tl.load(source + 2 * kx + word % 2, mask=mask, other=0.0) * tl.load(factor_x + kx, mask=mask, other=0.0)
        tl.store(cells + row * (2 * nx) + word, value * factor, mask=word < 2 * nx)


def cut(cells: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Modes -(N // 2) .. (N - 1) // 2 along (z, y, x) of transforms in FFT order, complex64 [B, cells] -> [B, modes], contiguous,
    times a factor for each mode of an axis, float32 [modes]."""
    shape = tuple(len(factor) for factor in factors)
    modes = torch.empty(len(cells), *shape, dtype=torch.complex64, device=cells.device)
    if modes.numel():
        _cut_kernel[(len(cells) * shape[0] * shape[1],)](
            torch.view_as_real(cells.contiguous()), torch.view_as_real(modes), *factors, *cells.shape[1:], *shape, BLOCK=BLOCK
        )
    return modes


def padded(modes: Tensor, factors: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...]) -> Tensor:
    """The transpose of `cut`: [B, modes] -> [B, *sizes], zero where no mode is."""
    cells = torch.empty(len(modes), *sizes, dtype=torch.complex64, device=modes.device)
    if cells.numel():
        _pad_kernel[(len(modes) * sizes[0] * sizes[1],)](
            torch.view_as_real(modes.contiguous()), torch.view_as_real(cells), *factors, *sizes, *modes.shape[1:], BLOCK=BLOCK
        )
    return cells
