"""`project` on the CPU: Numba, a slice (or 16,384 of its pixels) per task, float32 or float64.

For a run of pixels, positions are found in a loop that vectorises, then addresses, then the voxels are gathered while
those of later pixels are being fetched: at 128 px the volume does not fit the cache and waiting for it is the cost.
Addresses are unsigned, which spares Numba's test for negative indices.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.positions import AHEAD, FASTMATH, RUN, fetch, find_words, locate

u = np.uintp
TASK = 64 * RUN  # pixels of one task
EVERY = np.arange(RUN, dtype=np.int32)


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _gather(values, address, fraction, sign, unit, real_out, imaginary_out):
    one, two, three = u(1), u(2), u(3)
    for i in range(u(min(AHEAD, len(real_out)))):
        fetch(values, address, i)
    for i in range(u(len(real_out))):
        fetch(values, address, i + u(AHEAD))
        a, b, c, d = u(address[0, i]), u(address[1, i]), u(address[2, i]), u(address[3, i])
        fx, fy, fz, s = fraction[0, i], fraction[1, i], fraction[2, i], sign[i]
        gy, gz = unit - fy, unit - fz
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
        row, column, address = np.empty(RUN, np.int32), np.empty(RUN, np.int32), np.zeros((4, RUN + AHEAD), np.uint32)
        fraction, sign = np.empty((3, RUN), values.dtype), np.empty(RUN, values.dtype)
        for first in range(begin, min(begin + TASK, len(x_K)), RUN):
            last = min(first + RUN, len(x_K))
            locate(sampling[r], x_K[first:last], y_K[first:last], z_K[first:last], half, limit2, row, column, fraction, sign)
            find_words(start, edge, row, column, u(2), EVERY[: last - first], address)
            _gather(values, address, fraction, sign, limit2 / limit2, out[r, 0, first:last], out[r, 1, first:last])


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
