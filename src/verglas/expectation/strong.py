"""The strongest Fourier coefficients in single precision, beside operands of half precision.

Scores are sums over coefficients, so any of them may be left out of the half-precision product and added in single precision.
Half operands are off by 2e-4 of themselves (root mean square). Rounded slices are off by the same reference whatever the
shift, but shifted images are rounded anew for each shift, which puts an error of

    2e-4 sqrt(sum_k <s_k (s_k + 1)>),      s_k = C^2 |P|^2 / sigma^2

into the differences between scores (s_k from rounded images, 1 from rounded slices against the noise; means over particles and
orientations: CTFs oscillate and slices differ, <s_k^2> is several times <s_k>^2). A few strong coefficients carry most of it; as
many are taken out as it takes to bring it below what is tolerated; mostly that is none. Their slices are cut from voxels in
single precision: those of the half-precision volume are rounded, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.fourier import PixelList
from verglas.expectation.classes import ClassGrid
from verglas.expectation.slices import FineSlices, Slicer
from verglas.kernels.blocks import Blocks
from verglas.kernels.shift import shift

HALF_ERROR = 2.1e-4  # root mean square of float16 rounding, relative
TOLERATED = 0.0075  # root mean square of a score's error, nats; the largest of many is some six times that
STRONG_POWER = 3000.0  # sum of s_k above which more is tolerated, as its square root: fewer samples are then near the best
PROBED = 64  # orientations whose mean power is taken


class Strong:
    """Coefficients that are compared in single precision. index_K: which, ascending; weak_K: 0 there, 1 elsewhere.

    coarse_count: how many of them lie in the coarse disc (they come first). coarse_slicer, fine: their slices.
    """

    def __init__(self, index_K: Tensor, full: Slicer, pixels: PixelList, count: int, grid: ClassGrid, whole: bool) -> None:
        self.index_K, self.pixels = index_K, pixels
        self.coarse_count = int((index_K < count).sum())
        self.weak_K = torch.ones(pixels.count, dtype=torch.float32, device=index_K.device).index_fill_(0, index_K, 0)
        inside_K = index_K[: self.coarse_count]
        self.coarse_slicer, self.fine = full.at(inside_K, torch.float32), FineSlices(full.at(index_K, torch.float32), grid, whole)
        self.coarse_OK: Tensor | None = None

    def shifted(
        self, image_B2K: Tensor, shift_T2: Tensor, count: int | None = None, lists: Blocks | None = None
    ) -> Tensor:
        """Copies [B, T, 2, K'] of the first `count` strong coefficients shifted by pixels, single precision; with lists,
        [M, 2, K'] of the shifts `shift_M` of each particle."""
        index_K = self.index_K[:count]
        x_K, y_K = self.pixels.x_K[index_K], self.pixels.y_K[index_K]
        return shift(image_B2K[..., index_K].contiguous(), shift_T2, x_K, y_K, self.pixels.box, lists=lists)


def find_strong(
    weight_BK: Tensor, full: Slicer, pixels: PixelList, count: int, grid: ClassGrid, whole: bool
) -> Strong | None:
    """The coefficients to take out for images of these weights; None if half precision will do for all.

    count: coefficients of the coarse disc; whole: whether fine slices of the whole grid are kept.
    """
    every = max(1, grid.count // PROBED)
    slices_R2K = full.coarse(grid, torch.arange(0, grid.count, every)[:PROBED]).float()
    power_RK, weight_BK = slices_R2K.square().sum(1).double(), weight_BK.double()
    power_K = power_RK.mean(0) * weight_BK.mean(0)
    square_K = power_RK.square().mean(0) * weight_BK.square().mean(0)
    index_K = strongest(power_K, square_K, count)
    return Strong(index_K, full, pixels, count, grid, whole) if len(index_K) else None


def strongest(power_K: Tensor, square_K: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the fewest coefficients without which the error of half precision is tolerated.

    power_K, square_K: means of s_k and of s_k^2 over particles and orientations, float64. Of those inside the coarse disc (the
    first `count`) and outside, whole multiples of 8 each: aligned rows on a GPU.
    """
    error2_K, order_K = (HALF_ERROR**2 * (square_K + power_K)).sort(descending=True)
    left_K = error2_K.flip(0).cumsum(0).flip(0)  # error if those before are taken out
    tolerated = TOLERATED * max(1.0, float(power_K.sum()) / STRONG_POWER) ** 0.5
    needed_K = order_K[: int((left_K > tolerated**2).sum())]
    inside_K, outside_K = order_K[order_K < count], order_K[order_K >= count]
    n_inside = int((needed_K < count).sum())
    taken = [inside_K[: -(-n_inside // 8) * 8], outside_K[: -(-(len(needed_K) - n_inside) // 8) * 8]]
    return torch.cat(taken).sort().values
