"""`project` on the CPU: Numba, a slice (or 16,384 of its pixels) per task, float32 or float64.

For a run of pixels, positions are found in a loop that vectorises, then addresses, then the voxels are gathered while
those of later pixels are being fetched: at 128 px the volume does not fit the cache and waiting for it is the cost.
Addresses are unsigned, which spares Numba's test for negative indices.

A volume that is sliced again and again is copied once into columns: each voxel with its neighbours along y, z and both, so
that a sample reads one run of 16 numbers instead of one of four numbers in each of four rows.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from verglas.core.layers import LayerTable
from verglas.core.rows import RowTable
from verglas.kernels.positions import AHEAD, FASTMATH, RUN, fetch, find_words, locate, prefetch

u = np.uintp
TASK = 64 * RUN  # pixels of one task
EVERY = np.arange(RUN, dtype=np.int32)
LARGEST = 5_000_000  # voxels of a volume that is copied into columns: 128 px padded to 256, 150 MB
_COLUMNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of volumes in use: (version of the tensor, columns or None)


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _gather(values, address, fraction, sign, unit, factor, real_out, imaginary_out):
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
        real_out[i] = (re0 + fx * (re1 - re0)) * (factor[i] * abs(s))  # s = 0 beyond the radius
        imaginary_out[i] = (im0 + fx * (im1 - im0)) * (factor[i] * s)


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _project(values, start, half, limit2, sampling, x_K, y_K, z_K, factor_K, out):
    edge = u(2 * half + 1)
    tasks_each = (len(x_K) + TASK - 1) // TASK
    for task in numba.prange(len(sampling) * tasks_each):
        r, begin = task // tasks_each, (task % tasks_each) * TASK
        row, column, address = np.empty(RUN, np.int32), np.empty(RUN, np.int32), np.zeros((4, RUN + AHEAD), u)
        fraction, sign = np.empty((3, RUN), values.dtype), np.empty(RUN, values.dtype)
        for first in range(begin, min(begin + TASK, len(x_K)), RUN):
            last = min(first + RUN, len(x_K))
            locate(sampling[r], x_K[first:last], y_K[first:last], z_K[first:last], half, limit2, row, column, fraction, sign)
            find_words(start, edge, row, column, u(2), EVERY[: last - first], address)
            real, imaginary = out[r, 0, first:last], out[r, 1, first:last]
            _gather(values, address, fraction, sign, limit2 / limit2, factor_K[first:last], real, imaginary)


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _fill_columns(values, start, length, out):
    """out [V, 8]: real parts of a voxel and of its neighbours at y + 1, z + 1 and both, then imaginary parts; 0 where none is."""
    edge = len(start)
    for z in numba.prange(edge):
        for y in range(edge):
            for row in range(4):
                zn, yn = z + row // 2, y + row % 2
                inside = length[zn, yn] if zn < edge and yn < edge else 0
                for x in range(length[z, y]):
                    at = u(start[z, y] + x)
                    there = u(start[zn, yn] + x) if x < inside else u(0)
                    out[at, u(row)] = values[there, u(0)] if x < inside else 0
                    out[at, u(row + 4)] = values[there, u(1)] if x < inside else 0


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _gather_columns(columns, address, fraction, sign, unit, factor, real_out, imaginary_out):
    for i in range(u(len(real_out))):
        ahead = u(address[i + u(AHEAD)])
        prefetch(columns, ahead)
        prefetch(columns, ahead + u(15))
        a = u(address[i])
        fx, fy, fz, s = fraction[0, i], fraction[1, i], fraction[2, i], sign[i]
        gy, gz = unit - fy, unit - fz
        wa, wb, wc, wd = gy * gz, fy * gz, gy * fz, fy * fz
        re0 = wa * columns[a] + wb * columns[a + u(1)] + wc * columns[a + u(2)] + wd * columns[a + u(3)]
        im0 = wa * columns[a + u(4)] + wb * columns[a + u(5)] + wc * columns[a + u(6)] + wd * columns[a + u(7)]
        re1 = wa * columns[a + u(8)] + wb * columns[a + u(9)] + wc * columns[a + u(10)] + wd * columns[a + u(11)]
        im1 = wa * columns[a + u(12)] + wb * columns[a + u(13)] + wc * columns[a + u(14)] + wd * columns[a + u(15)]
        real_out[i] = (re0 + fx * (re1 - re0)) * (factor[i] * abs(s))  # s = 0 beyond the radius
        imaginary_out[i] = (im0 + fx * (im1 - im0)) * (factor[i] * s)


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _project_columns(columns, start, half, limit2, sampling, x_K, y_K, z_K, factor_K, out):
    tasks_each = (len(x_K) + TASK - 1) // TASK
    for task in numba.prange(len(sampling) * tasks_each):
        r, begin = task // tasks_each, (task % tasks_each) * TASK
        row, column, address = np.empty(RUN, np.int32), np.empty(RUN, np.int32), np.zeros(RUN + AHEAD, u)
        fraction, sign = np.empty((3, RUN), columns.dtype), np.empty(RUN, columns.dtype)
        for first in range(begin, min(begin + TASK, len(x_K)), RUN):
            last = min(first + RUN, len(x_K))
            locate(sampling[r], x_K[first:last], y_K[first:last], z_K[first:last], half, limit2, row, column, fraction, sign)
            for i in range(u(last - first)):
                address[i] = (u(start[u(row[i])]) + u(column[i])) * u(8)
            real, imaginary = out[r, 0, first:last], out[r, 1, first:last]
            _gather_columns(columns, address, fraction, sign, limit2 / limit2, factor_K[first:last], real, imaginary)


def columns_of(values_V2: Tensor, rows: RowTable) -> np.ndarray | None:
    """Flat columns of a volume, made when it is sliced the second time; None before, for large volumes and for layers."""
    if rows.count > LARGEST or values_V2.requires_grad or isinstance(rows, LayerTable):
        return None
    version, columns = _COLUMNS.get(values_V2, (-1, None))
    if version != values_V2._version:
        _COLUMNS[values_V2] = values_V2._version, None
        return None
    if columns is None:
        columns = np.zeros((rows.count + 1, 8), values_V2.numpy().dtype)  # the last voxel's neighbour along x
        _fill_columns(values_V2.numpy(), rows.start_ZY.numpy(), rows.length_ZY.numpy(), columns)
        _COLUMNS[values_V2] = version, columns
    return columns.reshape(-1)


def project_cpu(
    values_V2: Tensor, rows: RowTable, sampling_R33: Tensor, coordinates_K3: Tensor, factor_K: Tensor | None = None,
    out_R2K: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `project_reference`; runs on the threads Numba is given. factor_K: multiplies each coefficient.

    out_R2K: contiguous, of the volume's precision, to be filled and returned; by default new.
    """
    dtype = values_V2.dtype
    scalar = np.float64 if dtype == torch.float64 else np.float32
    if out_R2K is None:
        out_R2K = torch.empty(len(sampling_R33), 2, len(coordinates_K3), dtype=dtype)
    factor_K = torch.ones(len(coordinates_K3), dtype=dtype) if factor_K is None else factor_K.to(dtype).contiguous()
    x_K, y_K, z_K = coordinates_K3.to(dtype).T.contiguous().numpy()
    words = columns_of(values_V2, rows)
    run = _project if words is None else _project_columns
    if words is None:
        words = values_V2.detach().contiguous().view(-1).numpy()
    run(
        words, rows.start_ZY.view(-1).numpy(), rows.half, scalar(rows.limit2), sampling_R33.to(dtype).contiguous().numpy(),
        x_K, y_K, z_K, factor_K.numpy(), out_R2K.numpy(),
    )  # fmt: skip
    return out_R2K
