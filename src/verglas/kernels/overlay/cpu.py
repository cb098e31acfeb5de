"""`overlay` on the CPU: Numba. A thread owns rows of the object; windows are added in their order, whatever the threads."""

from __future__ import annotations

import numba
from torch import Tensor


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _overlay(patch, corner, image):
    rows, columns = patch.shape[2], patch.shape[3]
    for y in numba.prange(image.shape[1]):
        for b in range(len(corner)):
            row, x = y - corner[b, 0], corner[b, 1]
            if row < 0 or row >= rows:
                continue
            for plane in range(image.shape[0]):
                image[plane, y, x : x + columns] += patch[b, plane, row]


def overlay_cpu(patch_BOLYX: Tensor, corner_B2: Tensor, object_OLYX: Tensor) -> Tensor:
    """See README.md; complex64 or complex128, contiguous."""
    _overlay(patch_BOLYX.contiguous().flatten(1, 2).numpy(), corner_B2.contiguous().numpy(), object_OLYX.flatten(0, 1).numpy())
    return object_OLYX
