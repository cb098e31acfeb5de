"""Spherical shells of map transforms: sums, means, Fourier shell correlation and what is read off it.

Shell index = round(r); every coefficient of the full transform counts once (a stored half plane counts its partners).
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.fourier import centred_rfft3, shells_of_half_volume, signed_frequencies

NUMBERS_AT_ONCE = 2**22  # of a transform, where it is worked on in parts


def friedel_weight_X(box: int, device: torch.device | str = "cpu") -> Tensor:
    """How many coefficients of the full transform each stored column x stands for: 1 for x = 0 and N/2, else 2."""
    weight = torch.full((box // 2 + 1,), 2.0, device=device, dtype=torch.float64)
    weight[0] = weight[-1] = 1.0
    return weight


def shell_sum(values_ZYX: Tensor, box: int, shells_ZYX: Tensor | None = None) -> Tensor:
    """Sum of a real quantity on the stored half [N, N, N/2+1] over the full transform, float64 [N/2 + 1].

    Shells beyond N/2 (the corners) are left out.
    """
    shells = shells_of_half_volume(box, values_ZYX.device) if shells_ZYX is None else shells_ZYX
    weighted = values_ZYX.double() * friedel_weight_X(box, values_ZYX.device)
    n_shells = box // 2 + 1
    total = weighted.new_zeros(int(shells.max()) + 1)
    return total.index_add_(0, shells.flatten(), weighted.flatten())[:n_shells]


def fsc_of_transforms(a_ZYX: Tensor, b_ZYX: Tensor, shells_ZYX: Tensor | None = None) -> Tensor:
    """Fourier shell correlation of two half transforms [N, N, N/2+1], float64 [N/2+1] (van Heel & Harauz 1986).

    FSC(s) = Re sum F1 conj(F2) / sqrt(sum |F1|^2 sum |F2|^2); 0 where a map has no power.
    """
    box = a_ZYX.shape[0]
    shells = shells_of_half_volume(box, a_ZYX.device) if shells_ZYX is None else shells_ZYX
    cross = shell_sum(a_ZYX.real * b_ZYX.real + a_ZYX.imag * b_ZYX.imag, box, shells)
    power_a = shell_sum(a_ZYX.real**2 + a_ZYX.imag**2, box, shells)
    power_b = shell_sum(b_ZYX.real**2 + b_ZYX.imag**2, box, shells)
    return correlation(cross, power_a, power_b)


def correlation(cross_S: Tensor, power_a_S: Tensor, power_b_S: Tensor) -> Tensor:
    """Cross terms over the root of both powers; 0 where a map has no power."""
    norm_S = (power_a_S * power_b_S).sqrt()
    return torch.where(norm_S > 0, cross_S / norm_S.clamp_min(1e-300), torch.zeros_like(cross_S))


def fsc(map_a_ZYX: Tensor, map_b_ZYX: Tensor) -> Tensor:
    """Fourier shell correlation of two real maps [N, N, N], float64 [N/2+1]; FSC(0) is 1 for maps of one sign."""
    return fsc_of_transforms(centred_rfft3(map_a_ZYX), centred_rfft3(map_b_ZYX))


def fsc_by_planes(a_ZYX: Tensor, b_ZYX: Tensor) -> Tensor:
    """As `fsc_of_transforms`, some planes z at a time; of transforms about any voxel, the same of both."""
    box, device = a_ZYX.shape[0], a_ZYX.device
    axis, x = signed_frequencies(box).to(device).double().square(), torch.arange(box // 2 + 1, device=device).double().square()
    weight_X, sums_3S = friedel_weight_X(box, device), torch.zeros(3, box // 2 + 1, dtype=torch.float64, device=device)
    step = max(1, NUMBERS_AT_ONCE // (box * len(x)))
    for first in range(0, box, step):
        part = slice(first, first + step)
        a, b = a_ZYX[part], b_ZYX[part]
        shell = (axis[part, None, None] + axis[:, None] + x).sqrt_().add_(0.5).long().flatten()
        products = (a.real * b.real + a.imag * b.imag, a.real**2 + a.imag**2, b.real**2 + b.imag**2)
        for sums_S, product in zip(sums_3S, products, strict=True):
            sums_S += torch.bincount(shell, (product.double() * weight_X).flatten(), len(sums_S))[: len(sums_S)]
    return correlation(*sums_3S)


def last_shell_above(fsc_S: Tensor, threshold: float) -> int:
    """Last shell before the curve first drops below `threshold` (shell 0 is not asked); N/2 if it never does."""
    below = (fsc_S[1:] < threshold).nonzero()
    return int(below[0]) if len(below) else len(fsc_S) - 1


def resolution_angstrom(fsc_S: Tensor, box: int, pixel_size: float, threshold: float = 0.143) -> float:
    """Resolution in Å of the last shell before FSC < threshold; box * pixel_size if even shell 1 is below."""
    return box * pixel_size / max(last_shell_above(fsc_S, threshold), 1)
