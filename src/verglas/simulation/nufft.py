"""Exact transforms of point atoms: type-1 non-uniform Fourier sums, in two and three dimensions.

F(k) = (1/n) sum_j w_j exp(-2 pi i k . x_j / L), the transform of verglas.core.fourier (forward 1/n, phases about the
centre), with x_j in Å from the centre, L = box * pixel size and integer k. Every image has points of its own: finufft does
images one by one on the CPU, `spread_transform` all at once on any device.
The Nyquist row and column are set to zero: with N even their phase is ambiguous.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import signed_frequencies
from verglas.kernels import choose
from verglas.kernels.spread import located, spread
from verglas.nufft import Plan
from verglas.nufft.fine import FineGrid

TOLERANCE = 1e-5
_ELEMENTS_AT_ONCE = 1 << 25
_PLANES_AT_ONCE = 8
_ELEMENTS_OF_POINT = 16  # 4 bytes each: place, order, value, and what is needed to find them


def atom_transforms(xy_BN2: Tensor, weight_N: Tensor, box: int, pixel_size: float, threads: int = 1) -> Tensor:
    """Transforms of projected atoms [B, box, box/2+1] complex64; xy in Å from the centre, on the device of `xy_BN2`."""
    if xy_BN2.device.type == "cpu":
        return _finufft_images(xy_BN2, weight_N, box, pixel_size, threads)
    chunk = max(1, _ELEMENTS_AT_ONCE // max(xy_BN2.shape[1] * _ELEMENTS_OF_POINT, 8 * box * box))
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


def spread_transform(
    xy_BN2: Tensor, weight_N: Tensor, box: int, pixel_size: float, implementation: str = "auto"
) -> Tensor:  # fmt: skip
    """The same as `atom_transforms` by spreading, all images at once; complex64 [B, box, box/2+1].

    The images' grids lie one below the other, with room between them for what goes over their ends.
    """
    images, device = len(xy_BN2), xy_BN2.device
    fine = FineGrid.of((box, box), TOLERANCE, 2.0, device, torch.float32)
    rows, columns = fine.sizes
    shift, room = (fine.window.width + 1) // 2, fine.window.width + 1
    point_BN3 = torch.zeros(*xy_BN2.shape[:2], 3, dtype=torch.float64, device=device)
    point_BN3[..., :2] = xy_BN2.double() * (rows / (box * pixel_size))
    top_B1 = torch.arange(images, device=device)[:, None] * (rows + room)
    point_BN3[..., 1] = point_BN3[..., 1] % rows + top_B1 + shift
    name = choose(device, torch.float32, implementation).name
    places = located(point_BN3.view(-1, 3), (1, images * (rows + room), columns), fine.taps(), name)
    values_1M2 = torch.zeros(1, len(places), 2, device=device)
    values_1M2[0, :, 0] = (weight_N.float() / box**2).repeat(images)
    grid = torch.zeros(1, 1, images * (rows + room), columns, 2, device=device)
    spread(grid, places, values_1M2, name)
    grid = grid.view(images, 1, rows + room, columns, 2)
    grid[:, :, :room] += grid[:, :, rows:]
    return _half(fine.modes(grid[:, :, :rows].roll(-shift, 2), -1), (1,))


def atom_map(xyz_N3: Tensor, weight_N: Tensor, box: int, pixel_size: float, bfactor: float = 0.0) -> Tensor:
    """The sums of atoms in space [Z, Y, X], float32 on the CPU, damped by exp(-B s^2 / 4).

    Planes of k_x one after another, each a sum in two dimensions with phases of x in the weights: beside the map there is half a
    transform, and no finer grid in three dimensions.
    """
    point_N3 = xyz_N3.double().cpu() * (2 * math.pi / (box * pixel_size))
    k_K = signed_frequencies(box).double()
    factor_K = torch.exp(-bfactor / 4 * (k_K / (box * pixel_size)).square()) * (1 - 2 * (k_K % 2))  # the origin in the centre
    factor_K[box // 2] = 0
    plan = Plan(point_N3[:, 1:], (box, box), TOLERANCE, 2.0, torch.complex128, "finufft")
    half_ZYX = torch.zeros(box, box, box // 2 + 1, dtype=torch.complex64)
    for part in torch.arange(box // 2).split(_PLANES_AT_ONCE):
        weight_KN = torch.polar(weight_N.double().cpu() / box**3 * factor_K[part, None], -k_K[part, None] * point_N3[:, 0])
        modes_KZY = torch.fft.ifftshift(plan.type1(weight_KN, -1), dim=(1, 2)) * factor_K[:, None] * factor_K
        half_ZYX[:, :, part[0] : part[-1] + 1] = torch.fft.ifft2(modes_KZY, norm="forward").permute(1, 2, 0)
    return torch.cat([torch.fft.irfft(slab, n=box, norm="forward") for slab in half_ZYX.split(_PLANES_AT_ONCE)])


def _half(modes: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The stored half [..., box, box/2+1] complex64, without Nyquist, of ascending modes; `axes` get the order of FFTs."""
    box = modes.shape[-1]
    half = torch.fft.ifftshift(modes[..., box // 2 :].to(torch.complex64), dim=axes)
    return _without_nyquist(torch.nn.functional.pad(half, (0, box // 2 + 1 - half.shape[-1])))


def _without_nyquist(fourier: Tensor) -> Tensor:
    box = fourier.shape[-2]
    fourier[..., box // 2, :] = 0
    fourier[..., :, box // 2] = 0
    return fourier
