"""`spread` and `interpolate` on the CPU: Numba; widths are part of the compiled types, so that taps are unrolled.

Spreading: a task owns planes of the grid. Interpolation: a task owns a run of the sorted points.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.positions import FASTMATH
from verglas.kernels.spread import BIN_XYZ, Places
from verglas.kernels.spread.lines import add_line, polynomial_line

RUN = 4096  # points of a task of the interpolation
u = np.uintp


@numba.njit(cache=True, boundscheck=False)
def _locate(points, shape, half_width, bins, cell, fraction, key):
    for j in range(len(points)):
        number = 0
        for axis in range(2, -1, -1):
            n = shape[axis]
            edge = points[j, axis] - half_width
            first = math.ceil(edge)
            place = np.int64(first) % n if n > 1 or axis < 2 else 0
            cell[j, axis] = place
            fraction[j, axis] = first - edge - 0.5
            number = number * bins[axis] + place // BIN_XYZ[axis]
        key[j] = number


@numba.njit(cache=True, boundscheck=False)
def _counting_sort(key, first, order):
    for j in range(len(key)):
        first[key[j] + 1] += 1
    for b in range(len(first) - 1):
        first[b + 1] += first[b]
    place = first.copy()
    for j in range(len(key)):
        order[place[key[j]]] = j
        place[key[j]] += 1


def located_cpu(point_M3: Tensor, shape: tuple[int, int, int], taps_DW: Tensor) -> Places:
    """See `located`."""
    count, sizes = len(point_M3), np.array(shape[::-1], np.int64)
    bins = -(-sizes // np.array(BIN_XYZ))
    cell, key, order = np.empty((count, 3), np.int32), np.empty(count, np.int64), np.empty(count, np.int32)
    fraction = torch.empty(count, 3, dtype=taps_DW.dtype)
    _locate(point_M3.contiguous().numpy(), sizes, 0.5 * taps_DW.shape[1], bins, cell, fraction.numpy(), key)
    first = np.zeros(int(bins.prod()) + 1, np.int64)
    _counting_sort(key, first, order)
    first_Z = torch.from_numpy(first[:: int(bins[0] * bins[1])].copy())
    return Places(shape, torch.from_numpy(cell), fraction, torch.from_numpy(order), first_Z, taps_DW)


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _add_to_row(grid, row, x0, line, weight, width, pairs, size):
    """Add a line of taps (re, im alternating) to the row of the grid that begins at `row`, around its end if need be."""
    if x0 + len(width) <= size:
        add_line(grid, u(row + 2 * x0), line, u(0), weight, pairs)
    else:
        for t in range(len(width)):
            x = row + 2 * ((x0 + t) % size)
            grid[x] += weight * line[2 * t]
            grid[x + 1] += weight * line[2 * t + 1]


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _spread(grid, shape, values, cell, fraction, order, first_of_bin, layer, taps, cuts, width, pairs, depth):
    batch, planes, height, size = shape
    layers = len(first_of_bin) - 1
    for slab in numba.prange(len(cuts) - 1):
        low, high = cuts[slab], cuts[slab + 1]
        wx, wy, wz = np.empty(len(width), grid.dtype), np.empty(len(width), grid.dtype), np.ones(len(width), grid.dtype)
        line = np.empty(2 * len(width), grid.dtype)
        # Layers of bins whose points reach this slab: those it lies in, and those before, around the end of the grid.
        last_layer = (high - 1) // layer
        reach = min(layers, last_layer - (low - len(depth) + 1) // layer + 1)
        if low - len(depth) + 1 < 0:
            reach = min(layers, reach + 1)  # the last layer may be thinner than others
        for b in range(batch):
            for l in range(last_layer - reach + 1, last_layer + 1):
                for i in range(first_of_bin[l % layers], first_of_bin[l % layers + 1]):
                    j = order[i]
                    x0, y0, z0 = cell[j, 0], cell[j, 1], cell[j, 2]
                    polynomial_line(wx, taps, fraction[j, 0], width)
                    polynomial_line(wy, taps, fraction[j, 1], width)
                    if len(depth) > 1:
                        polynomial_line(wz, taps, fraction[j, 2], width)
                    for t in range(len(width)):
                        line[2 * t] = wx[t] * values[b, j, 0]
                        line[2 * t + 1] = wx[t] * values[b, j, 1]
                    for dz in range(len(depth)):
                        z = z0 + dz
                        z -= planes if z >= planes else 0
                        if low <= z < high:
                            for dy in range(len(width)):
                                y = y0 + dy
                                y -= height if y >= height else 0
                                row = ((b * planes + z) * height + y) * 2 * size
                                _add_to_row(grid, row, x0, line, wz[dz] * wy[dy], width, pairs, size)


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _interpolate(grid, shape, cell, fraction, order, taps, out, width, pairs, depth):
    batch, planes, height, size = shape
    for task in numba.prange((len(order) + RUN - 1) // RUN):
        wx, wy, wz = np.empty(len(width), grid.dtype), np.empty(len(width), grid.dtype), np.ones(len(width), grid.dtype)
        line = np.empty(2 * len(width), grid.dtype)
        for b in range(batch):
            for i in range(task * RUN, min(len(order), (task + 1) * RUN)):
                j = order[i]
                x0, y0, z0 = cell[j, 0], cell[j, 1], cell[j, 2]
                polynomial_line(wx, taps, fraction[j, 0], width)
                polynomial_line(wy, taps, fraction[j, 1], width)
                if len(depth) > 1:
                    polynomial_line(wz, taps, fraction[j, 2], width)
                for t in range(2 * len(width)):
                    line[t] = 0
                for dz in range(len(depth)):
                    z = z0 + dz
                    z -= planes if z >= planes else 0
                    for dy in range(len(width)):
                        y = y0 + dy
                        y -= height if y >= height else 0
                        row, weight = ((b * planes + z) * height + y) * 2 * size, wz[dz] * wy[dy]
                        if x0 + len(width) <= size:
                            add_line(line, u(0), grid, u(row + 2 * x0), weight, pairs)
                        else:
                            for t in range(len(width)):
                                x = row + 2 * ((x0 + t) % size)
                                line[2 * t] += weight * grid[x]
                                line[2 * t + 1] += weight * grid[x + 1]
                re = im = wx[0] * 0
                for t in range(len(width)):
                    re += wx[t] * line[2 * t]
                    im += wx[t] * line[2 * t + 1]
                out[b, j, 0], out[b, j, 1] = re, im


def spread_cpu(grid_BZYX2: Tensor, places: Places, values_BM2: Tensor) -> None:
    """See `spread_reference`; float32 or float64, contiguous grid."""
    if len(places) == 0:
        return
    cell, fraction, order, first, taps, *lengths = _arguments(places)
    values = values_BM2.to(grid_BZYX2.dtype).contiguous().numpy()
    layer = BIN_XYZ[2] if places.shape[0] > 1 else 1
    grid, shape = grid_BZYX2.view(-1).numpy(), tuple(grid_BZYX2.shape[:4])
    _spread(grid, shape, values, cell, fraction, order, first, layer, taps, _cuts(places), *lengths)


def interpolate_cpu(grid_BZYX2: Tensor, places: Places) -> Tensor:
    """See `interpolate_reference`."""
    cell, fraction, order, _, taps, *lengths = _arguments(places)
    out_BM2 = grid_BZYX2.new_empty(len(grid_BZYX2), len(places), 2)
    grid = grid_BZYX2.contiguous().view(-1).numpy()
    _interpolate(grid, tuple(grid_BZYX2.shape[:4]), cell, fraction, order, taps, out_BM2.numpy(), *lengths)
    return out_BM2


def _arguments(places: Places) -> tuple:
    """Arrays, and tuples whose lengths are those of a line of taps, of its pairs of numbers and of the taps along z."""
    width = (0,) * places.width
    depth = width if places.shape[0] > 1 else (0,)
    tensors = (places.cell_M3, places.fraction_M3, places.order_M, places.first_of_bin_Z)
    arrays = (one.contiguous().numpy() for one in tensors)
    return (*arrays, places.taps_DW.contiguous().view(-1).numpy(), width, 2 * width, depth)


def _cuts(places: Places) -> np.ndarray:
    """Planes at which slabs end, int64: slabs of about as many points, at least two windows thick; one for a single thread."""
    planes, threads = places.shape[0], numba.get_num_threads()
    if threads == 1 or planes == 1:
        return np.array([0, planes])
    tasks = max(1, min(4 * threads, planes // (2 * places.width)))
    first = places.first_of_bin_Z.numpy()
    wanted = first[-1] * np.arange(1, tasks) / tasks
    inner = np.searchsorted(first, wanted) * BIN_XYZ[2]
    return np.unique(np.concatenate([[0], inner[inner < planes], [planes]]))
