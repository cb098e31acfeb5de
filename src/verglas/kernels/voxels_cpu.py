"""Numba passes over the stored voxels of a packed volume: what `maximization` does per voxel, on the CPU.

Each does what its caller writes out in torch for other devices, without the index tensors that torch needs (ten times
the time). Work is split by planes of the result, so sums do not depend on the number of threads.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.core.rows import RowTable


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _add_turned(values, start, length, half, limit2, m, out):
    for plane in numba.prange(2 * half + 1):
        z = plane - half
        for row in range(2 * half + 1):
            y = row - half
            voxel = start[plane, row]
            for x in range(length[plane, row]):
                if x * x + y * y + z * z > limit2:
                    break
                tx = m[0, 0] * x + m[0, 1] * y + m[0, 2] * z
                ty = m[1, 0] * x + m[1, 1] * y + m[1, 2] * z
                tz = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z
                s = 1 if tx >= 0 else -1
                source = start[s * tz + half, s * ty + half] + s * tx
                out[voxel + x, 0] += values[source, 0]
                out[voxel + x, 1] += s * values[source, 1]
                out[voxel + x, 2] += values[source, 2]


def add_turned_cpu(values_V: Tensor, rows: RowTable, operator_33: Tensor, out_V: Tensor) -> None:
    """out(k) += in(R k) for |k| within the table's radius; R turns the grid onto itself. Columns 0-2: re, im, weight."""
    matrix = operator_33.round().long().numpy()
    _add_turned(values_V.numpy(), rows.start_ZY.numpy(), rows.length_ZY.numpy(), rows.half, rows.limit2, matrix, out_V.numpy())


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _shell_sums(weight, prior, start, length, half, radius2, padding, rounding, total, count, covered):
    last = total.shape[1] - 1
    for plane in numba.prange(2 * half + 1):
        z = plane - half
        for row in range(2 * half + 1):
            y = row - half
            voxel = start[plane, row]
            for x in range(length[plane, row]):
                r2 = x * x + y * y + z * z
                if r2 >= radius2:
                    break
                shell = min(np.int64(np.sqrt(r2) / padding + rounding), last)
                w = weight[voxel + x]
                total[plane, shell] += w
                count[plane, shell] += 1.0
                covered[plane, shell] += 1.0 if w >= prior[shell] else 0.0


def shell_sums_cpu(
    weight_V: Tensor, rows: RowTable, padding: float, shells: int, rounding: float, prior_S: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the weight, number of voxels and number of those with weight >= prior per shell floor(r / padding + rounding).

    float64 [shells]; voxels within the table's radius only.
    """
    prior = np.zeros(shells) if prior_S is None else prior_S.double().numpy()
    total, count, covered = np.zeros((3, rows.edge, shells))
    _shell_sums(
        weight_V.numpy(), prior, rows.start_ZY.numpy(), rows.length_ZY.numpy(), rows.half, int(rows.radius**2), padding,
        rounding, total, count, covered,
    )  # fmt: skip
    sums = [torch.from_numpy(values.sum(0)) for values in (total, count, covered)]
    return sums[0], sums[1], sums[2]


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _divide(data, weight, prior, floor, gain, start, length, half, radius2, padding, place, first, out):
    size, end = out.shape[1], first + out.shape[2]
    last = len(prior) - 1
    for plane in numba.prange(2 * half + 1):
        z = plane - half
        for row in range(2 * half + 1):
            y = row - half
            voxel = start[plane, row]
            for x in range(first, min(length[plane, row], end)):
                r2 = x * x + y * y + z * z
                if r2 >= radius2:
                    break
                r = np.sqrt(r2) / padding
                shell = min(np.int64(r + 0.5), last)
                w = max(weight[voxel + x] + prior[shell], floor[min(np.int64(r), last)])
                if w > 0:
                    scale = 1 / max(w * gain[shell], 1e-30)
                    out[place[plane], y % size, x - first, 0] = data[voxel + x, 0] * scale
                    out[place[plane], y % size, x - first, 1] = data[voxel + x, 1] * scale


def divide_cpu(
    data_V2: Tensor, weight_V: Tensor, rows: RowTable, padding: float, curves_S: tuple[Tensor, Tensor, Tensor], out_ZYX2: Tensor,
    place_E: Tensor, first: int = 0,
) -> None:  # fmt: skip
    """Write data / (max(weight + prior, floor) gain) into columns x = first, first + 1, ... of a half transform, of zeros.

    curves: (prior, floor, gain). place_E: plane of `out` for each z of -half..half.
    """
    prior, floor, gain = (curve.double().numpy() for curve in curves_S)
    _divide(
        data_V2.numpy(), weight_V.numpy(), prior, floor, gain, rows.start_ZY.numpy(), rows.length_ZY.numpy(), rows.half,
        int(rows.radius**2), padding, place_E.numpy(), first, out_ZYX2.numpy(),
    )  # fmt: skip


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _sum_unpadded(data, weight, start, length, nearest, first, last, out):
    half = (len(nearest) - 1) // 2
    small = out.shape[1] // 2
    for plane in numba.prange(out.shape[0]):
        for z in range(first[plane], last[plane]):
            for y in range(len(nearest)):
                voxel = start[z, y]
                for x in range(length[z, y]):
                    place = out[plane, nearest[y] + small, nearest[x + half]]
                    place[0] += data[voxel + x, 0]
                    place[1] += data[voxel + x, 1]
                    place[2] += weight[voxel + x]


def sum_unpadded_cpu(
    data_V2: Tensor, weight_V: Tensor, rows: RowTable, nearest_E: Tensor, plane_U: Tensor, out_UYX3: Tensor
) -> None:
    """Add (re, im, weight) of each voxel to out[plane, nearest(y), nearest(x)], if nearest(z) is plane_U[plane].

    nearest_E: index on the coarser grid of each of -half..half, ascending; `out` is centred in y.
    """
    nearest, plane = nearest_E.numpy(), plane_U.numpy()
    first, last = np.searchsorted(nearest, plane), np.searchsorted(nearest, plane + 1)
    _sum_unpadded(
        data_V2.numpy(), weight_V.numpy(), rows.start_ZY.numpy(), rows.length_ZY.numpy(), nearest, first, last, out_UYX3.numpy()
    )
