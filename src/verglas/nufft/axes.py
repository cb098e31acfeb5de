"""Transforms of a grid along its two slower axes on the GPU, one kernel for each: launches of axes.cu.

Of each line only the modes are kept (or only they are there), what undoes the window multiplies them, and all of it is one walk
through memory. The fastest axis, whose lines lie in memory as they are, is left to cuFFT. With n cells and N modes an axis, b
bytes a number, type 1 moves

    x  2 n³ b (cuFFT),   y  n² N b + n N² b,   z  n N² b + N³ b

and type 2 the same but for n³ b instead of n² N b along y, where zeros are written between the modes.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from verglas.kernels.nvrtc import Kernel, load

SOURCE = Path(__file__).with_name("axes.cu")
COLUMNS, THREADS = 16, 512  # of a block; half of both, or a quarter, where its lines would not fit into `SHARED_BYTES`
RADICES = (8, 4, 2, 13, 11, 7, 5, 3)  # of passes, those first that come first
SHARED_BYTES = 104 * 1024  # of a block: two at a time on a processor with 228 KB
MOST_GRID = 65535


def serves(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels transform a grid of these sizes (z, y, x): in single precision on a GPU, if z and y are even and have
    no large prime factor."""
    return device.type == "cuda" and dtype == torch.float32 and len(sizes) == 3 and all(_short(size) for size in sizes[:2])


def _short(size: int) -> bool:
    radices = passes(size)
    return size % 2 == 0 and radices is not None and 8 * (COLUMNS // 4) * room(radices) <= SHARED_BYTES


@lru_cache(maxsize=256)
def passes(size: int) -> tuple[int, ...] | None:
    """Radices of the passes of a transform, None if it has a larger prime factor."""
    found: list[int] = []
    while size > 1:
        radix = next((radix for radix in RADICES if size % radix == 0), None)
        if radix is None:
            return None
        found.append(radix)
        size //= radix
    return tuple(found)


def room(radices: tuple[int, ...]) -> int:
    """Numbers of shared memory that a line takes (`Passes::room` in passes.cuh)."""
    last = prod(radices) - 1
    blocks = [prod(radices[number:]) for number in range(1, len(radices))]
    return last + 1 + sum(last // block for block in blocks if block % 2 == 0)


def modes_of(values: Tensor, factors: tuple[Tensor, ...], backward: bool) -> Tensor:
    """Modes [B, Nz, Ny, Nx] of a grid [B, Z, Y, X] that is transformed along x; complex64. factors: of the modes along (z, y, x),
    float32; backward: with the sign + in the exponent. Contiguous."""
    cut = modes_of_planes(values, factors, backward)
    batch, z, ny, nx = cut.shape
    modes = torch.empty(batch, len(factors[0]), ny, nx, dtype=torch.complex64, device=values.device)
    _launch("to_modes", z, modes, cut, factors[0], None, batch, ny, (nx, ny * nx), (nx, ny * nx), (nx, nx), backward)
    return modes


def modes_of_planes(values: Tensor, factors: tuple[Tensor, ...], backward: bool) -> Tensor:
    """As `modes_of`, but along y and x alone: [B, Z, Ny, Nx]."""
    (batch, z, y, x), (_, ny, nx) = values.shape, (len(factor) for factor in factors)
    values, of_y, of_x = values.contiguous(), *factors[1:]
    cut = torch.empty(batch, z, ny, nx, dtype=torch.complex64, device=values.device)
    _launch("to_modes", y, cut, values, of_y, of_x, batch, z, (y * x, x), (ny * nx, nx), (x, nx), backward)
    return cut


def cells_of(modes: Tensor, factors: tuple[Tensor, ...], sizes: tuple[int, ...], backward: bool) -> Tensor:
    """The transpose of `modes_of`: a grid [B, *sizes] that is still to be transformed along x."""
    (batch, _, ny, nx), z, modes = modes.shape, sizes[0], modes.contiguous()
    cut = torch.empty(batch, z, ny, nx, dtype=torch.complex64, device=modes.device)
    _launch("to_cells", z, cut, modes, factors[0], None, batch, ny, (nx, ny * nx), (nx, ny * nx), (nx, nx), backward)
    return cells_of_planes(cut, factors, sizes, backward)


def cells_of_planes(cut: Tensor, factors: tuple[Tensor, ...], sizes: tuple[int, ...], backward: bool) -> Tensor:
    """The transpose of `modes_of_planes`: [B, Z, Ny, Nx] to [B, Z, Y, X], still to be transformed along x."""
    (batch, z, ny, nx), (y, x), (of_y, of_x), cut = cut.shape, sizes[1:], factors[1:], cut.contiguous()
    cells = torch.empty(batch, z, y, x, dtype=torch.complex64, device=cut.device)
    _launch("to_cells", y, cells, cut, of_y, of_x, batch, z, (ny * nx, nx), (y * x, x), (x, nx), backward)
    return cells


def _launch(
    name: str, size: int, to: Tensor, given: Tensor, factor: Tensor, factor_x: Tensor | None, batch: int, rows: int,
    of_given: tuple[int, int], of_to: tuple[int, int], along_x: tuple[int, int], backward: bool,
) -> None:  # fmt: skip
    """of_given, of_to: from row to row, and from number to number of a line; along_x: cells and modes."""
    if not to.numel():
        return
    radices = passes(size)
    assert radices is not None
    part = next((part for part in (1, 2) if 8 * (COLUMNS // part) * room(radices) <= SHARED_BYTES), 4)
    columns, threads = COLUMNS // part, THREADS // part
    digits = int("".join(f"{radix:02d}" for radix in radices))
    defines = (f"P={size}", f"PASSES={digits}", f"COLUMNS={columns}", f"THREADS={threads}")
    width = along_x[1] if name == "to_modes" else along_x[0]
    each = max(1, MOST_GRID // rows)  # vectors at a time
    with torch.cuda.device(to.device) if to.is_cuda else nullcontext():
        run = kernel(name, to.device, defines, 8 * columns * room(radices))
        for first in range(0, batch, each):
            some = slice(first, first + each)
            run((-(-width // columns), len(to[some]) * rows), threads, to[some], given[some], _roots(size, to.device), factor,
                factor_x, rows, *of_given, *of_to, *along_x, len(factor), int(backward))  # fmt: skip


@lru_cache(maxsize=8)
def _roots(size: int, device: torch.device) -> Tensor:
    """exp(-2 pi i j / P), complex64 [P]."""
    angle_P = torch.arange(size, dtype=torch.float64) * (-2 * torch.pi / size)
    return torch.polar(torch.ones_like(angle_P), angle_P).to(device, torch.complex64)


def kernel(name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Kernel:
    """A function of axes.cu."""
    return load(SOURCE, name, device, defines, shared=shared)
