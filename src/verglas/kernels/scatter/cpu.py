"""`scatter` on the CPU: Numba. A thread owns rows of the object, or of the light; positions come in their order."""

from __future__ import annotations

import numba
import torch
from torch import Tensor


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _to_object(wave, corner, light, image):
    own = light.shape[0] > 1
    for y in numba.prange(image.shape[1]):
        for b in range(len(corner)):
            row, left = y - corner[b, 0], corner[b, 1]
            if row < 0 or row >= wave.shape[3]:
                continue
            own_light = light[b] if own else light[0]
            for o in range(wave.shape[1]):
                for m in range(wave.shape[2]):
                    lit, part = own_light[m, row], wave[b, o, m, row]
                    for column in range(wave.shape[4]):
                        image[o, y, left + column] += lit[column].conjugate() * part[column]


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _to_light(wave, corner, seen, light):
    own = light.shape[0] > 1
    for row in numba.prange(wave.shape[3]):
        for b in range(len(corner)):
            top, left = corner[b, 0], corner[b, 1]
            own_light = light[b] if own else light[0]
            for o in range(wave.shape[1]):
                for m in range(wave.shape[2]):
                    passed, part, into = seen[o, top + row], wave[b, o, m, row], own_light[m, row]
                    for column in range(wave.shape[4]):
                        into[column] += passed[left + column].conjugate() * part[column]


def scatter_cpu(
    exit_BOMYX: Tensor, corner_B2: Tensor, seen_OYX: Tensor, light_BMYX: Tensor, object_OYX: Tensor | None
) -> Tensor:
    """See README.md; complex64 or complex128, the object contiguous."""
    given = (exit_BOMYX, corner_B2, seen_OYX, light_BMYX)
    wave, corner, seen, light = (one.resolve_conj().contiguous().numpy() for one in given)
    if object_OYX is not None:
        _to_object(wave, corner, light, object_OYX.numpy())
    out = torch.zeros_like(light_BMYX, memory_format=torch.contiguous_format)
    _to_light(wave, corner, seen, out.numpy())
    return out
