"""`patches` on the CPU: Numba, rows copied as they lie."""

from __future__ import annotations

import numba
import torch
from torch import Tensor


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _patches(image, corner, out):
    for b in numba.prange(len(corner)):
        y, x = corner[b, 0], corner[b, 1]
        for plane in range(image.shape[0]):
            for row in range(out.shape[2]):
                out[b, plane, row] = image[plane, y + row, x : x + out.shape[3]]


def patches_cpu(object_OLYX: Tensor, corner_B2: Tensor, shape: tuple[int, int]) -> Tensor:
    """See README.md; complex64 or complex128."""
    planes = object_OLYX.shape[:2]
    out = torch.empty(len(corner_B2), planes[0] * planes[1], *shape, dtype=object_OLYX.dtype)
    _patches(object_OLYX.contiguous().flatten(0, 1).numpy(), corner_B2.contiguous().numpy(), out.numpy())
    return out.unflatten(1, planes)
