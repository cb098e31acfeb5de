"""`backproject` on the CPU: Numba; each task owns a slab of z, so no copies, no atomics and no order dependence.

Every voxel receives its samples in the order slice, pixel, whatever the number of threads: results are bitwise
repeatable. Slabs are cut so that each receives about as many samples. Voxels are fetched ahead of their use.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.positions import AHEAD, FASTMATH, RUN, fetch, find_words, locate

u = np.uintp
EVERY_COLUMN = 2**30


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _add_pair(accumulator, a, w0, w1, re, im, wt):
    accumulator[a] += w0 * re
    accumulator[a + u(1)] += w0 * im
    accumulator[a + u(2)] += w0 * wt
    accumulator[a + u(4)] += w1 * re
    accumulator[a + u(5)] += w1 * im
    accumulator[a + u(6)] += w1 * wt


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _choose(row, column, sign, n, first_row, last_row, edge, low, high, chosen):
    """List the pixels of a run that touch the rows of a slab (their own plane or the next), low <= x < high; returns how many."""
    count = u(0)
    for i in range(n):
        chosen[count] = i
        touches = row[i] >= first_row - edge and row[i] < last_row and sign[i] != 0 and column[i] >= low and column[i] < high
        count += u(1) if touches else u(0)
    return count


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _scatter(accumulator, address, chosen, first_row, last_upper, row, fraction, sign, unit, real, imaginary, weight):
    for j in range(u(min(AHEAD, len(chosen)))):
        fetch(accumulator, address, j)
    for j in range(u(len(chosen))):
        fetch(accumulator, address, j + u(AHEAD))
        i = u(chosen[j])
        fx, fy, fz = fraction[0, i], fraction[1, i], fraction[2, i]
        re, im, wt = real[i], imaginary[i] * sign[i], weight[i]
        gx, gy, gz = unit - fx, unit - fy, unit - fz
        if row[i] >= first_row:
            w = gy * gz
            _add_pair(accumulator, u(address[0, j]), w * gx, w * fx, re, im, wt)
            w = fy * gz
            _add_pair(accumulator, u(address[1, j]), w * gx, w * fx, re, im, wt)
        if row[i] < last_upper:
            w = gy * fz
            _add_pair(accumulator, u(address[2, j]), w * gx, w * fx, re, im, wt)
            w = fy * fz
            _add_pair(accumulator, u(address[3, j]), w * gx, w * fx, re, im, wt)


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _backproject(accumulator, start, half, limit2, data, weight, sampling, x_K, y_K, z_K, slabs, low, high):
    edge = np.int32(2 * half + 1)
    for slab in numba.prange(len(slabs)):
        first_row, last_row = np.int32(slabs[slab, 0]) * edge, np.int32(slabs[slab, 1]) * edge
        row, column, address = np.empty(RUN, np.int32), np.empty(RUN, np.int32), np.zeros((4, RUN + AHEAD), u)
        fraction, sign = np.empty((3, RUN), accumulator.dtype), np.empty(RUN, accumulator.dtype)
        chosen = np.empty(RUN + 1, np.int32)
        for r in range(len(sampling)):
            for first in range(0, len(x_K), RUN):
                last = min(first + RUN, len(x_K))
                locate(sampling[r], x_K[first:last], y_K[first:last], z_K[first:last], half, limit2, row, column, fraction, sign)
                count = _choose(row, column, sign, last - first, first_row, last_row, edge, low, high, chosen)
                find_words(start, u(edge), row, column, u(4), chosen[:count], address)
                _scatter(accumulator, address, chosen[:count], first_row, last_row - edge, row, fraction, sign, limit2 / limit2,
                         data[r, 0, first:last], data[r, 1, first:last], weight[r, first:last])  # fmt: skip


def backproject_cpu(
    accumulator_V4: Tensor,
    rows: RowTable,
    data_R2K: Tensor,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
    planes: list[tuple[int, int]] | None = None,
    columns: tuple[int, int] | None = None,
) -> None:
    """See `backproject_reference`; runs on the threads Numba is given.

    planes: (first, last + 1) of each run of planes that `rows` has, counted from 0: what falls elsewhere is left out. All by
    default.
    """
    dtype = accumulator_V4.dtype
    scalar = np.float64 if dtype == torch.float64 else np.float32
    sampling = sampling_R33.to(dtype).contiguous()
    coordinates = coordinates_K3.to(dtype)
    x_K, y_K, z_K = coordinates.T.contiguous().numpy()
    weight = torch.zeros(len(sampling), len(coordinates), dtype=dtype) if weight_RK is None else weight_RK
    cuts = [slab_cuts(sampling, coordinates, rows, numba.get_num_threads(), run) for run in planes or [(0, rows.edge)]]
    slabs = np.concatenate([np.stack([cut[:-1], cut[1:]], 1) for cut in cuts])
    _backproject(
        accumulator_V4.view(-1).numpy(), rows.start_ZY.view(-1).numpy(), rows.half, scalar(rows.limit2),
        data_R2K.to(dtype).contiguous().numpy(), weight.to(dtype).contiguous().numpy(), sampling.numpy(), x_K, y_K, z_K, slabs,
        *(np.int32(end) for end in columns or (0, EVERY_COLUMN)),
    )  # fmt: skip


def slab_cuts(
    sampling_R33: Tensor, coordinates_K3: Tensor, rows: RowTable, n_slabs: int, run: tuple[int, int] | None = None
) -> np.ndarray:
    """Planes at which to cut the volume so that each slab receives about as many samples; [n_slabs + 1] int64.

    Read off every 16th slice and 61st pixel: preferred views may put nearly all samples on few planes. run: (first, last + 1) of
    the planes that are cut, all by default.
    """
    low, high = run or (0, rows.edge)
    position_RK3 = torch.einsum("rij,kj->rki", sampling_R33[::16], coordinates_K3[::61])
    z = (position_RK3[..., 2] * torch.where(position_RK3[..., 0] < 0, -1.0, 1.0)).flatten().double().numpy() + rows.half
    inside = z[(z >= low) & (z < high)]
    inside = inside if len(inside) else np.arange(low, high)
    cuts = np.floor(np.quantile(inside, np.linspace(0, 1, n_slabs + 1)[1:-1])).astype(np.int64)
    return np.concatenate([[low], np.clip(cuts, low, high), [high]])
