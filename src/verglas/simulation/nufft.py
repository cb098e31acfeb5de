"""Exact transforms of point atoms: type-1 non-uniform Fourier sums, in two and three dimensions.

F(k) = (1/n) sum_j w_j exp(-2 pi i k . x_j / L), the transform of verglas.core.fourier (forward 1/n, phases about the
centre), with x_j in Å from the centre, L = box * pixel size and integer k. finufft does it on the CPU. `spread_transform`
is plain torch for any device: spread on a grid twice as fine with the kernel exp(beta (sqrt(1 - z^2) - 1)), FFT, divide
by the transform of the kernel (Barnett, Magland & af Klinteberg 2019, SIAM J. Sci. Comput. 41, C479).
The Nyquist row and column are set to zero: with N even their phase is ambiguous.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

WIDTH = 7  # cells of the fine grid that one atom touches along an axis; error about 1e-6
BETA = 2.30 * WIDTH
TOLERANCE = 1e-5
_ELEMENTS_AT_ONCE = 1 << 25


def atom_transforms(xy_BN2: Tensor, weight_N: Tensor, box: int, pixel_size: float, threads: int = 1) -> Tensor:
    """Transforms of projected atoms [B, box, box/2+1] complex64; xy in Å from the centre, on the device of `xy_BN2`."""
    if xy_BN2.device.type == "cpu":
        return _finufft_images(xy_BN2, weight_N, box, pixel_size, threads)
    chunk = max(1, _ELEMENTS_AT_ONCE // max(xy_BN2.shape[1] * WIDTH, 4 * box * box))
    parts = [spread_transform(part, weight_N, box, pixel_size) for part in xy_BN2.split(chunk)]
    return torch.cat(parts)


def _finufft_images(xy_BN2: Tensor, weight_N: Tensor, box: int, pixel_size: float, threads: int) -> Tensor:
    import finufft

    radians_BN2 = (xy_BN2.double() * (2 * math.pi / (box * pixel_size))).float().numpy()
    strength_N = (weight_N.double() / box**2).numpy().astype(np.complex64)

    def one(row: int) -> np.ndarray:
        x, y = np.ascontiguousarray(radians_BN2[row, :, 0]), np.ascontiguousarray(radians_BN2[row, :, 1])
        modes = finufft.nufft2d1(y, x, strength_N, (box, box), eps=TOLERANCE, isign=-1, modeord=1, nthreads=1)
        return modes[:, : box // 2 + 1]

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        images = list(pool.map(one, range(len(radians_BN2))))
    return _without_nyquist(torch.from_numpy(np.stack(images)))


def spread_transform(xy_BN2: Tensor, weight_N: Tensor, box: int, pixel_size: float) -> Tensor:
    """The same as `atom_transforms` by spreading in torch, all images at once; complex64 [B, box, box/2+1]."""
    fine = 2 * box
    n_images = len(xy_BN2)
    cell_BN2 = xy_BN2.float() * (2 / pixel_size)
    first_BN2 = torch.ceil(cell_BN2 - WIDTH / 2)
    taps = torch.arange(WIDTH, device=xy_BN2.device)
    weight_BN2W = kernel(first_BN2[..., None] + taps - cell_BN2[..., None])
    index_BN2W = (first_BN2[..., None].long() + taps) % fine
    image = torch.arange(n_images, device=xy_BN2.device)[:, None, None] * fine**2
    grid = torch.zeros(n_images * fine**2, device=xy_BN2.device)
    row_weight_BNW = weight_BN2W[:, :, 0] * weight_N.float()[:, None]
    for tap in range(WIDTH):
        index = image + index_BN2W[:, :, 1, tap, None] * fine + index_BN2W[:, :, 0]
        grid.index_add_(0, index.flatten(), (row_weight_BNW * weight_BN2W[:, :, 1, tap, None]).flatten())
    fourier = torch.fft.rfft2(grid.view(n_images, fine, fine))[..., : box // 2 + 1]
    fourier = torch.cat([fourier[:, : box // 2], fourier[:, fine - box // 2 :]], 1)
    correction = kernel_transform(box).to(xy_BN2.device)
    fourier = fourier / (box**2 * correction[:, None] * correction[None, : box // 2 + 1])
    return _without_nyquist(fourier)


def kernel(distance: Tensor) -> Tensor:
    """exp(beta (sqrt(1 - z^2) - 1)) with z = 2 distance / WIDTH, 0 outside |z| < 1; distance in cells of the fine grid."""
    inside = 1 - (distance * (2 / WIDTH)).square()
    return torch.where(inside > 0, torch.exp(BETA * (inside.clamp_min(0).sqrt() - 1)), torch.zeros_like(inside))


@lru_cache(maxsize=8)
def kernel_transform(box: int) -> Tensor:
    """Fourier transform of `kernel` at the `box` frequencies in FFT order, cells of a 2 box grid; float32 [box]."""
    node_Q, weight_Q = np.polynomial.legendre.leggauss(200)
    position_Q = torch.from_numpy(node_Q) * WIDTH / 2
    value_Q = kernel(position_Q) * torch.from_numpy(weight_Q) * WIDTH / 2
    frequency_K = torch.fft.fftfreq(box, dtype=torch.float64) / 2
    return (value_Q * torch.cos(2 * math.pi * frequency_K[:, None] * position_Q)).sum(1).float()


def atom_volume_transform(xyz_N3: Tensor, weight_N: Tensor, box: int, pixel_size: float) -> Tensor:
    """Transform of an atom model in three dimensions, forward 1/box^3, complex64 [Z, Y, X/2+1] on the CPU."""
    import finufft

    radians_3N = (xyz_N3.double() * (2 * math.pi / (box * pixel_size))).T.contiguous().cpu().numpy()
    strength_N = (weight_N.double() / box**3).cpu().numpy().astype(np.complex128)
    # The smaller oversampling keeps a 360 px volume near 2 GB and still reaches the tolerance.
    modes_ZYX = finufft.nufft3d1(radians_3N[2], radians_3N[1], radians_3N[0], strength_N, (box, box, box), eps=TOLERANCE,
                                 isign=-1, modeord=1, upsampfac=1.25)  # fmt: skip
    half_ZYX = torch.from_numpy(modes_ZYX[:, :, : box // 2 + 1].astype(np.complex64))
    half_ZYX[box // 2] = 0
    return _without_nyquist(half_ZYX)


def _without_nyquist(fourier: Tensor) -> Tensor:
    box = fourier.shape[-2]
    fourier[..., box // 2, :] = 0
    fourier[..., :, box // 2] = 0
    return fourier
