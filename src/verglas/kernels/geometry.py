"""Where a slice meets the packed volume: shared by the plain references of `project` and `backproject`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from verglas.core.rows import RowTable


def sample_positions(sampling_R33: Tensor, coordinates_K3: Tensor) -> tuple[Tensor, Tensor]:
    """Positions p = S k in the stored half x >= 0, and the sign of the imaginary part there (-1 where p was turned).

    Returns p [R, K, 3] in voxels and sign [R, K] (F(-p) = conj F(p): Friedel).
    """
    position_RK3 = torch.einsum("rij,kj->rki", sampling_R33, coordinates_K3)
    sign_RK = torch.where(position_RK3[..., 0] < 0, -1.0, 1.0).to(position_RK3.dtype)
    return position_RK3 * sign_RK[..., None], sign_RK


def trilinear_corners(position_RK3: Tensor, rows: RowTable) -> Iterator[tuple[Tensor, Tensor]]:
    """The eight (address [R, K] int64, weight [R, K]) around each position; weight 0 beyond `rows.limit2`."""
    inside_RK = position_RK3.square().sum(-1) <= rows.limit2
    safe_RK3 = torch.where(inside_RK[..., None], position_RK3, torch.zeros_like(position_RK3))
    floor_RK3 = safe_RK3.floor()
    fraction_RK3 = safe_RK3 - floor_RK3
    x, y, z = floor_RK3.long().unbind(-1)
    for dz in (0, 1):
        for dy in (0, 1):
            start_RK = rows.start_ZY[z + dz + rows.half, y + dy + rows.half].long() + x
            for dx in (0, 1):
                weight_RK = inside_RK.to(position_RK3.dtype)
                for axis, step in enumerate((dx, dy, dz)):
                    fraction = fraction_RK3[..., axis]
                    weight_RK = weight_RK * (fraction if step else 1 - fraction)
                yield start_RK + dx, weight_RK
