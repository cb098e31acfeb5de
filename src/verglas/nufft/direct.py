"""The definition: non-uniform Fourier sums term by term, in float64. For tests and small cases: M N^d operations."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**22


def direct1(point_MD: Tensor, values_BM: Tensor, shape: tuple[int, ...], sign: int = -1) -> Tensor:
    """Type 1: f[b, k] = sum_j c[b, j] exp(sign i k.x_j), complex128 [B, *shape]; see `nufft1`."""
    values = values_BM.to(torch.complex128)
    out = values.new_zeros(len(values), *shape)
    for first in range(0, len(point_MD), _points(shape)):
        part = slice(first, first + _points(shape))
        phases = _phases(point_MD[part], shape, sign)
        rows = "bm,mz,my,mx->bzyx" if len(shape) == 3 else "bm,my,mx->byx"
        out += torch.einsum(rows, values[:, part], *phases)
    return out


def direct2(point_MD: Tensor, modes: Tensor, sign: int = +1) -> Tensor:
    """Type 2: c[b, j] = sum_k f[b, k] exp(sign i k.x_j), complex128 [B, M]; modes [B, *shape]; see `nufft2`."""
    shape = tuple(modes.shape[1:])
    rows = "bzyx,mz,my,mx->bm" if len(shape) == 3 else "byx,my,mx->bm"
    parts = point_MD.split(_points(shape))
    return torch.cat([torch.einsum(rows, modes.to(torch.complex128), *_phases(one, shape, sign)) for one in parts], 1)


def _points(shape: tuple[int, ...]) -> int:
    return max(1, ELEMENTS_AT_ONCE // max(1, int(torch.tensor(shape[-2:]).prod())))


def _phases(point_MD: Tensor, shape: tuple[int, ...], sign: int) -> list[Tensor]:
    """exp(sign i k x) along each axis of `shape`, slowest first; coordinates are (x, y, z)."""
    out = []
    for axis, n in enumerate(shape):
        k = torch.arange(n, dtype=torch.float64, device=point_MD.device) - n // 2
        angle = point_MD[:, len(shape) - 1 - axis].double()[:, None] * k * sign
        out.append(torch.polar(torch.ones_like(angle), angle))
    return out
