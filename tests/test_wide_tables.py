"""Volumes of more voxels than 32-bit numbers count: every kernel finds them. Memory is a sparse file, hardly touched."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels import voxels
from verglas.kernels.backproject import backproject
from verglas.kernels.fold import fold, unfold
from verglas.kernels.project import project
from verglas.kernels.project.cpu import LARGEST

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BEFORE = 2**31 + 12345  # voxels that lie before those of the volume
VERSIONS = ["reference", "cpu", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter"))]


def wide(rows: RowTable) -> RowTable:
    """The same rows behind `BEFORE` voxels that nobody asks for."""
    return RowTable(rows.radius, rows.half, rows.start_ZY.long() + BEFORE, rows.length_ZY, rows.count + BEFORE)


def sparse(path: Path, rows: RowTable, components: int) -> torch.Tensor:
    """Zeros [V, components] in a file that takes no room where nothing is written."""
    count = rows.count * components
    with open(path, "wb") as file:
        file.truncate(4 * count)
    values = torch.from_file(str(path), shared=True, size=count)
    return values.view(rows.count, components) if components > 1 else values


def test_large_tables_count_in_64_bits() -> None:
    small, large = packed_sphere(100.0), packed_sphere(1024.0)
    assert small.start_ZY.dtype == torch.int32
    assert large.start_ZY.dtype == torch.int64 and large.count > 2**31
    ends = (large.start_ZY + large.length_ZY).flatten()
    assert torch.equal(ends[:-1], large.start_ZY.flatten()[1:]) and int(ends[-1]) == large.count
    planes_Z = torch.arange(large.edge) == large.half
    assert large.only(planes_Z).start_ZY.dtype == torch.int32
    assert large.only(~planes_Z).start_ZY.dtype == torch.int64


@pytest.mark.parametrize("name", VERSIONS)
def test_slices_are_added_and_cut(name: str, tmp_path: Path) -> None:
    rows, pixels = packed_sphere(8.0), half_plane_pixels(8)
    generator = torch.Generator().manual_seed(1)
    sampling_R33 = (2 * random_rotations(3, generator)).float()
    data_R2K, weight_RK = torch.randn(3, 2, pixels.count, generator=generator), torch.rand(3, pixels.count, generator=generator)
    coordinates_K3 = pixels.coordinates_K3(torch.float32)
    small_V4, far_V4 = torch.zeros(rows.count, 4), sparse(tmp_path / "sums", wide(rows), 4)
    for table, sums_V4 in ((rows, small_V4), (wide(rows), far_V4)):
        backproject(sums_V4, table, data_R2K, weight_RK, sampling_R33, coordinates_K3, name)
    torch.testing.assert_close(far_V4[BEFORE:], small_V4, rtol=0, atol=0)
    far_V2 = sparse(tmp_path / "volume", wide(rows), 2)
    far_V2[BEFORE:] = small_V4[:, :2]
    assert len(far_V2) > LARGEST  # so that the CPU reads the rows themselves
    wanted_R2K = project(small_V4[:, :2].contiguous(), rows, sampling_R33, coordinates_K3, name)
    found_R2K = project(far_V2, wide(rows), sampling_R33, coordinates_K3, name)
    torch.testing.assert_close(found_R2K, wanted_R2K, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", VERSIONS[1:])
def test_planes_are_folded(name: str, tmp_path: Path) -> None:
    rows = packed_sphere(8.0)
    values_V, far_V = torch.rand(rows.count, generator=torch.Generator().manual_seed(1)), sparse(tmp_path / "v", wide(rows), 1)
    far_V[BEFORE:] = values_V
    phase_Z2 = torch.randn(rows.edge, 2, generator=torch.Generator().manual_seed(2))
    wanted = fold(values_V, rows, phase_Z2, (9, 18, 10), name)
    assert torch.equal(fold(far_V, wide(rows), phase_Z2, (9, 18, 10), name), wanted)
    unfold(wanted, rows, phase_Z2, values_V, name)
    unfold(wanted, wide(rows), phase_Z2, far_V, name)
    assert torch.equal(far_V[BEFORE:], values_V)


def test_passes_over_voxels(tmp_path: Path) -> None:
    rows = packed_sphere(8.0)
    weight_V, far_V = torch.rand(rows.count, generator=torch.Generator().manual_seed(1)), sparse(tmp_path / "w", wide(rows), 1)
    far_V[BEFORE:] = weight_V
    wanted, found = (voxels.shell_sums_cpu(w, t, 2.0, 5, 0.5) for w, t in ((weight_V, rows), (far_V, wide(rows))))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted))


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter")
def test_cells() -> None:
    from verglas.kernels.project.cells import make_cells, project_cells

    rows, pixels = packed_sphere(8.0), half_plane_pixels(8)
    generator = torch.Generator().manual_seed(1)
    values_V2 = torch.randn(rows.count, 2, generator=generator).half()
    sampling_R33 = (2 * random_rotations(2, generator)).float()
    cells = make_cells(values_V2, rows, 1.0)
    far = make_cells(values_V2, replace(rows, start_ZY=rows.start_ZY.long()), 1.0)
    assert torch.equal(far.words, cells.words)
    far = replace(far, plane_Z2=far.plane_Z2.long())
    coordinates_K3 = pixels.coordinates_K3(torch.float32)
    assert torch.equal(project_cells(far, sampling_R33, coordinates_K3), project_cells(cells, sampling_R33, coordinates_K3))
