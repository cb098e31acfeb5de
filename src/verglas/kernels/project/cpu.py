"""`project` on the CPU: Numba, a slice (or 16,384 of its pixels) per task, float32 or float64.

Positions are found for a run of pixels in a loop that vectorises; the gathers follow in a second loop. Addresses are
unsigned, which spares Numba's test for negative indices.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.positions import FASTMATH, RUN, locate

u = np.uintp
TASK = 64 * RUN  # pixels of one task


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _gather(values, start, edge, row, column, fraction, sign, real_out, imaginary_out):
    one, two, three = u(1), u(2), u(3)
    for i in range(u(len(real_out))):
        r, x = u(row[i]), u(column[i])
        a = (u(start[r]) + x) << one
        b = (u(start[r + one]) + x) << one
        c = (u(start[r + edge]) + x) << one
        d = (u(start[r + edge + one]) + x) << one
        fx, fy, fz, s = fraction[0, i], fraction[1, i], fraction[2, i], sign[i]
        gy, gz = 1 - fy, 1 - fz
        wa, wb, wc, wd = gy * gz, fy * gz, gy * fz, fy * fz
        re0 = wa * values[a] + wb * values[b] + wc * values[c] + wd * values[d]
        im0 = wa * values[a + one] + wb * values[b + one] + wc * values[c + one] + wd * values[d + one]
        re1 = wa * values[a + two] + wb * values[b + two] + wc * values[c + two] + wd * values[d + two]
        im1 = wa * values[a + three] + wb * values[b + three] + wc * values[c + three] + wd * values[d + three]
        real_out[i] = (re0 + fx * (re1 - re0)) * abs(s)  # s = 0 beyond the radius
        imaginary_out[i] = (im0 + fx * (im1 - im0)) * s


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _project(values, start, half, limit2, sampling, x_K, y_K, z_K, out):
    edge = u(2 * half + 1)
    tasks_each = (len(x_K) + TASK - 1) // TASK
    for task in numba.prange(len(sampling) * tasks_each):
        r, begin = task // tasks_each, (task % tasks_each) * TASK
        row, column = np.empty(RUN, np.int32), np.empty(RUN, np.int32)
        fraction, sign = np.empty((3, RUN), values.dtype), np.empty(RUN, values.dtype)
        for first in range(begin, min(begin + TASK, len(x_K)), RUN):
            last = min(first + RUN, len(x_K))
            locate(sampling[r], x_K[first:last], y_K[first:last], z_K[first:last], half, limit2, row, column, fraction, sign)
            _gather(values, start, edge, row, column, fraction, sign, out[r, 0, first:last], out[r, 1, first:last])


def project_cpu(values_V2: Tensor, rows: RowTable, sampling_R33: Tensor, coordinates_K3: Tensor) -> Tensor:
    """See `project_reference`; runs on the threads Numba is given."""
    dtype = values_V2.dtype
    scalar = np.float64 if dtype == torch.float64 else np.float32
    out_R2K = torch.empty(len(sampling_R33), 2, len(coordinates_K3), dtype=dtype)
    x_K, y_K, z_K = coordinates_K3.to(dtype).T.contiguous().numpy()
    _project(
        values_V2.detach().contiguous().view(-1).numpy(), rows.start_ZY.view(-1).numpy(), rows.half,
        scalar(rows.limit2), sampling_R33.to(dtype).contiguous().numpy(), x_K, y_K, z_K, out_R2K.numpy(),
    )  # fmt: skip
    return out_R2K
