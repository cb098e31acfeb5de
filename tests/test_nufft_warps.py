"""warps.cu on the CPU, thread by thread (block_on_cpu.h), or on a GPU; points sorted with units other than cells."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.farfield_on_cpu import TYPES, host
from tests.test_nufft_kernels import drawn, points

from verglas.kernels.spread import interpolate, located, spread, tabled
from verglas.nufft.window import window_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from verglas.kernels.spread import triton as spread_triton  # noqa: E402
from verglas.kernels.spread import warps  # noqa: E402
from verglas.kernels.spread.tiles import BY_WARPS, Tiled, bin_for, located_triton, tile_for  # noqa: E402

ARGUMENTS = {"spread_warps": "ppppppp" + "iiiiiiii", "interpolate_warps": "pppppp" + "iiiiiiii"}


@functools.lru_cache
def compiled(folder: Path, defines: tuple[str, ...], shared: int) -> ctypes.CDLL:
    """warps.cu for this processor."""
    own = folder / str(abs(hash((defines, shared))))
    own.mkdir()
    header = Path(__file__).with_name("block_on_cpu.h")
    start = f"#define ON_CPU\nalignas(16) static float2 shared_lines[{max(shared // 8, 1)}];\n"
    any_pointer = "struct Any { void *p; template <class T> operator T *() const { return (T *)p; } };\n"
    hosts = "".join(host(name, kinds) for name, kinds in ARGUMENTS.items())
    (own / "host.cpp").write_text(
        f'#include "{header}"\n{start}#include "{warps.SOURCE}"\n{any_pointer}{hosts}'
    )
    options = ["-std=c++20", "-O1", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", *(f"-D{define}" for define in defines)]
    subprocess.run(["g++", *options, "host.cpp", "-o", "host.so"], cwd=own, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(own / "host.so"))


def on_cpu(folder: Path, name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Callable[..., None]:
    """What stands in for `warps.kernel`."""
    run = getattr(compiled(folder, defines, shared), f"run_{name}")

    def launch(grid: tuple[int, int], threads: int, *arguments: torch.Tensor | int) -> None:
        values = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
        run(*grid, threads, *(TYPES[kind][1](value) for kind, value in zip(ARGUMENTS[name], values, strict=True)))

    return launch


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the kernel runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread_triton, "READ_BY_WARPS", range(3, 10))
        if not INTERPRETED:
            yield "cuda"
            return
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        patch.setattr(warps, "THREADS", 32)
        patch.setattr(warps, "kernel", functools.partial(on_cpu, tmp_path_factory.mktemp("warps")))
        yield "cpu"


def check(
    here_points: torch.Tensor, shape: tuple[int, int, int], accuracy: float, crowd: int, device: str, tables: bool = False,
    by_warps: bool = True,
) -> Tiled:  # fmt: skip
    """Spreads as the definition says."""
    taps, count = torch.from_numpy(window_for(accuracy, 2.0, 3).taps_DW), len(here_points)
    here = located(here_points, shape, taps, "reference")
    there = located_triton(here_points.to(device), shape, taps.to(device, torch.float32), crowd, by_warps=by_warps)
    limit = 3e-6
    if tables:  # weights that lie between two numbers are rounded to either
        here, there, limit = tabled(here), tabled(there), 3e-5
        assert isinstance(there, Tiled) and there.table_M3W is not None and there.table_M3W.element_size() == 2
    assert there.order_M.sort()[0].tolist() == list(range(count)) and there.run_T2[:, 1].sum() == there.crowded
    values, grid = drawn(2, count, 2), drawn(2, *shape, 2)
    wanted, found = grid.clone(), grid.to(device, torch.float32, copy=True)
    spread(wanted, here, values, "reference")
    spread(found, there, values.to(device, torch.float32), "triton")
    assert float((found.cpu() - wanted).abs().max()) < limit * float(wanted.abs().max())
    found, wanted = interpolate(grid.to(device, torch.float32), there, "triton"), interpolate(grid, here, "reference")
    assert float((found.cpu() - wanted).abs().max()) < limit * float(wanted.abs().max())
    return there


@pytest.mark.parametrize("accuracy", [3e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])  # windows of 3 to 9 cells
def test_every_width(accuracy: float, device: str) -> None:
    """Points all around a grid that a tile goes around more than once along some axes, and many in one place."""
    there = check(points(150, (17, 18, 21)), (17, 18, 21), accuracy, 1, device)
    assert there.crowded == 150


@pytest.mark.parametrize("crowd", [40, 1000])
def test_some_points_one_by_one(crowd: int, device: str) -> None:
    there = check(points(150, (30, 42, 50)), (30, 42, 50), 1e-3, crowd, device)
    assert there.crowded < 150


@pytest.mark.parametrize("by_warps", [True, False])
@pytest.mark.parametrize("crowd", [1, 40, 1000])
@pytest.mark.parametrize("shape", [(17, 18, 21), (1, 67, 70)])
def test_weights_from_tables(shape: tuple[int, int, int], crowd: int, by_warps: bool, device: str) -> None:
    if not by_warps or shape[0] > 1:
        check(points(150, shape), shape, 1e-3, crowd, device, True, by_warps)


def test_runs_of_a_bin(device: str) -> None:
    """More points in a bin than a warp takes."""
    there = check(5 + 0.1 * points(1300, (24, 24, 24)) / 35, (24, 24, 24), 1e-3, 16, device)
    assert len(there.run_T2) >= 3 and int(there.run_T2[:, 1].max()) <= 512


def test_a_slab(device: str) -> None:
    """Points of the first cells of planes 8 .. 15 alone, on these and those that they reach."""
    shape, taps = (40, 22, 21), torch.from_numpy(window_for(1e-3, 2.0, 3).taps_DW)
    point_M3 = points(400, shape)
    first_M = located(point_M3, shape, taps, "reference").cell_M3[:, 2]
    point_M3 = point_M3[(first_M >= 8) & (first_M < 16)]
    here = located(point_M3, shape, taps, "reference").within(8, 11)
    there = located_triton(point_M3.to(device), shape, taps.to(device, torch.float32), 1, by_warps=True).within(8, 11)
    values, grid = drawn(1, len(here), 2), drawn(1, *here.shape, 2)
    wanted, found = grid.clone(), grid.to(device, torch.float32, copy=True)
    spread(wanted, here, values, "reference")
    spread(found, there, values.to(device, torch.float32), "triton")
    assert float((found.cpu() - wanted).abs().max()) < 3e-6 * float(wanted.abs().max())
    found, wanted = interpolate(grid.to(device, torch.float32), there, "triton"), interpolate(grid, here, "reference")
    assert float((found.cpu() - wanted).abs().max()) < 3e-6 * float(wanted.abs().max())


def test_units_are_those_of_cells(device: str) -> None:
    """Radians counted as cells in double precision, in two and three dimensions."""
    taps = torch.from_numpy(window_for(1e-3, 2.0, 3).taps_DW)
    for shape in ((1, 67, 70), (17, 18, 21)):
        axes = 2 if shape[0] == 1 else 3
        per_unit = tuple(n / (2 * torch.pi) for n in shape[::-1])
        radians = torch.rand(300, axes, generator=torch.Generator().manual_seed(1)) * 40 - 20
        here = located(radians, shape, taps, "reference", per_unit)
        there = located_triton(radians.to(device), shape, taps.to(device, torch.float32), 1, per_unit)
        bins, order = bin_for(there.width, there.tile)[::-1][:axes], there.order_M.cpu().long()
        cells = (there.packed_3M[:axes].cpu() >> 27) & 31
        origin, left = [], there.bin_M.cpu().long()
        for many in there.bins[::-1][:axes]:
            origin.append(left % many)
            left = left // many
        found = cells + torch.stack(origin) * torch.tensor(bins)[:, None]
        assert torch.equal(found.T.int(), here.cell_M3[order][:, :axes])


def test_tiles_fit_into_memory() -> None:
    """Several at a time on a processor; every cell that a point of a bin touches is in its tile, and bins have 5 bits."""
    for width in BY_WARPS:
        tile = tile_for(width, 99, True)
        assert warps.tile_bytes(width, tile) <= 56 * 1024 and min(bin_for(width, tile)) > 1 and max(bin_for(width, tile)) <= 31
