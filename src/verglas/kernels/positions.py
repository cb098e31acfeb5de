"""Numba helper of the CPU kernels: positions of a run of pixels of one slice, in a loop the compiler can vectorise."""

from __future__ import annotations

import math

import numba
import numpy as np

# Reassociation and contraction only: NaN and infinity keep their meaning.
FASTMATH = {"contract", "arcp", "nsz", "reassoc"}
RUN = 256  # pixels handled at a time: the scratch arrays stay in the first-level cache


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def locate(sampling, x_K, y_K, z_K, half, limit2, row, column, fraction, sign):
    """Fill row (address in the row table), column (x), fraction [3, RUN] and sign of each pixel of a run.

    sign is +1, -1 where the position was turned into the stored half, and 0 beyond the radius (addressed at the origin).
    """
    edge = np.int32(2 * half + 1)
    shift = np.int32(half)
    one = limit2 / limit2  # 1 in the precision of the volume
    for i in range(len(x_K)):
        px = sampling[0, 0] * x_K[i] + sampling[0, 1] * y_K[i] + sampling[0, 2] * z_K[i]
        py = sampling[1, 0] * x_K[i] + sampling[1, 1] * y_K[i] + sampling[1, 2] * z_K[i]
        pz = sampling[2, 0] * x_K[i] + sampling[2, 1] * y_K[i] + sampling[2, 2] * z_K[i]
        s = one if px >= 0 else -one
        s = s if px * px + py * py + pz * pz <= limit2 else one - one
        px, py, pz = px * s, py * s, pz * s
        fy, fz = math.floor(py), math.floor(pz)
        x0 = np.int32(px)
        column[i] = x0
        row[i] = (np.int32(fz) + shift) * edge + np.int32(fy) + shift
        fraction[0, i], fraction[1, i], fraction[2, i] = px - x0, py - fy, pz - fz
        sign[i] = s
