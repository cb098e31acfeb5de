"""Where the same points recur, what of their interpolation should be kept on a GPU? Bytes a point, time and error of each.

python -m benchmarks.nufft_tables_gpu --modes 256 --points 3000000 --accuracy 1e-3
Kept can be: packed positions in the order of visiting (this package: tiles.py), from which weights are made anew; the weights
along each axis, in single precision, as half-precision numbers or as 16-bit integers, read in order, sums in single precision; or
the whole sparse matrix, in single or half precision. Times are those of interpolating one grid at all points.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.nufft import scattered
from verglas.kernels.spread.reference import located_reference
from verglas.kernels.spread.tiles import CROWD, located_triton
from verglas.kernels.spread.triton import interpolate_triton, tabled_triton
from verglas.nufft.fine import FineGrid

RUNS = 5
BEFORE = 28  # bytes a point: first cells, fractions, order of visiting
LEVELS = 65535  # of a 16-bit integer
LANES = 512  # elements of a program


@triton.jit
def _from_tables(
    grid, out, cell, weight, order, scale, count, planes, height, size,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Interpolation whose weights [M, 3, WIDTH] are read, of points in the order of visiting."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    lane = tl.arange(0, 2 * TAPS)[None, :]
    used = mask[:, None] & (lane // 2 < WIDTH)
    x, y, z = (tl.load(cell + 3 * i + axis, mask=mask, other=0) for axis in tl.static_range(3))
    column = x[:, None] + lane // 2
    column = tl.where(column >= size, column - size, column) * 2 + lane % 2
    total = tl.zeros([BLOCK, 2 * TAPS], tl.float32)
    for dz in range(WIDTH):
        wz = tl.load(weight + (3 * i + 2) * WIDTH + dz, mask=mask, other=0).to(tl.float32) * scale
        plane = tl.where(z + dz >= planes, z + dz - planes, z + dz).to(tl.int64) * height
        for dy in range(WIDTH):
            wy = tl.load(weight + (3 * i + 1) * WIDTH + dy, mask=mask, other=0).to(tl.float32) * scale
            row = plane + tl.where(y + dy >= height, y + dy - height, y + dy)
            total += (wz * wy)[:, None] * tl.load(grid + row[:, None] * (2 * size) + column, mask=used, other=0.0)
    total *= tl.load(weight + (3 * i * WIDTH)[:, None] + lane // 2, mask=used, other=0).to(tl.float32) * scale
    j = tl.load(order + i, mask=mask, other=0).to(tl.int64)
    tl.store(out + 2 * j, tl.sum(tl.where(lane % 2 == 0, total, 0.0), 1), mask=mask)
    tl.store(out + 2 * j + 1, tl.sum(tl.where(lane % 2 == 1, total, 0.0), 1), mask=mask)


def seconds_of(run: Callable[[], object]) -> float:
    """Median of some runs after one that does not count."""

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    taken = []
    for _ in range(RUNS):
        started = now()
        run()
        taken.append(now() - started)
    return median(taken)


def weights_of(fraction_M3: Tensor, taps_DW: Tensor) -> Tensor:
    """Weights along each axis, float32 [M, 3, W]."""
    weight_M3W = torch.zeros_like(fraction_M3)[..., None] + taps_DW[0]
    for coefficient_W in taps_DW[1:]:
        weight_M3W = weight_M3W * fraction_M3[..., None] + coefficient_W
    return weight_M3W


def sparse_matrix(cell_M3: Tensor, weight_M3W: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """All weights [M, cells], compressed rows with 32-bit columns."""
    count, _, width = weight_M3W.shape
    x, y, z = ((cell_M3[:, axis, None] + torch.arange(width, device=cell_M3.device)) % shape[2 - axis] for axis in range(3))
    column = (z[:, :, None, None] * shape[1] + y[:, None, :, None]) * shape[2] + x[:, None, None, :]
    value = weight_M3W[:, 2, :, None, None] * weight_M3W[:, 1, None, :, None] * weight_M3W[:, 0, None, None, :]
    start = torch.arange(count + 1, device=column.device, dtype=torch.int32) * width**3
    size = (count, shape[0] * shape[1] * shape[2])
    return torch.sparse_csr_tensor(start, column.flatten().int(), value.flatten().to(dtype), size)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", type=int, default=256)
    parser.add_argument("--points", type=int, default=3 * 10**6)
    parser.add_argument("--accuracy", type=float, default=1e-3)
    parser.add_argument("--sparse", type=int, default=10**6, help="points of the sparse matrix at most; its time is scaled")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    points = scattered("slices", options.points, options.modes, torch.Generator(device).manual_seed(0))
    fine = FineGrid.of((options.modes,) * 3, options.accuracy, 2.0, device, torch.float32)
    position_M3 = fine.in_cells(points)
    count, width, taps = len(points), fine.window.width, fine.taps()
    here = located_reference(position_M3, fine.cells, taps)
    order = here.order_M
    cell, weight = here.cell_M3[order].contiguous(), weights_of(here.fraction_M3[order], taps)
    grid = torch.randn(1, *fine.cells, 2, generator=torch.Generator(device).manual_seed(1), device=device)
    out, block = torch.empty(1, count, 2, device=device), max(1, LANES // (2 * triton.next_power_of_2(width)))
    exact = located_reference(position_M3[:10000], fine.cells, taps.double())
    weight_64, some = weights_of(exact.fraction_M3, taps.double()), slice(0, 10000)
    wanted = sparse_matrix(exact.cell_M3, weight_64, fine.cells, torch.float64) @ grid.view(-1, 2).double()
    print(f"{count} points, grid {fine.sizes}, window of {width} cells")
    print("| kept | bytes a point | of 28 | ms | error |\n|---|---|---|---|---|")

    def line(name: str, bytes_of_point: float, run: Callable[[], Tensor], share: float = 1.0) -> None:
        seconds, found = seconds_of(run) / share, run().view(-1, 2)
        last = min(len(found), 10000)
        error = float((found[some].double() - wanted[:last]).norm() / wanted[:last].norm())
        share_kept = bytes_of_point / BEFORE
        print(f"| {name} | {bytes_of_point:.0f} | {share_kept:.2f} | {1e3 * seconds:.2f} | {error:.1e} |", flush=True)

    def from_tables(table: Tensor, scale: float) -> Tensor:
        _from_tables[(triton.cdiv(count, block),)](
            grid, out, cell, table, order, scale, count, *fine.cells,
            WIDTH=width, TAPS=triton.next_power_of_2(width), BLOCK=block,
        )  # fmt: skip
        return out

    for name, crowd in (("positions, tiles", CROWD), ("positions, one by one", 2**30)):
        places = located_triton(position_M3, fine.cells, taps, crowd)
        line(name, 20, lambda places=places: interpolate_triton(grid, places))  # type: ignore[misc]
    tables = tabled_triton(places)
    line("with 16-bit weights (tables=True)", 20 + 6 * width, lambda: interpolate_triton(grid, tables))
    line("weights, float32", 16 + 12 * width, lambda: from_tables(weight, 1.0))
    half = weight.half()
    line("weights, float16", 16 + 6 * width, lambda: from_tables(half, 1.0))
    coarse = (weight * LEVELS).round().clamp(0, LEVELS).int()
    coarse = torch.where(coarse >= 2**15, coarse - 2**16, coarse).short().view(torch.uint16)
    line("weights, 16-bit integers", 16 + 6 * width, lambda: from_tables(coarse, 1 / LEVELS))
    few = min(count, options.sparse)
    for dtype, name in ((torch.float32, "sparse matrix"), (torch.float16, "sparse matrix and grid in half")):
        matrix = sparse_matrix(here.cell_M3[:few], weights_of(here.fraction_M3[:few], taps), fine.cells, dtype)
        run = partial(torch.mm, matrix, grid.view(-1, 2).to(dtype))
        try:
            line(name, (4 + dtype.itemsize) * width**3 + 4, run, few / count)
        except RuntimeError as problem:
            print(f"| {name} | {(4 + dtype.itemsize) * width**3 + 4} | | {str(problem)[:80]} | |")
        del matrix, run


if __name__ == "__main__":
    main()
