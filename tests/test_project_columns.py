"""Slices of a volume copied into columns (from its second use on) are those of the plain kernel, to the bit."""

from __future__ import annotations

import pytest
import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere
from verglas.kernels.project import cpu as kernel
from verglas.kernels.project import project


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [3.0, 8.5, 20.0])
def test_columns_give_the_same_slices(radius: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(int(radius))
    rows = packed_sphere(radius)
    values = torch.randn(rows.count, 2, dtype=dtype, generator=generator)
    coordinates = half_plane_pixels(24).coordinates_K3(dtype)  # up to twice 12 voxels: also beyond the smaller radii
    sampling = 2 * random_rotations(5, generator).to(dtype)
    plain = project(values, rows, sampling, coordinates, "cpu")
    assert kernel.columns_of(values, rows) is not None
    assert torch.equal(project(values, rows, sampling, coordinates, "cpu"), plain)
    expected = project(values.double(), rows, sampling.double(), coordinates.double(), "reference")
    torch.testing.assert_close(plain.double(), expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-12)
    values.mul_(3)  # a volume that was changed is no longer what its columns hold
    torch.testing.assert_close(project(values, rows, sampling, coordinates, "cpu"), 3 * plain)
    project(values, rows, sampling, coordinates, "cpu")
    torch.testing.assert_close(project(values, rows, sampling, coordinates, "cpu"), 3 * plain)


def test_columns_go_with_their_volume() -> None:
    rows = packed_sphere(4.0)
    values = torch.ones(rows.count, 2)
    before = len(kernel._COLUMNS)
    kernel.columns_of(values, rows)
    assert kernel.columns_of(values, rows) is not None and len(kernel._COLUMNS) == before + 1
    del values
    assert len(kernel._COLUMNS) == before


def test_large_volumes_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = packed_sphere(4.0)
    monkeypatch.setattr(kernel, "LARGEST", rows.count - 1)
    values = torch.ones(rows.count, 2)
    assert kernel.columns_of(values, rows) is None and kernel.columns_of(values, rows) is None
