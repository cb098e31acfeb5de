"""Packed volumes on a GPU: bytes, slices a second beside a dense half cube, and what making references and maps takes of it.

    python -m benchmarks.packed_rows [--boxes 256 512] [--slices 256]

Slices in single precision by the same kernel, from packed rows through their table, and from a dense half cube by computed
addresses. Memory: what PyTorch had allocated at most, beside the plan and beside a dense Fourier cube.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.device_peak import Peak, device_peak
from benchmarks.gpu_kernels import poses, seconds
from verglas.core.fourier import half_plane_pixels
from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels.project.cells import project_cells
from verglas.kernels.project.triton import BLOCK, WARPS, _voxel, load_axis, locate, project_triton, visiting_order
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import solve_halves, solve_joined
from verglas.projection.volume import FourierVolume
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_memory import Item, reference_items, solution_phases
from verglas.refinement.plan_sizes import Machine, Problem

GB = 1e9


@triton.jit
def _dense_kernel(
    values, sampling, order, coordinates, out, n_pixels, half, limit2, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """As `_project_kernel`, from values[z, y, x] of a half cube of (2 half + 1)^2 rows."""
    patches = tl.cdiv(n_pixels, BLOCK)
    r = tl.load(order + tl.program_id(0) // patches)
    ax, bx, cx = load_axis(sampling, r, 0)
    ay, by, cy = load_axis(sampling, r, 1)
    az, bz, cz = load_axis(sampling, r, 2)
    edge = 2 * half + 1
    k = (tl.program_id(0) % patches) * BLOCK + tl.arange(0, BLOCK)
    mask = k < n_pixels
    kx = tl.load(coordinates + k, mask=mask, other=0.0)
    ky = tl.load(coordinates + n_pixels + k, mask=mask, other=0.0)
    kz = tl.load(coordinates + 2 * n_pixels + k, mask=mask, other=0.0)
    px, py, pz = ax * kx + bx * ky + cx * kz, ay * kx + by * ky + cy * kz, az * kx + bz * ky + cz * kz
    row, x, fx, fy, fz, turned, inside = locate(px, py, pz, half, edge, limit2, mask)
    re, im = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for corner in tl.static_range(4):
        dy, dz = corner % 2, corner // 2
        address = tl.where(inside, row + dy + dz * edge, 0).to(tl.int64) * columns + tl.where(inside, x, 0)
        weight = (fy if dy == 1 else 1 - fy) * (fz if dz == 1 else 1 - fz)
        re0, im0 = _voxel(values, address, inside)
        re1, im1 = _voxel(values, address + 1, inside)
        re += weight * (re0 + fx * (re1 - re0))
        im += weight * (im0 + fx * (im1 - im0))
    out += r.to(tl.int64) * 2 * n_pixels + k
    tl.store(out, re, mask=mask, cache_modifier=".cs")
    tl.store(out + n_pixels, tl.where(turned, -im, im), mask=mask, cache_modifier=".cs")


def dense(values_V2: torch.Tensor, rows: RowTable) -> torch.Tensor:
    """A half cube [z, y, x, 2] of packed rows, 0 outside the sphere."""
    columns = int(rows.length_ZY.max()) + 1
    out_ZYX2 = values_V2.new_zeros(rows.edge, rows.edge, columns, 2)
    x_X = torch.arange(columns, device=values_V2.device)
    for z in range(rows.edge):
        there = x_X < rows.length_ZY[z, :, None]
        out_ZYX2[z] = values_V2[torch.where(there, rows.start_ZY[z, :, None].long() + x_X, 0)] * there[..., None]
    return out_ZYX2


def project_dense(
    cube_ZYX2: torch.Tensor, rows: RowTable, sampling_R33: torch.Tensor, coordinates_K3: torch.Tensor
) -> torch.Tensor:
    """As `project_triton`."""
    n_slices, n_pixels = len(sampling_R33), len(coordinates_K3)
    out_R2K = torch.empty(n_slices, 2, n_pixels, dtype=torch.float32, device=cube_ZYX2.device)
    _dense_kernel[(triton.cdiv(n_pixels, BLOCK) * n_slices,)](
        cube_ZYX2, sampling_R33, visiting_order(sampling_R33), coordinates_K3.T.contiguous(), out_R2K, n_pixels, rows.half,
        rows.limit2, cube_ZYX2.shape[2], BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out_R2K


def rates(box: int, n: int, device: torch.device) -> None:
    """Print slices from packed rows and from a dense half cube, and the bytes of both."""
    generator = torch.Generator().manual_seed(box)
    pixels = half_plane_pixels(box, device=device)
    coordinates = pixels.coordinates_K3()
    rows = packed_sphere(float(box), device)
    values = torch.randn(rows.count, 2, device=device)
    cube = dense(values, rows)
    whole, table = 8 * (2 * box) ** 3, rows.start_ZY.nbytes + rows.length_ZY.nbytes
    share = (8 * rows.count + table) / whole
    print(f"{box} px: packed {8 * rows.count / GB:.3f} GB with a table of {table / GB:.3f}, {share:.2%} of the complex cube of "
          f"{whole / GB:.3f} GB; dense half {cube.nbytes / GB:.3f}", flush=True)  # fmt: skip
    for clustered in (False, True):
        sampling = (2 * poses(n, clustered, generator).transpose(1, 2)).float().to(device).contiguous()
        ours, theirs = project_triton(values, rows, sampling, coordinates), project_dense(cube, rows, sampling, coordinates)
        wrong = float((ours - theirs).abs().max() / theirs.abs().max())
        del ours, theirs
        if device.type == "cpu":  # interpreted: no times
            print(f"    largest difference {wrong:.1e}")
            continue
        samples = n * len(coordinates) / GB
        times = [seconds(partial(project_triton, values, rows, sampling, coordinates)) for _ in range(2)]
        others = [seconds(partial(project_dense, cube, rows, sampling, coordinates)) for _ in range(2)]
        packed_rate, dense_rate = samples / min(times), samples / min(others)
        print(f"    {'clusters' if clustered else 'random'}: packed {packed_rate:.1f} G samples/s, dense {dense_rate:.1f}, "
              f"ratio {packed_rate / dense_rate:.3f}; largest difference {wrong:.1e}", flush=True)  # fmt: skip
    del cube, values


def cells_rate(box: int, n: int, device: torch.device) -> None:
    """Print slices in half precision from cells, which references have where they fit."""
    generator = torch.Generator().manual_seed(box)
    coordinates = half_plane_pixels(box, device=device).coordinates_K3()
    volume = FourierVolume.from_map(torch.randn(box, box, box, generator=generator).to(device), dtype=torch.float16)
    sampling = (2 * poses(n, False, generator).transpose(1, 2)).float().to(device).contiguous()
    out = torch.empty(n, 2, len(coordinates), dtype=torch.float16, device=device)
    assert volume.cells is not None
    taken = seconds(partial(project_cells, volume.cells, sampling, coordinates, None, out))
    print(f"    cells, float16, random: {n * len(coordinates) / taken / GB:.1f} G samples/s", flush=True)


def memory(box: int, device: torch.device) -> None:
    """Print what a reference and solving take, beside the plan and a dense cube. The sums are those of a few random slices."""
    config = RefineConfig(diameter=0.6 * box, precision="single")
    made = plan(Problem(1000, box, 1.0), config, Machine("cuda", 500 * GB, 80 * GB))
    last = made.iterations[-1].sizes
    cube = 8 * (2 * box) ** 3

    def told(name: str, peak: Peak, items: list[Item], more: float = 0.0) -> None:
        planned = sum(one.bytes for one in items if one.where == "device") + more
        text = f"{peak.allocated / GB:.3f} GB, planned {planned / GB:.3f} ({planned / peak.allocated:.3f})"
        print(f"{box} px, {name}: at most {text}, {peak.allocated / cube:.2f} of a dense complex cube ({cube / GB:.2f} GB)")
        for line, size in peak.lines[:5]:
            print(f"    {size / GB:7.3f} GB  {line}", flush=True)

    map_ZYX = torch.randn(box, box, box, device=device)
    with device_peak() as peak:
        FourierVolume.from_map(map_ZYX)
    told("a reference", peak, [one for one in reference_items(made, last) if one.name != "sums of all maps"], map_ZYX.nbytes)
    del map_ZYX
    coordinates = half_plane_pixels(box, device=device).coordinates_K3()
    generator = torch.Generator().manual_seed(box)
    for solve, name in ((solve_joined, "joined map, half maps, FSC"), (solve_halves, "two half maps, FSC")):
        with device_peak() as peak:
            sums = tuple(Accumulator(box, None, 2.0, device) for _ in range(2))
            for one in sums:
                data = torch.randn(8, 2, len(coordinates), device=device)
                one.add(data, torch.ones_like(data[:, 0]), poses(8, False, generator), coordinates)
                del data
            found = solve((sums[0], sums[1]), "C1", join_shell=5)
            del found, sums, one
        (items,) = solution_phases(made, last if solve is solve_joined else replace(last, kind="local"))
        mask = 0.0 if solve is solve_joined else -5.0 * box**3  # there is none here
        told(name, peak, items, mask)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--slices", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device = torch.device(given.device)
    for box in given.boxes:
        rates(box, given.slices, device)
        if device.type == "cuda":
            cells_rate(box, given.slices, device)
            torch.cuda.empty_cache()
    if device.type == "cuda":
        memory(given.boxes[-1], device)


if __name__ == "__main__":
    main()
