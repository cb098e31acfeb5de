"""Points as the GPU has them: sorted by bins of the grid, each packed into 20 bytes, and crowded bins cut into runs.

A bin is so large that every cell its points touch lies in one tile: tile - (W - 1) cells along each axis. Of each coordinate one
word of 32 bits is kept: which cell of the bin is touched first, 5 bits, and where in a cell the point lies, 27 bits, finer than
single precision. With its bin and its number among the caller's points that makes 20 bytes; cells and fractions (`Places`) take
28. Points are kept in the order in which they are visited, so they are read in order.

They are sorted by counting: a walk through them finds the bin of each, and how many came to it before; where each bin begins
being known, the numbers of points are put in their places; and a walk in that order reads, packs and writes the points, since
words that are read here and there take less time than words that are written so. Within a bin the order is that of chance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

WITHIN = tl.constexpr(27)  # bits of a position within a cell
SMALL, LARGE, FLAT = (8, 8, 16), (16, 16, 16), (1, 32, 32)  # tiles (z, y, x), cells
WIDEST_SMALL, WIDEST = 5, 10  # windows of the small tile, and of any; wider ones go point by point
BY_WARPS = range(4, 10)  # widths of windows whose crowded bins are spread by warps.cu
WARP_TILES = ((4, (8, 8)), (5, (10, 10)), (6, (12, 12)), (9, (16, 16)))  # windows up to so many cells: tiles, along z and y
CROWD = 16  # points of a bin from which a tile is taken (benchmarks/nufft_tables_gpu.py times tiles and points one by one)
RUN, WARP_RUN = 256, 512  # points of a program at most, and of a warp
BLOCK = 256


@dataclass(frozen=True)
class Tiled:
    """As `Places`, for spread_triton and interpolate_triton.

    shape: (Z, Y, X) of the grid at hand, whose first plane and row are `low` of the whole; tile: cells (z, y, x); bins: how many
    along z, y, x. packed_3M: int32 (x, y, z), the words above; bin_M, order_M: int32, the bin of each and its number among the
    caller's points. The points of crowded bins come first, `crowded` of them; run_T2: int32, where a run of them begins, and how
    many it has, all of one bin. by_warps: whether they are spread by warps.cu.
    table_M3W: int16, weights along (x, y, z) in the order of visiting (`tabled`).
    """

    shape: tuple[int, int, int]
    low: tuple[int, int]
    tile: tuple[int, int, int]
    bins: tuple[int, int, int]
    packed_3M: Tensor
    bin_M: Tensor
    order_M: Tensor
    run_T2: Tensor
    crowded: int
    taps_DW: Tensor
    by_warps: bool = False
    table_M3W: Tensor | None = None

    def __len__(self) -> int:
        return len(self.order_M)

    @property
    def width(self) -> int:
        """Taps along x and y (and z, if the grid is no plane)."""
        return self.taps_DW.shape[1]

    @property
    def degree(self) -> int:
        """Of the polynomials; -1: weights are read from a table."""
        return -1 if self.table_M3W is not None else len(self.taps_DW) - 1

    def within(self, low: int, count: int) -> Tiled:
        """As `Places.within`."""
        if self.tile[0] == 1:
            return replace(self, shape=(1, count, self.shape[2]), low=(0, low))
        return replace(self, shape=(count, *self.shape[1:]), low=(low, 0))


def tile_for(width: int, planes: int, by_warps: bool = False) -> tuple[int, int, int]:
    """Cells (z, y, x) of a tile for windows of this width."""
    if planes == 1:
        return FLAT
    if by_warps:
        z, y = next((tile for most, tile in WARP_TILES if width <= most), WARP_TILES[-1][1])
        return z, y, 16 + width  # warps.cu: rows of a tile then lie in memory without a gap
    return SMALL if width <= WIDEST_SMALL else LARGE


def bin_for(width: int, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Cells (z, y, x) of a bin."""
    z, y, x = tile
    return max(z - width + 1, 1), max(y - width + 1, 1), max(x - width + 1, 1)


def located_triton(
    point_MD: Tensor, shape: tuple[int, int, int], taps_DW: Tensor, crowd: int = CROWD,
    per_unit: tuple[float, float, float] = (1.0, 1.0, 1.0), by_warps: bool | None = None,
) -> Tiled:  # fmt: skip
    """See `located`; on the device of the points. crowd: how many points make a bin crowded; by_warps: whether these are spread
    by warps.cu (None: if their window is one of `BY_WARPS`)."""
    width, count, device = taps_DW.shape[1], len(point_MD), point_MD.device
    if by_warps is None:
        by_warps = width in BY_WARPS and shape[0] > 1 and point_MD.is_cuda
    tile = tile_for(width, shape[0], by_warps)
    bin_ = bin_for(width, tile)
    bins = tuple(-(-n // b) for n, b in zip(shape, bin_))
    many = prod(bins)
    if max(count, many) >= 2**31:
        raise ValueError(f"{count} points in {many} bins: more than 32-bit numbers count")
    point_MD, cells = point_MD.contiguous(), torch.tensor(per_unit, dtype=torch.float64, device=device)
    packed_3M = torch.empty(3, count, dtype=torch.int32, device=device)
    bin_M, order_M, found_M, before_M = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(4))
    count_N = torch.zeros(many, dtype=torch.int32, device=device)
    walk, sizes = (triton.cdiv(count, BLOCK),), (point_MD.shape[1], count, 0.5 * width, *shape, bins[1], bins[2])
    fixed = {"BIN_Z": bin_[0], "BIN_Y": bin_[1], "BIN_X": bin_[2], "FLAT": shape[0] == 1, "BLOCK": BLOCK}
    if count:
        _count_kernel[walk](point_MD, cells, found_M, before_M, count_N, *sizes, **fixed)
    most = crowd if width <= WIDEST else count + 1
    crowd_N = torch.where(count_N >= most, count_N, 0)
    end_N, sparse_end_N = crowd_N.cumsum(0, dtype=torch.int32), (count_N - crowd_N).cumsum(0, dtype=torch.int32)
    begin_N = torch.where(crowd_N > 0, end_N - crowd_N, end_N[-1] + sparse_end_N - count_N)
    if count:
        _order_kernel[walk](found_M, before_M, begin_N, order_M, count, BLOCK=BLOCK)
        _place_kernel[walk](point_MD, cells, order_M, packed_3M, bin_M, *sizes, **fixed)
    run_T2, crowded = _runs(crowd_N, begin_N, WARP_RUN if by_warps else RUN)
    return Tiled(shape, (0, 0), tile, bins, packed_3M, bin_M, order_M, run_T2, crowded, taps_DW, by_warps)  # type: ignore[arg-type]


def _runs(crowd_N: Tensor, begin_N: Tensor, most: int) -> tuple[Tensor, int]:
    """Runs [T, 2] of bins with these numbers of points: where each begins, how many points it has, at most `most`; and how many
    all have."""
    pieces_N = (crowd_N + (most - 1)) // most
    crowded, runs = torch.stack([crowd_N.sum(), pieces_N.sum()]).tolist()
    which_T = torch.repeat_interleave(pieces_N, output_size=runs)
    piece_T = torch.arange(runs, device=crowd_N.device) - (pieces_N.cumsum(0) - pieces_N)[which_T]
    count_T, pieces_T = crowd_N[which_T].long(), pieces_N[which_T]
    low_T, high_T = count_T * piece_T // pieces_T, count_T * (piece_T + 1) // pieces_T
    return torch.stack([begin_N[which_T] + low_T, high_T - low_T], 1).int(), crowded


@triton.jit
def _axis(point, cells, mask, half, size, BIN: tl.constexpr):
    """Bin and packed word of a coordinate."""
    edge = tl.load(point, mask=mask, other=0.0).to(tl.float64) * tl.load(cells) - half
    first = tl.ceil(edge)
    inside = tl.minimum(((first - edge) * 134217728.0).to(tl.int32), 134217727)  # 2^27
    cell = (first - tl.floor(first / size) * size).to(tl.int32)  # the quotient may be rounded to a whole number next to it
    cell = tl.where(cell < 0, cell + size, tl.where(cell >= size, cell - size, cell))
    return cell // BIN, ((cell % BIN) << WITHIN) | inside


@triton.jit
def _place(
    point, cells, axes, i, mask, half, planes, height, size, bins_y, bins_x,
    BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Bin, and packed words along (x, y, z)."""
    x, word_x = _axis(point + axes * i, cells, mask, half, size, BIN_X)
    y, word_y = _axis(point + axes * i + 1, cells + 1, mask, half, height, BIN_Y)
    if FLAT:
        return y * bins_x + x, word_x, word_y, word_x * 0
    else:
        z, word_z = _axis(point + axes * i + 2, cells + 2, mask, half, planes, BIN_Z)
        return (z * bins_y + y) * bins_x + x, word_x, word_y, word_z


@triton.jit
def _count_kernel(
    point, cells, found, before, counts, axes, count, half, planes, height, size, bins_y, bins_x,
    BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bin of each point, and how many came to it before."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    bin_, _, _, _ = _place(point, cells, axes, i, mask, half, planes, height, size, bins_y, bins_x, BIN_Z, BIN_Y, BIN_X, FLAT)
    tl.store(found + i, bin_, mask=mask)
    tl.store(before + i, tl.atomic_add(counts + bin_, 1, mask=mask, sem="relaxed"), mask=mask)


@triton.jit
def _order_kernel(found, before, begin, order, count, BLOCK: tl.constexpr):
    """The number of each point to where it is visited."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    at = tl.load(begin + tl.load(found + i, mask=mask, other=0), mask=mask, other=0) + tl.load(before + i, mask=mask, other=0)
    tl.store(order + at, i.to(tl.int32), mask=mask)


@triton.jit
def _place_kernel(
    point, cells, order, packed, bins, axes, count, half, planes, height, size, bins_y, bins_x,
    BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Points in the order in which they are visited."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, whole = i < count, count.to(tl.int64)
    j = tl.load(order + i, mask=mask, other=0).to(tl.int64)
    bin_, x, y, z = _place(point, cells, axes, j, mask, half, planes, height, size, bins_y, bins_x, BIN_Z, BIN_Y, BIN_X, FLAT)
    tl.store(packed + i, x, mask=mask)
    tl.store(packed + whole + i, y, mask=mask)
    tl.store(packed + 2 * whole + i, z, mask=mask)
    tl.store(bins + i, bin_, mask=mask)


@triton.jit
def unpacked(word):
    """First cell of the bin, and fraction."""
    return (word >> WITHIN) & 31, (word & 134217727).to(tl.float32) * (1.0 / 134217728) - 0.5
