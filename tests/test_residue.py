"""The CUDA kernels of a residue, run on a CPU with one thread a block and on a GPU where there is one: torch's transforms."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels.fold import RadialTable, fold, radial, unfold
from verglas.kernels.fold.residue import SOURCE, Cut, served, suits, turns_of

DRIVERS = """
#include "{shim}"
#include "residue.cu"
#define EACH for (blockIdx.y = 0; blockIdx.y < gy; ++blockIdx.y) for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x)
extern "C" {{
#if PHASE == 0
void run_fold(
    int gx, int gy, const float *v, const Position *s, const int *l, const float2 *p, const float2 *t, float2 *part, int half) {{
    EACH fold_planes(v, s, l, p, t, part, half);
}}
void run_unfold(
    int gx, int gy, const float2 *part, const Position *s, const int *l, const float2 *p, const float2 *t, float *out, int half,
    int fresh) {{
    EACH unfold_planes(part, s, l, p, t, out, half, fresh);
}}
#elif PHASE == 1
void run_rows(int gx, int gy, float2 *part, const float2 *t, int back) {{ EACH along_rows(part, t, back); }}
#else
void run_lines(
    int gx, int gy, float2 *part, const float *k, const float2 *t, float per_step, float last, int strides, int residue) {{
    EACH multiply_lines(part, k, t, per_step, last, strides, residue);
}}
#endif
}}
"""
LINES = 4


def built(folder: Path, planes: int, size: int, wide: bool) -> list[ctypes.CDLL]:
    """The kernels of the three axes for a CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "drivers.cpp").write_text(DRIVERS.format(shim=Path(__file__).with_name("residue_emulated.h")))
    found = []
    for phase in range(3):
        library = folder / f"phase{phase}.so"
        words = [f"-DPHASE={phase}", f"-DPLANES={planes}", f"-DSIZE={size}", f"-DLINES={LINES}", *(["-DWIDE"] if wide else [])]
        command = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", *words, f"-I{SOURCE.parent}", "-o", str(library)]
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


@pytest.mark.parametrize(
    ("radius", "planes", "size", "residue", "wide"),
    [(19.0, 6, 42, 3, 0), (19.0, 42, 42, 0, 0), (16.0, 9, 36, 1, 1), (13.0, 10, 30, 2, 0), (15.0, 8, 40, 0, 1)],
)  # fmt: skip
def test_a_residue_is_that_of_whole_transforms(
    tmp_path: Path, radius: float, planes: int, size: int, residue: int, wide: int
) -> None:
    rows, values_V, table, phase_Z2 = inputs(radius, planes, size, residue)
    assert suits(rows, planes, size)
    along_z, along_y, along_x = built(tmp_path, planes, size, bool(wide))
    columns, half = size // 2 + 1, rows.half
    part = torch.full((planes, size, (columns + 7) // 8 * 8, 2), torch.nan)
    start_ZY = rows.start_ZY.long() if wide else rows.start_ZY
    across = -(-columns // LINES)
    turns_S2 = turns_of(size, torch.device("cpu"))
    tables = address(start_ZY), address(rows.length_ZY), address(phase_Z2), address(turns_S2)
    along_z.run_fold(across, size, address(values_V), *tables, address(part), half)
    along_y.run_rows(across, planes, address(part), address(turns_S2), 1)
    per_step = ctypes.c_float(1 / (size * table.step)), ctypes.c_float(len(table.values_T) - 2)
    factor = address(table.values_T), address(turns_S2), *per_step
    along_x.run_lines(-(-size // LINES), planes, address(part), *factor, size // planes, residue)
    along_y.run_rows(across, planes, address(part), address(turns_S2), 0)
    out_V = torch.full_like(values_V, torch.nan)
    for fresh in (1, 0):
        along_z.run_unfold(across, rows.edge, address(part), *tables, address(out_V), half, fresh)
    should_V = expected(values_V, rows, planes, size, table, residue, phase_Z2)
    assert float((out_V / 2 - should_V).abs().max()) < 2e-6 * float(should_V.abs().max())


@pytest.mark.parametrize(("planes", "size"), [(90, 810), (84, 420), (180, 1620), (540, 1620), (147, 2058), (294, 2058)])
def test_sizes_of_large_boxes_are_served(planes: int, size: int) -> None:
    assert suits(packed_sphere(10.0), planes, size) and max(Cut.of(p, planes, size).shared for p in range(3)) <= 140_000
    assert not suits(packed_sphere(10.0), planes, size + 1) and not suits(packed_sphere(size / 2), planes, size)
    assert not suits(packed_sphere(10.0), 11, 22)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("radius", "planes", "size", "residue"),
    [(100.0, 42, 210, 2), (200.0, 90, 810, 4), (204.0, 84, 420, 1), (300.0, 147, 2058, 3), (150.0, 540, 1620, 1)],
)  # fmt: skip
def test_on_the_gpu(radius: float, planes: int, size: int, residue: int) -> None:
    rows, values_V, table, phase_Z2 = inputs(radius, planes, size, residue, "cuda")
    way = served(rows, planes, size, values_V)
    assert way is not None
    out_V = torch.full_like(values_V, torch.nan)
    for fresh in (True, False):
        way(values_V, way.part(), table, phase_Z2, 0.5, residue, out_V, fresh)
    should_V = expected(values_V, rows, planes, size, table, residue, phase_Z2)
    assert float((out_V - should_V).abs().max()) < 3e-6 * float(should_V.abs().max())
