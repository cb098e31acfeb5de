"""Points as the GPU has them: sorted by bins of the grid, each packed into 20 bytes, and crowded bins cut into runs.

A bin is so large that every cell its points touch lies in one tile: tile - (W - 1) cells along each axis. Of each coordinate one
word of 32 bits is kept: which cell of the bin is touched first, 5 bits, and where in a cell the point lies, 27 bits, finer than
single precision. With its bin and its number among the caller's points that makes 20 bytes; cells and fractions (`Places`) take
28. Points are kept in the order in which they are visited, so they are read in order.
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
CROWD = 16  # points of a bin from which a tile costs less than its points one by one (benchmarks/NOTES.md)
RUN = 256  # points of a program at most
BLOCK = 256


@dataclass(frozen=True)
class Tiled:
    """As `Places`, for spread_triton and interpolate_triton.

    shape: (Z, Y, X) of the grid at hand, whose first plane and row are `low` of the whole; tile: cells (z, y, x); bins: how many
    along z, y, x. packed_3M: int32 (x, y, z), the words above; bin_M, order_M: int32, the bin of each and its number among the
    caller's points. The points of crowded bins come first, `crowded` of them; run_T2: int32, where a run of them begins, and how
    many it has, all of one bin.
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

    def __len__(self) -> int:
        return len(self.order_M)

    @property
    def width(self) -> int:
        """Taps along x and y (and z, if the grid is no plane)."""
        return self.taps_DW.shape[1]

    def within(self, low: int, count: int) -> Tiled:
        """As `Places.within`."""
        if self.tile[0] == 1:
            return replace(self, shape=(1, count, self.shape[2]), low=(0, low))
        return replace(self, shape=(count, *self.shape[1:]), low=(low, 0))


def tile_for(width: int, planes: int) -> tuple[int, int, int]:
    """Cells (z, y, x) of a tile for windows of this width."""
    if planes == 1:
        return FLAT
    return SMALL if width <= WIDEST_SMALL else LARGE


def bin_for(width: int, planes: int) -> tuple[int, int, int]:
    """Cells (z, y, x) of a bin."""
    z, y, x = tile_for(width, planes)
    return max(z - width + 1, 1), max(y - width + 1, 1), max(x - width + 1, 1)


def located_triton(point_M3: Tensor, shape: tuple[int, int, int], taps_DW: Tensor, crowd: int = CROWD) -> Tiled:
    """See `located`; on the device of the points. crowd: how many points make a bin crowded."""
    width, count = taps_DW.shape[1], len(point_M3)
    tile, bin_ = tile_for(width, shape[0]), bin_for(width, shape[0])
    bins = tuple(-(-n // b) for n, b in zip(shape, bin_))
    many = prod(bins)
    if max(count, 2 * many) >= 2**31:
        raise ValueError(f"{count} points in {many} bins: more than 32-bit numbers count")
    packed_3M = torch.empty(3, count, dtype=torch.int32, device=point_M3.device)
    bin_M = torch.empty(count, dtype=torch.int32, device=point_M3.device)
    if count:
        _locate_kernel[(triton.cdiv(count, BLOCK),)](
            point_M3.contiguous(), packed_3M, bin_M, count, 0.5 * width, *shape, bins[1], bins[2],
            BIN_Z=bin_[0], BIN_Y=bin_[1], BIN_X=bin_[2], FLAT=shape[0] == 1, BLOCK=BLOCK,
        )  # fmt: skip
    count_N = torch.bincount(bin_M, minlength=many)
    sparse_N = count_N < crowd if width <= WIDEST else torch.ones_like(count_N, dtype=torch.bool)
    bin_M += sparse_N.int().mul_(many)[bin_M]
    bin_M, order_M = bin_M.sort()
    bin_M %= many
    order_M = order_M.int()
    crowd_N = count_N[~sparse_N]
    packed_3M = torch.stack([row.index_select(0, order_M) for row in packed_3M])
    return Tiled(
        shape, (0, 0), tile, bins, packed_3M, bin_M, order_M, _runs(crowd_N), int(crowd_N.sum()), taps_DW  # type: ignore[arg-type]
    )  # fmt: skip


def _runs(count_N: Tensor) -> Tensor:
    """Runs [T, 2] of bins with these numbers of points, one after another: where each begins and how many points it has."""
    pieces_N = -(-count_N // RUN)
    which_T = torch.repeat_interleave(pieces_N)
    piece_T = torch.arange(len(which_T), device=count_N.device) - (pieces_N.cumsum(0) - pieces_N)[which_T]
    count_T, pieces_T, first_T = count_N[which_T], pieces_N[which_T], (count_N.cumsum(0) - count_N)[which_T]
    begin_T, end_T = count_T * piece_T // pieces_T, count_T * (piece_T + 1) // pieces_T
    return torch.stack([first_T + begin_T, end_T - begin_T], 1).int()


@triton.jit
def _axis(point, mask, half, size, BIN: tl.constexpr):
    """Bin and packed word of a coordinate, in cells."""
    edge = tl.load(point, mask=mask, other=0.0) - half
    first = tl.ceil(edge)
    cell = ((first.to(tl.int64) % size + size) % size).to(tl.int32)
    inside = tl.minimum(((first - edge) * 134217728.0).to(tl.int32), 134217727)  # 2^27
    return cell // BIN, ((cell % BIN) << WITHIN) | inside


@triton.jit
def _locate_kernel(
    point, packed, bin_, count, half, planes, height, size, bins_y, bins_x,
    BIN_Z: tl.constexpr, BIN_Y: tl.constexpr, BIN_X: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    x, word = _axis(point + 3 * i, mask, half, size, BIN_X)
    tl.store(packed + i, word, mask=mask)
    y, word = _axis(point + 3 * i + 1, mask, half, height, BIN_Y)
    tl.store(packed + count.to(tl.int64) + i, word, mask=mask)
    if FLAT:
        tl.store(packed + 2 * count.to(tl.int64) + i, 0, mask=mask)
        tl.store(bin_ + i, y * bins_x + x, mask=mask)
    else:
        z, word = _axis(point + 3 * i + 2, mask, half, planes, BIN_Z)
        tl.store(packed + 2 * count.to(tl.int64) + i, word, mask=mask)
        tl.store(bin_ + i, (z * bins_y + y) * bins_x + x, mask=mask)


@triton.jit
def unpacked(word):
    """First cell of the bin, and fraction."""
    return (word >> WITHIN) & 31, (word & 134217727).to(tl.float32) * (1.0 / 134217728) - 0.5
