"""`spread` and `interpolate` on the GPU; float32.

Spreading from crowded bins: a program takes a run of points of one bin (tiles.py). With A[j, (z, y)] = w_z w_y and B[j, (x, re
or im)] = w_x c_j over the cells of its tile, their sums are A^T B, a product of matrices in tensor cores, of whose terms most are
zero. Atomics then carry them to the grid, once for a whole run.

Spreading from other bins, and interpolation: a program takes a block of points, as an array of points times (taps along x, re and
im). Atomics, if any, carry the taps of each. (Interpolation by products of matrices was slower.) Sums are not repeatable to the
last bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.spread.tiles import Tiled, bin_for, unpacked

LANES, WARPS = 512, 4  # elements and warps of a program that goes point by point
AT_ONCE, PARTS = 32, 2  # points of a matrix product, parts that its operands are rounded to
WARPS_SMALL, WARPS_LARGE = 4, 8  # of a tile
READ_BY_WARPS = range(5, 7)  # widths of windows with which warps.cu interpolates, too (benchmarks/NOTES.md)
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _kept(x):
    """x, as it is: what made it is not computed anew by each thread that needs it (the compiler takes sums for cheaper than they
    are)."""
    if COMPILED:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def _rounded(x):
    """To the nearest number that TF32 has, float32."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, sums, PARTS: tl.constexpr):
    """sums + a b in tensor cores: 1, operands rounded to 11 bits; 2, each in two such parts."""
    high_a, high_b = _rounded(a), _rounded(b)
    if PARTS == 2:
        sums = tl.dot(a - high_a, high_b, sums, input_precision="tf32")
        sums = tl.dot(high_a, b - high_b, sums, input_precision="tf32")
    return tl.dot(high_a, high_b, sums, input_precision="tf32")


@triton.jit
def _weight(taps, f, tap, WIDTH: tl.constexpr, DEGREE: tl.constexpr):
    """Window at a tap (a number or a tile of them), 0 beyond it: the polynomial of `taps` at the fractions f. With tables (no
    degree) `taps` has the weights themselves, and f says where those of each point begin."""
    inside = (tap >= 0) & (tap < WIDTH)
    if DEGREE < 0:
        return (tl.load(taps + f + tap, mask=inside & (f >= 0), other=0).to(tl.int32) & 65535).to(tl.float32) * (1.0 / 65535)
    else:
        value = tl.load(taps + tap, mask=inside, other=0.0) + f * 0
        for d in tl.static_range(1, DEGREE + 1):
            value = value * f + tl.load(taps + d * WIDTH + tap, mask=inside, other=0.0)
        return value


@triton.jit
def _weights(taps, f, WIDTH: tl.constexpr, DEGREE: tl.constexpr):
    """Windows at all taps, a tuple."""
    weights = ()
    for tap in tl.static_range(WIDTH):
        weights = weights + (_weight(taps, f, tap, WIDTH, DEGREE),)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no *
    return weights


@triton.jit
def _origin(bin_, bins_y, bins_x, low_z, low_y, BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr):
    """First cell (x, y, z) of a bin in the grid at hand."""
    row = bin_ // bins_x
    return (bin_ % bins_x) * BIN_X, (row % bins_y) * BIN_Y - low_y, (row // bins_y) * BIN_Z - low_z


@triton.jit
def _run(bin_, run):
    """First point (64 bits) of this program's run, how many it has, and their bin."""
    first = tl.load(run + 2 * tl.program_id(0)).to(tl.int64)
    return first, tl.load(run + 2 * tl.program_id(0) + 1), tl.load(bin_ + first)


@triton.jit
def _axis_weights(
    packed, i, mask, taps, WIDTH: tl.constexpr, DEGREE: tl.constexpr, TILE: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """Weights [points, TILE] of an axis (x, y, z) over the cells of the tile."""
    local, f = unpacked(tl.load(packed + i, mask=mask, other=0))
    if DEGREE < 0:
        f = tl.where(mask, 3 * i + AXIS, 0) * WIDTH
    return _kept(_weight(taps, f[:, None], tl.arange(0, TILE)[None, :] - local[:, None], WIDTH, DEGREE))


@triton.jit
def _row_weights(
    packed, count, i, mask, taps, WIDTH: tl.constexpr, DEGREE: tl.constexpr, TILE_Z: tl.constexpr, TILE_Y: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Products of weights along z and y [points, TILE_Z * TILE_Y]."""
    along_y = _axis_weights(packed + count, i, mask, taps, WIDTH, DEGREE, TILE_Y, 1)
    if TILE_Z == 1:
        return along_y
    along_z = _axis_weights(packed + 2 * count, i, mask, taps, WIDTH, DEGREE, TILE_Z, 2)
    return (along_z[:, :, None] * along_y[:, None, :]).reshape(AT_ONCE, TILE_Z * TILE_Y)


@triton.jit
def _words(x, y, z, planes, height, size, TILE_Z: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Words of the grid [TILE_Z * TILE_Y, 2 TILE_X] that a tile covers, around its ends, and which of its rows [.., 1] the grid
    at hand has: no point of it reaches others."""
    row, column = tl.arange(0, TILE_Z * TILE_Y), tl.arange(0, 2 * TILE_X)
    z, y, x = z + row // TILE_Y, y + row % TILE_Y, (x + column // 2) % size
    word = (((z % planes).to(tl.int64) * height + y % height) * (2 * size))[:, None] + (x * 2 + column % 2)[None, :]
    return word, ((z >= 0) & (y >= 0))[:, None]


@triton.jit
def _spread_tiles(
    grid, values, packed, bin_, order, run, taps, points, planes, height, size, bins_y, bins_x, low_z, low_y,
    WIDTH: tl.constexpr, DEGREE: tl.constexpr, BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr,
    TILE_Z: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    batch, count = tl.program_id(1).to(tl.int64), points.to(tl.int64)
    first, length, one = _run(bin_, run)
    x, y, z = _origin(one, bins_y, bins_x, low_z, low_y, BIN_Z, BIN_Y, BIN_X)
    component = tl.arange(0, 2)
    sums = tl.zeros([TILE_Z * TILE_Y, 2 * TILE_X], tl.float32)
    for done in range(0, length, AT_ONCE):
        k = done + tl.arange(0, AT_ONCE)
        mask, i = k < length, first + k
        j = tl.load(order + i, mask=mask, other=0).to(tl.int64)
        value = tl.load(values + (batch * count + j)[:, None] * 2 + component[None, :], mask=mask[:, None], other=0.0)
        along_x = _axis_weights(packed, i, mask, taps, WIDTH, DEGREE, TILE_X, 0)
        line = _kept((along_x[:, :, None] * value[:, None, :]).reshape(AT_ONCE, 2 * TILE_X))
        rows = _row_weights(packed, count, i, mask, taps, WIDTH, DEGREE, TILE_Z, TILE_Y, AT_ONCE)
        sums = _product(tl.trans(rows), line, sums, PARTS)
    words, had = _words(x, y, z, planes, height, size, TILE_Z, TILE_Y, TILE_X)
    tl.atomic_add(grid + batch * planes * height * size * 2 + words, sums, mask=had, sem="relaxed")


@triton.jit
def _point(
    packed, bin_, order, points, first, bins_y, bins_x, low_z, low_y, WIDTH: tl.constexpr, DEGREE: tl.constexpr,
    BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers, first cells, and what `_weight` takes along x, y, z, of this program's points."""
    i = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, count = i < points, points.to(tl.int64)
    x, y, z = _origin(tl.load(bin_ + i, mask=mask, other=0), bins_y, bins_x, low_z, low_y, BIN_Z, BIN_Y, BIN_X)
    local_x, fx = unpacked(tl.load(packed + i, mask=mask, other=0))
    local_y, fy = unpacked(tl.load(packed + count + i, mask=mask, other=0))
    local_z, fz = unpacked(tl.load(packed + 2 * count + i, mask=mask, other=0))
    if DEGREE < 0:
        fx = tl.where(mask, 3 * i, 0) * WIDTH
        fy, fz = fx + WIDTH, fx + 2 * WIDTH
    j = tl.load(order + i, mask=mask, other=0).to(tl.int64)
    return j, mask, x + local_x, y + local_y, z + local_z, fx, fy, fz


@triton.jit
def _row(y, z, dy, dz, planes, height):
    """Which row of the grid tap (dy, dz) of each point falls on, around the ends."""
    y, z = y + dy, z + dz
    y = tl.where(y >= height, y - height, y)
    z = tl.where(z >= planes, z - planes, z)
    return z.to(tl.int64) * height + y


@triton.jit
def _spread_points(
    grid, values, packed, bin_, order, first, taps, points, planes, height, size, bins_y, bins_x, low_z, low_y,
    WIDTH: tl.constexpr, DEGREE: tl.constexpr, BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr,
    LANES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    j, mask, x, y, z, fx, fy, fz = _point(
        packed, bin_, order, points, first, bins_y, bins_x, low_z, low_y, WIDTH, DEGREE, BIN_Z, BIN_Y, BIN_X, BLOCK
    )
    lane = tl.arange(0, LANES)[None, :]
    tap, component = lane // 2, lane % 2
    used = mask[:, None] & (tap < WIDTH)
    value = tl.load(values + (batch * points + j[:, None]) * 2 + component, mask=mask[:, None], other=0.0)
    line = value * _weight(taps, fx[:, None], tap, WIDTH, DEGREE)
    column = x[:, None] + tap
    column = tl.where(column >= size, column - size, column) * 2 + component
    grid += batch * planes * height * size * 2
    along_y = _weights(taps, fy, WIDTH, DEGREE)
    for dz in range(DEPTH):
        wz = tl.full([BLOCK], 1.0, tl.float32)
        if DEPTH > 1:
            wz = _weight(taps, fz, dz, WIDTH, DEGREE)
        for dy in tl.static_range(WIDTH):
            weight = wz * along_y[dy]
            row = _row(y, z, dy, dz, planes, height)
            tl.atomic_add(grid + row[:, None] * (2 * size) + column, line * weight[:, None], mask=used, sem="relaxed")


@triton.jit
def _interpolate_points(
    grid, out, packed, bin_, order, first, taps, points, planes, height, size, bins_y, bins_x, low_z, low_y,
    WIDTH: tl.constexpr, DEGREE: tl.constexpr, BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr,
    LANES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    j, mask, x, y, z, fx, fy, fz = _point(
        packed, bin_, order, points, first, bins_y, bins_x, low_z, low_y, WIDTH, DEGREE, BIN_Z, BIN_Y, BIN_X, BLOCK
    )
    lane = tl.arange(0, LANES)[None, :]
    tap, component = lane // 2, lane % 2
    used = mask[:, None] & (tap < WIDTH)
    column = x[:, None] + tap
    column = tl.where(column >= size, column - size, column) * 2 + component
    grid += batch * planes * height * size * 2
    total = tl.zeros([BLOCK, LANES], tl.float32)
    along_y = _weights(taps, fy, WIDTH, DEGREE)
    for dz in range(DEPTH):
        wz = tl.full([BLOCK], 1.0, tl.float32)
        if DEPTH > 1:
            wz = _weight(taps, fz, dz, WIDTH, DEGREE)
        for dy in tl.static_range(WIDTH):
            weight = wz * along_y[dy]
            row = _row(y, z, dy, dz, planes, height)
            total += weight[:, None] * tl.load(grid + row[:, None] * (2 * size) + column, mask=used, other=0.0)
    total *= _weight(taps, fx[:, None], tap, WIDTH, DEGREE)
    real = tl.sum(tl.where(component == 0, total, 0.0), 1)
    imaginary = tl.sum(tl.where(component == 1, total, 0.0), 1)
    out += (batch * points + j) * 2
    tl.store(out, real, mask=mask)
    tl.store(out + 1, imaginary, mask=mask)


def spread_triton(grid_BZYX2: Tensor, places: Tiled, values_BM2: Tensor) -> None:
    """See `spread_reference`; float32, contiguous grid, places of located_triton."""
    values_BM2, tile = values_BM2.to(torch.float32).contiguous(), places.tile
    given = _arguments(grid_BZYX2, values_BM2, places)
    runs, batch = len(places.run_T2), len(grid_BZYX2)
    if runs and batch and places.by_warps:
        from verglas.kernels.spread.warps import spread_crowded

        spread_crowded(grid_BZYX2, values_BM2, places)
    elif runs and batch:
        _spread_tiles[(runs, batch)](
            *given[:5], places.run_T2, *given[5:], **_window(places), TILE_Z=tile[0], TILE_Y=tile[1], TILE_X=tile[2],
            AT_ONCE=AT_ONCE, PARTS=PARTS, num_warps=WARPS_SMALL if tile[0] * tile[1] <= 64 else WARPS_LARGE, num_stages=1,
        )  # fmt: skip
    _point_by_point(_spread_points, given, places, batch, places.crowded)


def interpolate_triton(grid_BZYX2: Tensor, places: Tiled) -> Tensor:
    """See `interpolate_reference`; float32."""
    out_BM2 = grid_BZYX2.new_empty(len(grid_BZYX2), len(places), 2)
    given = _arguments(grid_BZYX2.contiguous(), out_BM2, places)
    if places.by_warps and places.width in READ_BY_WARPS and grid_BZYX2[0].numel() < 2**33:
        from verglas.kernels.spread.warps import interpolate_all

        interpolate_all(grid_BZYX2.contiguous(), out_BM2, places)
        return out_BM2
    _point_by_point(_interpolate_points, given, places, len(grid_BZYX2), 0)
    return out_BM2


def tabled_triton(places: Tiled) -> Tiled:
    """See `tabled`."""
    table_M3W = torch.empty(len(places), 3, places.width, dtype=torch.int16, device=places.packed_3M.device)
    if len(places):
        _table_kernel[(triton.cdiv(len(places), LANES), 3)](
            places.packed_3M, places.taps_DW, table_M3W, len(places), WIDTH=places.width, DEGREE=len(places.taps_DW) - 1,
            BLOCK=LANES,
        )  # fmt: skip
    return replace(places, table_M3W=table_M3W)


@triton.jit
def _table_kernel(packed, taps, table, count, WIDTH: tl.constexpr, DEGREE: tl.constexpr, BLOCK: tl.constexpr):
    i, axis = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    _, f = unpacked(tl.load(packed + axis * count.to(tl.int64) + i, mask=i < count, other=0))
    for tap in tl.static_range(WIDTH):
        level = tl.minimum(tl.maximum(_weight(taps, f, tap, WIDTH, DEGREE) * 65535 + 0.5, 0.0), 65535.0)
        tl.store(table + (3 * i + axis) * WIDTH + tap, level.to(tl.int32).to(tl.int16), mask=i < count)


def _point_by_point(kernel: triton.JITFunction, given: tuple[Tensor | int, ...], places: Tiled, batch: int, first: int) -> None:
    """Run for the points from `first` on."""
    lanes = 2 * triton.next_power_of_2(places.width)
    block = max(1, LANES // lanes)
    if batch and first < len(places):
        kernel[(triton.cdiv(len(places) - first, block), batch)](
            *given[:5], first, *given[5:], **_window(places), LANES=lanes, DEPTH=1 if places.tile[0] == 1 else places.width,
            BLOCK=block, num_warps=WARPS,
        )  # fmt: skip


def _arguments(grid_BZYX2: Tensor, values_BM2: Tensor, places: Tiled) -> tuple[Tensor | int, ...]:
    """What all kernels take; after the fifth comes where their points begin."""
    if grid_BZYX2.dtype != torch.float32 or not isinstance(places, Tiled):
        raise TypeError(f"the Triton kernel takes float32 and points located for it, got {grid_BZYX2.dtype}, {type(places)}")
    taps = places.taps_DW if places.table_M3W is None else places.table_M3W
    points = (places.packed_3M, places.bin_M, places.order_M, taps)
    return grid_BZYX2, values_BM2, *points, len(places), *grid_BZYX2.shape[1:4], *places.bins[1:], *places.low


def _window(places: Tiled) -> dict[str, int]:
    bin_z, bin_y, bin_x = bin_for(places.width, places.tile)
    return {"WIDTH": places.width, "DEGREE": places.degree, "BIN_Z": bin_z, "BIN_Y": bin_y, "BIN_X": bin_x}
