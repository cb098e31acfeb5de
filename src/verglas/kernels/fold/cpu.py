"""`fold` and its companions on the CPU: Numba, a task for each plane of the result."""

from __future__ import annotations

import math

import numba
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.fold import RadialTable
from verglas.kernels.positions import FASTMATH


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _fold(values, start, length, half, phase, out):
    planes, size, columns = out.shape[0], out.shape[1], out.shape[2] // 2
    reach = min(half, size // 2)
    for m in numba.prange(planes):
        for row in range(size):
            for i in range(2 * columns):
                out[m, row, i] = 0
        for z in range(-((reach + m) // planes) * planes + m, reach + 1, planes):
            re, im = phase[z + half, 0], phase[z + half, 1]
            for y in range(-reach, reach + 1):
                first, line = start[z + half, y + half], out[m, y % size]
                for x in range(min(length[z + half, y + half], columns)):
                    line[2 * x] += re * values[first + x]
                    line[2 * x + 1] += im * values[first + x]


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _unfold(part, start, length, half, phase, out):
    planes, size, columns = part.shape[0], part.shape[1], part.shape[2] // 2
    reach = min(half, size // 2)
    for plane in numba.prange(2 * reach + 1):
        z = plane - reach
        re, im = phase[z + half, 0], phase[z + half, 1]
        for y in range(-reach, reach + 1):
            first, line = start[z + half, y + half], part[z % planes, y % size]
            for x in range(min(length[z + half, y + half], columns)):
                out[first + x] += re * line[2 * x] + im * line[2 * x + 1]


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _radial(planes, table, per_step, strides, residue):
    size, last = planes.shape[1], len(table) - 2
    for m in numba.prange(planes.shape[0]):
        z = strides * m + residue
        z -= size if z > size // 2 else 0
        for row in range(size):
            y = row - size if row > size // 2 else row
            for column in range(size):
                x = column - size if column > size // 2 else column
                place = min(math.sqrt(x * x + y * y + z * z) * per_step, float(last))
                index = int(place)
                planes[m, row, column] *= table[index] + (table[index + 1] - table[index]) * (place - index)


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _divide(values, divisor, least):
    for i in numba.prange(len(values)):
        values[i] /= max(abs(divisor[i]), least)


def fold_cpu(values_V: Tensor, rows: RowTable, phase_Z2: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """See `fold`."""
    out = values_V.new_empty(*shape, 2)
    table = (rows.start_ZY.numpy(), rows.length_ZY.numpy(), rows.half)
    _fold(values_V.contiguous().numpy(), *table, phase_Z2.contiguous().numpy(), out.flatten(2).numpy())
    return out


def unfold_cpu(part_MYX2: Tensor, rows: RowTable, phase_Z2: Tensor, out_V: Tensor) -> None:
    """See `unfold`."""
    table = (rows.start_ZY.numpy(), rows.length_ZY.numpy(), rows.half)
    _unfold(part_MYX2.contiguous().flatten(2).numpy(), *table, phase_Z2.contiguous().numpy(), out_V.numpy())


def radial_cpu(planes_MYX: Tensor, table: RadialTable, strides: int, residue: int) -> None:
    """See `radial`."""
    per_step = 1 / (planes_MYX.shape[1] * table.step)
    _radial(planes_MYX.numpy(), table.values_T.to(planes_MYX.dtype).numpy(), per_step, strides, residue)


def divide_cpu(values_V: Tensor, divisor_V: Tensor, least: float) -> None:
    """See `divide`."""
    values, divisor = values_V.numpy(), divisor_V.numpy()
    _divide(values, divisor, values.dtype.type(least))
