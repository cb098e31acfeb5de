"""`gather` on the CPU: Numba, a row at a time."""

from __future__ import annotations

import numba
import torch
from torch import Tensor


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _gather(image, corner, light, out):
    own = light.shape[0] > 1
    for b in numba.prange(len(corner)):
        top, left = corner[b, 0], corner[b, 1]
        own_light = light[b] if own else light[0]
        for o in range(out.shape[1]):
            for m in range(out.shape[2]):
                for row in range(out.shape[3]):
                    seen, lit, into = image[o, top + row], own_light[m, row], out[b, o, m, row]
                    for column in range(out.shape[4]):
                        into[column] = seen[left + column] * lit[column]


def gather_cpu(object_OYX: Tensor, corner_B2: Tensor, light_BMYX: Tensor) -> Tensor:
    """See README.md; complex64 or complex128."""
    shape = (len(corner_B2), len(object_OYX), *light_BMYX.shape[1:])
    out = torch.empty(shape, dtype=object_OYX.dtype)
    image, corner, light = (one.resolve_conj().contiguous().numpy() for one in (object_OYX, corner_B2, light_BMYX))
    _gather(image, corner, light, out.numpy())
    return out
