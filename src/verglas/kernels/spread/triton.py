"""`spread` and `interpolate` on the GPU: a program takes a block of sorted points; float32.

A tile is points times (taps along x, re and im): the weights along x are made once, those along y and z, which all lanes of a
point share, at each row. Sums travel by atomics, neighbours in the tile to neighbouring words; sorted points meet in the cache.
Atomics are not repeatable to the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.spread import Places

TILE, WARPS = 512, 4  # elements of a tile, warps of a program


@triton.jit
def _weight(taps, f, tap, WIDTH: tl.constexpr, DEGREE: tl.constexpr):
    """Window at a tap (a number or a tile of them): the polynomial of `taps` at the fractions f."""
    inside = tap < WIDTH
    value = tl.load(taps + tap, mask=inside, other=0.0) + f * 0
    for d in tl.static_range(1, DEGREE + 1):
        value = value * f + tl.load(taps + d * WIDTH + tap, mask=inside, other=0.0)
    return value


@triton.jit
def _point(cell, fraction, order, count, BLOCK: tl.constexpr):
    """Numbers, first cells and fractions of this program's points."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    j = tl.load(order + i, mask=mask, other=0).to(tl.int64)
    x, y, z = tl.load(cell + 3 * j), tl.load(cell + 3 * j + 1), tl.load(cell + 3 * j + 2)
    return j, mask, x, y, z, tl.load(fraction + 3 * j), tl.load(fraction + 3 * j + 1), tl.load(fraction + 3 * j + 2)


@triton.jit
def _row(y, z, dy, dz, planes, height):
    """Which row of the grid tap (dy, dz) of each point falls on, around the ends."""
    y, z = y + dy, z + dz
    y = tl.where(y >= height, y - height, y)
    z = tl.where(z >= planes, z - planes, z)
    return z.to(tl.int64) * height + y


@triton.jit
def _spread_kernel(
    grid, values, cell, fraction, order, taps, count, planes, height, size,
    WIDTH: tl.constexpr, LANES: tl.constexpr, DEGREE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    j, mask, x, y, z, fx, fy, fz = _point(cell, fraction, order, count, BLOCK)
    lane = tl.arange(0, LANES)[None, :]
    tap, component = lane // 2, lane % 2
    used = mask[:, None] & (tap < WIDTH)
    value = tl.load(values + (batch * count + j[:, None]) * 2 + component, mask=mask[:, None], other=0.0)
    line = value * _weight(taps, fx[:, None], tap, WIDTH, DEGREE)
    column = x[:, None] + tap
    column = tl.where(column >= size, column - size, column) * 2 + component
    grid += batch * planes * height * size * 2
    for dz in range(DEPTH):
        wz = fz * 0 + 1.0
        if DEPTH > 1:
            wz = _weight(taps, fz, dz, WIDTH, DEGREE)
        for dy in range(WIDTH):
            weight = wz * _weight(taps, fy, dy, WIDTH, DEGREE)
            row = _row(y, z, dy, dz, planes, height)
            tl.atomic_add(grid + row[:, None] * (2 * size) + column, line * weight[:, None], mask=used, sem="relaxed")


@triton.jit
def _interpolate_kernel(
    grid, out, cell, fraction, order, taps, count, planes, height, size,
    WIDTH: tl.constexpr, LANES: tl.constexpr, DEGREE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    j, mask, x, y, z, fx, fy, fz = _point(cell, fraction, order, count, BLOCK)
    lane = tl.arange(0, LANES)[None, :]
    tap, component = lane // 2, lane % 2
    used = mask[:, None] & (tap < WIDTH)
    column = x[:, None] + tap
    column = tl.where(column >= size, column - size, column) * 2 + component
    grid += batch * planes * height * size * 2
    total = tl.zeros([BLOCK, LANES], tl.float32)
    for dz in range(DEPTH):
        wz = fz * 0 + 1.0
        if DEPTH > 1:
            wz = _weight(taps, fz, dz, WIDTH, DEGREE)
        for dy in range(WIDTH):
            weight = wz * _weight(taps, fy, dy, WIDTH, DEGREE)
            row = _row(y, z, dy, dz, planes, height)
            total += weight[:, None] * tl.load(grid + row[:, None] * (2 * size) + column, mask=used, other=0.0)
    total *= _weight(taps, fx[:, None], tap, WIDTH, DEGREE)
    real = tl.sum(tl.where(component == 0, total, 0.0), 1)
    imaginary = tl.sum(tl.where(component == 1, total, 0.0), 1)
    out += (batch * count + j) * 2
    tl.store(out, real, mask=mask)
    tl.store(out + 1, imaginary, mask=mask)


def spread_triton(grid_BZYX2: Tensor, places: Places, values_BM2: Tensor) -> None:
    """See `spread_reference`; float32, contiguous grid."""
    _launch(_spread_kernel, grid_BZYX2, values_BM2.to(torch.float32).contiguous(), places)


def interpolate_triton(grid_BZYX2: Tensor, places: Places) -> Tensor:
    """See `interpolate_reference`; float32."""
    out_BM2 = grid_BZYX2.new_empty(len(grid_BZYX2), len(places), 2)
    _launch(_interpolate_kernel, grid_BZYX2.contiguous(), out_BM2, places)
    return out_BM2


def _launch(kernel: triton.JITFunction, grid_BZYX2: Tensor, values_BM2: Tensor, places: Places) -> None:
    if grid_BZYX2.dtype != torch.float32:
        raise TypeError(f"the Triton kernel works in float32, got a grid of {grid_BZYX2.dtype}")
    batch, planes, height, size, _ = grid_BZYX2.shape
    if len(places) == 0 or batch == 0:
        return
    lanes = 2 * triton.next_power_of_2(places.width)
    block = max(1, TILE // lanes)
    kernel[(triton.cdiv(len(places), block), batch)](
        grid_BZYX2, values_BM2, places.cell_M3, places.fraction_M3, places.order_M, places.taps_DW, len(places), planes, height,
        size, WIDTH=places.width, LANES=lanes, DEGREE=len(places.taps_DW) - 1, DEPTH=places.width if planes > 1 else 1,
        BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
