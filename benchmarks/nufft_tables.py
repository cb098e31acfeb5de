"""Where the same points recur, what of their interpolation should be kept? Bytes a point and time, on one thread of the CPU.

python -m benchmarks.nufft_tables --modes 64 --points 300000 --accuracy 1e-3
Kept can be: first cells and fractions (this package: weights are polynomials of the fractions, made anew each time); positions as
32-bit fixed point numbers, in the order of visiting; the weights along each axis, in single precision or as 16-bit numbers; or
the whole sparse matrix. Times are those of interpolating one grid at all points; errors are against double precision.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numba
import numpy as np
import scipy.sparse
import torch

from benchmarks.nufft import scattered
from verglas.kernels.positions import FASTMATH
from verglas.kernels.spread import Places, interpolate, located
from verglas.kernels.spread.lines import add_line, polynomial_line
from verglas.nufft.fine import FineGrid

RUNS = 5
LEVELS = 65535  # of a 16-bit weight
u = np.uintp


def kernel_of(place: Callable, weigh: Callable) -> Callable:
    """An interpolation whose points are read by place(kept, i, size) -> (x, y, z) and weigh(kept, taps, i, axis, width, out)."""

    @numba.njit(fastmath=FASTMATH, boundscheck=False)
    def run(grid, size, kept, order, taps, out, width, pairs):
        wx, wy, wz = np.empty(len(width), np.float32), np.empty(len(width), np.float32), np.empty(len(width), np.float32)
        line = np.empty(2 * len(width), np.float32)
        for i in range(len(order)):
            x0, y0, z0 = place(kept, i, size)
            weigh(kept, taps, i, 0, width, wx)
            weigh(kept, taps, i, 1, width, wy)
            weigh(kept, taps, i, 2, width, wz)
            for t in range(2 * len(width)):
                line[t] = 0
            for dz in range(len(width)):
                z = (z0 + dz) % size
                for dy in range(len(width)):
                    row, weight = (z * size + (y0 + dy) % size) * 2 * size, wz[dz] * wy[dy]
                    if x0 + len(width) <= size:
                        add_line(line, u(0), grid, u(row + 2 * x0), weight, pairs)
                    else:
                        for t in range(len(width)):
                            x = row + 2 * ((x0 + t) % size)
                            line[2 * t] += weight * grid[x]
                            line[2 * t + 1] += weight * grid[x + 1]
            re = im = np.float32(0)
            for t in range(len(width)):
                re += wx[t] * line[2 * t]
                im += wx[t] * line[2 * t + 1]
            out[order[i], 0], out[order[i], 1] = re, im

    return run


@numba.njit(inline="always")
def table_place(kept, i, size):
    cell = kept[0]
    return cell[i, 0], cell[i, 1], cell[i, 2]


@numba.njit(inline="always")
def table_weigh(kept, taps, i, axis, width, out):
    table, scale = kept[1], kept[2]
    for t in range(len(width)):
        out[t] = table[i, axis, t] * scale


@numba.njit(inline="always")
def fixed_place(kept, i, size):
    turn = kept[0]
    return (turn[i, 0] * size) >> 32, (turn[i, 1] * size) >> 32, (turn[i, 2] * size) >> 32


@numba.njit(inline="always", fastmath=FASTMATH)
def fixed_weigh(kept, taps, i, axis, width, out):
    inside = np.uint32(kept[0][i, axis] * kept[1])  # of the cell, in 2^-32
    polynomial_line(out, taps, np.float32(0.5) - np.float32(inside) * np.float32(2.0**-32), width)


def seconds_of(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(RUNS):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return sorted(taken)[RUNS // 2]


def sparse_matrix(places: Places) -> scipy.sparse.csr_matrix:
    """All weights [M, cells], float32."""
    width, size = places.width, places.shape[0]
    weight_M3W = weights_of(places)
    tap = np.arange(width)
    cell_M3W = (places.cell_M3.numpy()[..., None] + tap) % size
    column = (cell_M3W[:, 2, :, None, None] * size + cell_M3W[:, 1, None, :, None]) * size + cell_M3W[:, 0, None, None, :]
    value = weight_M3W[:, 2, :, None, None] * weight_M3W[:, 1, None, :, None] * weight_M3W[:, 0, None, None, :]
    starts = np.arange(len(places) + 1) * width**3
    return scipy.sparse.csr_matrix((value.ravel(), column.ravel().astype(np.int32), starts), shape=(len(places), size**3))


def weights_of(places: Places) -> np.ndarray:
    """Weights along each axis, float32 [M, 3, W]."""
    weight_M3W = torch.zeros_like(places.fraction_M3)[..., None] + places.taps_DW[0]
    for coefficient_W in places.taps_DW[1:]:
        weight_M3W = weight_M3W * places.fraction_M3[..., None] + coefficient_W
    return weight_M3W.numpy()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", type=int, default=64)
    parser.add_argument("--points", type=int, default=300000)
    parser.add_argument("--accuracy", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    points = scattered("slices", options.points, options.modes, torch.Generator().manual_seed(0))
    fine = FineGrid.of((options.modes,) * 3, options.accuracy, 2.0, "cpu", torch.float32)
    position_M3 = fine.in_cells(points)
    places = located(position_M3, fine.cells, fine.taps(), "cpu")
    exact = located(position_M3, fine.cells, fine.taps().double(), "reference")
    grid = torch.randn(1, *fine.cells, 2, generator=torch.Generator().manual_seed(1))
    wanted = interpolate(grid.double(), exact, "reference")[0]
    order, size, width = places.order_M.numpy(), fine.sizes[0], places.width
    cell = places.cell_M3.numpy()[order]
    # The first cell touched is the next whole one: positions in (c - 1, c] have it at c.
    turn = np.ceil(((position_M3.numpy() - 0.5 * width) % size) * (2.0**32 / size)).astype(np.int64)[order] - 1
    turn = (turn + 2**32 // size) % 2**32
    weight = weights_of(places)[order]
    taps = places.taps_DW.view(-1).numpy()
    flat, out = grid.view(-1).numpy(), np.empty((len(places), 2), np.float32)
    lengths = ((0,) * width, (0,) * (2 * width))
    tables, fixed = kernel_of(table_place, table_weigh), kernel_of(fixed_place, fixed_weigh)
    coarse = np.round(weight * LEVELS).clip(0, LEVELS).astype(np.uint16)
    kept32, kept16 = (cell, weight, np.float32(1)), (cell, coarse, np.float32(1 / LEVELS))
    matrix, columns = sparse_matrix(places), grid.view(-1, 2).numpy()

    def line(name: str, bytes_of_point: float, run: Callable[[], object]) -> None:
        seconds = seconds_of(run)
        found = run()
        found = torch.from_numpy(out if found is None else np.asarray(found)).double()
        error = float((found - wanted).norm() / wanted.norm())
        print(f"| {name} | {bytes_of_point:.0f} | {1e3 * seconds:.1f} | {error:.1e} |", flush=True)

    print(f"{len(places)} points, grid {fine.sizes}, window of {width} cells")
    print("| kept | bytes a point | ms | error |\n|---|---|---|---|")
    line("cells and fractions", 28, lambda: interpolate(grid, places, "cpu")[0].numpy())
    line("32-bit positions, in order", 16, lambda: fixed(flat, size, (turn, size), order, taps, out, *lengths))
    line("weights, float32", 16 + 12 * width, lambda: tables(flat, size, kept32, order, taps, out, *lengths))
    line("weights, 16 bits", 16 + 6 * width, lambda: tables(flat, size, kept16, order, taps, out, *lengths))
    line("sparse matrix", matrix.data.nbytes / len(places) + 4 * width**3 + 8, lambda: matrix @ columns)


if __name__ == "__main__":
    main()
