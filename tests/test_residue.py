"""The CUDA kernels of a residue, run on a CPU with one thread a block and on a GPU where there is one: torch's transforms."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels.fold import RadialTable, fold, radial, unfold
from verglas.kernels.fold.residue import NO_MIRROR, SOURCE, Cut, Residues, most_kept, pairs_of, served, suits, turns_of
from verglas.maximization.stride import StrideConvolution

DRIVERS = """
#include "{shim}"
#include "residue.cu"
extern "C" {{
#if PHASE == 0
void run_fold(
    int gx, int gy, const float *v, const Place *s, const int *r, const float2 *p, const float2 *t, float2 *part, int half) {{
    over_blocks(gx, gy, [=] {{ fold_planes(v, s, r, p, t, part, half); }});
}}
void run_unfold(
    int gx, int gy, const float2 *part, const Place *s, const int *r, const float2 *p, const float2 *t, float *out, int half,
    int fresh, float *quotient, float least) {{
    over_blocks(gx, gy, [=] {{ unfold_planes(part, s, r, p, t, out, half, fresh, quotient, least); }});
}}
#elif PHASE == 1
void run_back(int gx, int gy, float2 *part, const int *top, const float2 *t) {{
    over_blocks(gx, gy, [=] {{ back_along_rows(part, top, t); }});
}}
void run_rows(int gx, int gy, float2 *part, const int *top, const float2 *t) {{
    over_blocks(gx, gy, [=] {{ along_rows(part, top, t); }});
}}
#else
void run_lines(
    int gx, int gy, float2 *part, const float2 *k, const float2 *t, float per_step, float last, int strides, int residue) {{
    over_blocks(gx, gy, [=] {{ multiply_lines(part, k, t, per_step, last, strides, residue); }});
}}
#endif
}}
"""
LINES = 4


def built(folder: Path, planes: int, size: int, wide: bool, mirror: int) -> list[ctypes.CDLL]:
    """The kernels of the three axes for a CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "drivers.cpp").write_text(DRIVERS.format(shim=Path(__file__).with_name("residue_emulated.h")))
    found = []
    for phase in range(3):
        library = folder / f"phase{phase}.so"
        words = [f"-DPHASE={phase}", f"-DPLANES={planes}", f"-DSIZE={size}", f"-DLINES={LINES}", *(["-DWIDE"] if wide else [])]
        words += [f"-DMIRROR={mirror}", f"-I{SOURCE.parent}", "-o", str(library)]
        command = ["g++", "-O1", "-std=c++20", "-pthread", "-w", "-shared", "-fPIC", *words]
        subprocess.run([*command, str(folder / "drivers.cpp")], check=True)
        found.append(ctypes.CDLL(str(library)))
    return found


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def expected(
    values_V: torch.Tensor, rows: RowTable, planes: int, size: int, table: RadialTable, residue: int, phase_Z2: torch.Tensor
) -> torch.Tensor:
    part = torch.view_as_complex(fold(values_V, rows, phase_Z2, (planes, size, size // 2 + 1)))
    real = torch.fft.irfftn(part, s=(planes, size, size), norm="forward")
    radial(real, table, size // planes, residue)
    out_V = torch.zeros_like(values_V)
    unfold(torch.view_as_real(torch.fft.rfftn(real)), rows, phase_Z2, out_V)
    return out_V


def inputs(
    radius: float, planes: int, size: int, residue: int, device: str = "cpu"
) -> tuple[RowTable, torch.Tensor, RadialTable, torch.Tensor]:
    rows = packed_sphere(radius, device)
    values_V = torch.rand(rows.count, generator=torch.Generator().manual_seed(size)).to(device)
    values_V[rows.start_ZY[rows.length_ZY > 0].long()] = 0.5  # even, as weights are: (0, y, z) and (0, -y, -z) are one
    table = RadialTable(torch.linspace(1, 0, 50, device=device).square() / size**3, 0.5 / 48)
    z = torch.arange(-rows.half, rows.half + 1, dtype=torch.float64, device=device) * (2 * np.pi * residue / size)
    return rows, values_V, table, torch.stack([z.cos(), z.sin()], 1).float()


# Radices 3, 4, 5, 7, 9, 10, 12, 14, 15; residues without a mirror, 0, and half of the strides, of even and odd numbers of planes.
@pytest.mark.parametrize(
    ("radius", "planes", "size", "residue", "wide"),
    [(19.0, 6, 42, 2, 0), (19.0, 42, 42, 0, 0), (16.0, 9, 36, 1, 1), (13.0, 10, 30, 1, 0), (15.0, 8, 40, 0, 1),
     (33.0, 35, 70, 1, 0), (13.0, 15, 30, 0, 0), (28.0, 30, 60, 1, 1), (70.0, 150, 150, 0, 0), (80.0, 84, 168, 1, 0)],
)  # fmt: skip
def test_a_residue_is_that_of_whole_transforms(
    tmp_path: Path, radius: float, planes: int, size: int, residue: int, wide: int
) -> None:
    rows, values_V, table, phase_Z2 = inputs(radius, planes, size, residue)
    way = Residues(rows, planes, size)
    mirror, kept, columns = way.mirror(residue), way.kept(residue), size // 2 + 1
    assert suits(rows, planes, size) and way.part().shape == (most_kept(planes, size), size, (columns + 7) // 8 * 8, 2)
    along_z, along_y, along_x = built(tmp_path, planes, size, bool(wide), mirror)
    part = torch.full((kept, size, (columns + 7) // 8 * 8, 2), torch.nan)
    places_YZ2 = way.places_YZ2.long() if wide else way.places_YZ2
    across = -(-columns // LINES)
    turns_S2 = turns_of(size, torch.device("cpu"))
    tables = address(places_YZ2), address(way.reach_Y), address(phase_Z2), address(turns_S2)
    along_z.run_fold(across, size, address(values_V), *tables, address(part), rows.half)
    of_rows = address(part), address(way.top_X), address(turns_S2)
    along_y.run_back(across, kept, *of_rows)
    per_step = ctypes.c_float(1 / (size * table.step)), ctypes.c_float(len(table.values_T) - 2)
    table_T2 = pairs_of(table.values_T * (0.5 if mirror == NO_MIRROR else 0.25))
    factor = address(table_T2), address(turns_S2), *per_step
    along_x.run_lines(-(-size // LINES), kept, address(part), *factor, size // planes, residue)
    along_y.run_rows(across, kept, *of_rows)
    out_V, quotient_V = torch.full_like(values_V, torch.nan), torch.ones_like(values_V)
    nothing, least = ctypes.c_void_p(0), ctypes.c_float(1e-12)
    for fresh in (1, 0):
        along_z.run_unfold(across, rows.edge, address(part), *tables, address(out_V), rows.half, fresh, nothing, least)
    should_V = expected(values_V, rows, planes, size, table, residue, phase_Z2)
    assert float((out_V / 2 - should_V).abs().max()) < 2e-6 * float(should_V.abs().max())
    divided = address(out_V), rows.half, 0, address(quotient_V), least
    along_z.run_unfold(across, rows.edge, address(part), *tables, *divided)
    torch.testing.assert_close(quotient_V, 1 / (out_V * 1.5).abs().clamp_min(1e-12), rtol=1e-2, atol=0)
    assert float((1 / quotient_V - (out_V * 1.5).abs()).abs().max()) < 2e-6 * float(out_V.abs().max())


@pytest.mark.parametrize(
    ("planes", "size"), [(810, 810), (84, 420), (180, 1620), (1620, 1620), (540, 1620), (147, 2058), (2058, 2058)]
)
def test_sizes_of_large_boxes_are_served(planes: int, size: int) -> None:
    assert suits(packed_sphere(10.0), planes, size) and max(Cut.of(p, planes, size).shared for p in range(3)) <= 140_000
    assert not suits(packed_sphere(10.0), planes, size + 1) and not suits(packed_sphere(size / 2), planes, size)
    assert not suits(packed_sphere(10.0), 11, 22)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("radius", "planes", "size", "residue"),
    [(100.0, 42, 210, 2), (200.0, 90, 810, 4), (204.0, 210, 420, 1), (300.0, 147, 2058, 3), (150.0, 540, 1620, 1),
     (150.0, 810, 1620, 1), (200.0, 810, 810, 0), (204.0, 420, 420, 0), (150.0, 1620, 1620, 0), (250.0, 1029, 2058, 1)],
)  # fmt: skip
def test_on_the_gpu(radius: float, planes: int, size: int, residue: int) -> None:
    rows, values_V, table, phase_Z2 = inputs(radius, planes, size, residue, "cuda")
    way = served(rows, planes, size, values_V)
    assert way is not None
    out_V, divided_V = torch.full_like(values_V, torch.nan), torch.ones_like(values_V)
    for fresh in (True, False):
        way(values_V, way.part(), table, phase_Z2, 0.5, residue, out_V, fresh)
    should_V = expected(values_V, rows, planes, size, table, residue, phase_Z2)
    assert float((out_V - should_V).abs().max()) < 3e-6 * float(should_V.abs().max())
    way(values_V, way.part(), table, phase_Z2, 1, residue, divided_V, True, divided_V, 1e-12)
    assert float((1 / divided_V - should_V.abs()).abs().max()) < 3e-6 * float(should_V.abs().max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strides", [1, 2, 3, 5])
def test_quotients_on_the_gpu(strides: int) -> None:
    """Of all residues, in place, beside the same in double precision by transforms of torch."""
    size = 210
    rows, values_V, _, _ = inputs(100.0, size // strides, size, 0, "cuda")
    factor = RadialTable(torch.linspace(1, 0.2, 50, device="cuda"), 0.5 / 48)
    should_V = values_V.double().cpu()
    double = replace(factor, values_T=factor.values_T.double().cpu())
    StrideConvolution(rows.to("cpu"), size, double, strides).quotients(should_V, 1e-6)
    StrideConvolution(rows, size, factor, strides).quotients(values_V, 1e-6)
    torch.testing.assert_close(values_V.double().cpu(), should_V, rtol=1e-5, atol=0)
