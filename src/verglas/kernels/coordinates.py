"""Numba helper: the coordinates of stored voxels, plane by plane (torch's repeat takes ten times as long on a CPU)."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.core.rows import RowTable


@numba.njit(cache=True, boundscheck=False)
def _fill(length, low, high, half, out):
    edge = 2 * half + 1
    voxel = 0
    for plane in range(low, high):
        for y in range(edge):
            for x in range(length[plane, y]):
                out[0, voxel], out[1, voxel], out[2, voxel] = x, y - half, plane - half
                voxel += 1


def plane_coordinates_cpu(rows: RowTable, low: int, high: int) -> Tensor:
    """(x, y, z) of the voxels of planes low..high-1 as int32 [3, n]."""
    count = int(rows.length_ZY[low:high].sum())
    out = np.empty((3, count), np.int32)
    _fill(rows.length_ZY.numpy(), low, high, rows.half, out)
    return torch.from_numpy(out)
