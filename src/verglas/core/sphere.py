"""Even points on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def even_directions(n: int, hemisphere: bool = False) -> Tensor:
    """`n` unit vectors (x, y, z) spread evenly by the golden angle over the sphere or its half z > 0, float64 [n, 3]."""
    index = torch.arange(n, dtype=torch.float64) + 0.5
    z = index / n if hemisphere else 1 - 2 * index / n
    longitude = index * (math.pi * (3 - math.sqrt(5)))
    ring = (1 - z * z).sqrt()
    return torch.stack([ring * longitude.cos(), ring * longitude.sin(), z], 1)
