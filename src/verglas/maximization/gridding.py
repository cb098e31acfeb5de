"""Exact gridding: weights that make the sampling even after convolution with a small blob.

Where voxels are seen unevenly, data / weight is not yet the best map, since a slice adds to its neighbours, too. RELION's path
without --skip_gridding iterates, from v = 1 within the radius (facts 4.6; Pipe & Menon 1999, Magn. Reson. Med. 41, 179):

    v <- v / |C * (v w)|      w: weights (with the prior), C: a Kaiser-Bessel blob of order 0, alpha 15, unit sum,
                              radius 1.9 voxels of the unpadded transform

and the map is made of v times the data. Since w stays the same, that is u <- u / |C * u| for u = v w, from u = w on: one array is
kept, and what data is divided by in the end is 1 / v = w / u. The convolution is a product in real space with the blob's
transform,

    K(r) = f(sigma) / f(alpha),   sigma² = alpha² - (2 pi a r)²,   f(s) = (cosh s - sinh(s) / s) / s²

a: radius, r: cycles per voxel (Lewitt 1990, J. Opt. Soc. Am. A 7, 1834; in three dimensions of Bessel functions of order 3/2).
RELION convolves on a grid of 2 R + 3, R the radius in voxels, but reads K at r = n / P, P the padded size, from a table that ends
at 1/2. So do we, on any grid of at least that size: maps agree to two thousandths, which is what the two grids differ by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.distributed.ranks import ALONE, Ranks
from verglas.kernels.fold import RadialTable
from verglas.kernels.fold.residue import Residues, served
from verglas.maximization.stride import StrideConvolution, beside, strides_for
from verglas.nufft.fine import smooth_size

ITERATIONS = 10
BLOB_RADIUS, BLOB_ALPHA = 1.9, 15.0  # radius in voxels of the unpadded transform
SMALLEST, LARGEST = 1e-6, 1e20  # of |C * u|, and of v
SAMPLES = 4096  # of the table of K over 0 .. 1/2; linear between: off by 1e-7


def even_out(
    product_V: Tensor, rows: RowTable, size: int, padding: float, iterations: int = ITERATIONS, ranks: Ranks = ALONE,
    granted: float | None = None,
) -> None:  # fmt: skip
    """Make v w of w, in place. size: P, of the padded transform; granted: bytes that transforms may take (`strides_for`).

    product_V: [V] float32 or float64, w, and 0 at and beyond the radius of `rows`, where it stays 0.
    """
    grid, least = grid_for(rows.radius), least_grid(rows.radius)
    strides, _ = residues_of(rows, product_V.element_size(), ranks.size, granted)
    convolution = StrideConvolution(rows, grid, blob_factor(padding, product_V, least / size), strides, ranks)
    for _ in range(iterations):
        convolution.quotients(product_V, SMALLEST)


def residues_of(rows: RowTable, element_bytes: int, ranks: int, granted: float | None) -> tuple[int, Residues | None]:
    """(strides, what works on their residues where a GPU does, compiled)."""
    grid = grid_for(rows.radius)
    strides = strides_for(grid, element_bytes, ranks, granted, fused=True, result=element_bytes * rows.count)
    like = torch.empty(0, device=rows.device, dtype=torch.float32 if element_bytes == 4 else torch.float64)
    way = served(rows, grid // strides, grid, like)
    return (strides_for(grid, element_bytes, ranks, granted) if way is None else strides), way


def memory(voxels: int, radius: float, element_bytes: int = 4, granted: float | None = None) -> float:
    """Bytes that `even_out` takes at most on a GPU beside `product_V`: what was convolved, and the transforms of one residue."""
    grid = grid_for(radius)
    strides = strides_for(grid, element_bytes, 1, granted, fused=True, result=voxels * element_bytes)
    return beside(voxels, grid, strides, element_bytes)


def least_grid(radius: float) -> int:
    """What RELION convolves on."""
    return 2 * int(radius) + 3


def grid_for(radius: float) -> int:
    """Size of the transforms: the next one that is quick."""
    return smooth_size(least_grid(radius), (2, 3, 5, 7))


def blob_transform(r: Tensor, padding: float) -> Tensor:
    """K(r), 1 at r = 0, in float64; r in cycles per voxel of the padded transform."""
    reach = (2 * torch.pi * BLOB_RADIUS * padding) * r.double()
    square = BLOB_ALPHA**2 - reach.square()
    s = square.abs().sqrt().clamp_min(1e-3)  # near 0 both forms are 1/3 + s²/30 or less: off by 3e-8 of that
    inside = (torch.cosh(s) - torch.sinh(s) / s) / s.square()
    beyond = (torch.sin(s) / s - torch.cos(s)) / s.square()
    alpha = torch.tensor(BLOB_ALPHA, dtype=torch.float64)
    return torch.where(square >= 0, inside, beyond) / ((torch.cosh(alpha) - torch.sinh(alpha) / alpha) / alpha**2)


def blob_factor(padding: float, like: Tensor, stretch: float = 1.0) -> RadialTable:
    """K(stretch r) as a function of r, 0 where stretch r > 1/2; in the precision of `like` and on its device."""
    step = 0.5 / (SAMPLES - 2)
    table = blob_transform(torch.arange(SAMPLES, dtype=torch.float64, device=like.device) * step, padding).to(like)
    table[-2:] = 0
    return RadialTable(table, step / stretch)
