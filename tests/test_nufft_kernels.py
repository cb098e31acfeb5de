"""`spread` and `interpolate`: all versions against the plain one, odd sizes, ends of the grid, adjoint, threads."""

from __future__ import annotations

import os

import numba
import pytest
import torch

from verglas.kernels.spread import Places, interpolate, located, spread
from verglas.kernels.spread.cpu import _cuts
from verglas.kernels.spread.reference import located_reference
from verglas.nufft.window import window_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 19, 22), (17, 18, 21)]


def points(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Positions in cells, some far outside the grid, some on its very ends, many in one place; float64."""
    generator = torch.Generator().manual_seed(1)
    point_M3 = (torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5) * 70
    point_M3[: count // 3] = 5 + 0.3 * point_M3[: count // 3] / 35
    point_M3[-1], point_M3[-2] = 0.0, torch.tensor(shape[::-1])
    return point_M3


def places(shape: tuple[int, int, int], dtype: torch.dtype, device: str, count: int = 150, accuracy: float = 1e-3) -> Places:
    taps = torch.from_numpy(window_for(accuracy, 2.0, 3).taps_DW).to(device, dtype)
    return located_reference(points(count, shape).to(device), shape, taps)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def agree(here: Places, there: Places, batch: int, name: str, limit: float) -> None:
    """Assert that this version does at `there` what the plain one does at `here`, the same points in float64."""
    values, grid = drawn(batch, len(here), 2), drawn(batch, *here.shape, 2)
    value_there, grid_there = (some.to(there.taps_DW, copy=True) for some in (values, grid))
    found, wanted = interpolate(grid_there, there, name), interpolate(grid, here, "reference")
    assert float((found.cpu() - wanted).abs().max()) < limit * float(wanted.abs().max())
    spread(grid_there, there, value_there, name)
    spread(grid, here, values, "reference")
    assert float((grid_there.cpu() - grid).abs().max()) < limit * float(grid.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_points_are_located_alike(shape: tuple[int, int, int]) -> None:
    taps = torch.from_numpy(window_for(1e-3, 2.0, 3).taps_DW)
    one, other = (located(points(150, shape), shape, taps, name) for name in ("reference", "cpu"))
    assert torch.equal(one.cell_M3, other.cell_M3) and torch.equal(one.order_M, other.order_M)
    assert torch.equal(one.first_of_bin_Z, other.first_of_bin_Z)
    axes = 2 if shape[0] == 1 else 3
    assert torch.equal(one.fraction_M3[:, :axes], other.fraction_M3[:, :axes])
    assert float(one.fraction_M3.abs().max()) <= 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_versions_agree(shape: tuple[int, int, int]) -> None:
    here = places(shape, torch.float64, "cpu")
    agree(here, here, 2, "cpu", 1e-13)


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("accuracy", [1e-3, 1e-5])
@pytest.mark.parametrize("crowd", [1, 40, 1000])  # all points in tiles, some, none
@pytest.mark.parametrize("shape", [(1, 67, 70), (17, 18, 21)])
def test_tiles_agree(shape: tuple[int, int, int], crowd: int, accuracy: float) -> None:
    from verglas.kernels.spread.tiles import located_triton

    device, count = "cpu" if INTERPRETED else "cuda", 150
    here = places(shape, torch.float64, "cpu", count, accuracy)
    there = located_triton(points(count, shape).to(device), shape, here.taps_DW.to(device, torch.float32), crowd, by_warps=False)
    assert (0 < there.crowded < count) if crowd == 40 else there.crowded == (count if crowd == 1 else 0)
    assert there.run_T2[:, 1].sum() == there.crowded and there.order_M.sort()[0].tolist() == list(range(count))
    agree(here, there, 2, "triton", 3e-6)


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("crowd", [1, 1000])
@pytest.mark.parametrize("shape", [(1, 21, 18), (22, 18, 21)])
def test_a_slab_of_tiles(shape: tuple[int, int, int], crowd: int) -> None:
    from verglas.kernels.spread.tiles import located_triton

    device, axis = "cpu" if INTERPRETED else "cuda", 2 if shape[0] > 1 else 1
    taps = torch.from_numpy(window_for(1e-3, 2.0, 3).taps_DW)
    point_M3 = points(400, shape)
    first_M = located(point_M3, shape, taps, "reference").cell_M3[:, axis]
    point_M3 = point_M3[(first_M >= 8) & (first_M < 16)]
    here = located(point_M3, shape, taps, "reference").within(8, 11)
    there = located_triton(point_M3.to(device), shape, taps.to(device, torch.float32), crowd, by_warps=False).within(8, 11)
    assert there.crowded == (len(there) if crowd == 1 else 0)
    agree(here, there, 1, "triton", 3e-6)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_interpolation_is_the_transpose(name: str) -> None:
    shape = SHAPES[1]
    here, values, grid = places(shape, torch.float64, "cpu"), drawn(2, 150, 2), drawn(2, *shape, 2)
    sums = torch.zeros_like(grid)
    spread(sums, here, values, name)
    one, other = (sums * grid).sum(), (values * interpolate(grid, here, name)).sum()
    assert float((one - other).abs()) < 1e-13 * float(sums.norm() * grid.norm())


def test_sums_do_not_depend_on_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (50, 18, 21)
    here, values = places(shape, torch.float64, "cpu", 600), drawn(1, 600, 2)
    alone, shared = torch.zeros(1, *shape, 2, dtype=torch.float64), torch.zeros(1, *shape, 2, dtype=torch.float64)
    spread(alone, here, values, "cpu")
    monkeypatch.setattr(numba, "get_num_threads", lambda: 3)  # slabs are cut for three, whoever works on them
    assert len(_cuts(here)) > 3
    spread(shared, here, values, "cpu")
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(1, 21, 18), (22, 18, 21)])
def test_a_slab_has_its_part_of_the_sums(name: str, shape: tuple[int, int, int]) -> None:
    """Points whose first cells are planes 8 .. 15 (rows, in a plane), on these and those that they reach."""
    axis = 2 if shape[0] > 1 else 1
    taps = torch.from_numpy(window_for(1e-3, 2.0, 3).taps_DW)
    point_M3 = points(400, shape)
    first_M = located(point_M3, shape, taps, "reference").cell_M3[:, axis]
    whole = located(point_M3[(first_M >= 8) & (first_M < 16)], shape, taps, name)
    count = 8 + whole.width - 1
    slab, values = whole.within(8, count), drawn(1, len(whole), 2)
    grid, part = drawn(1, *shape, 2), torch.zeros(1, *slab.shape, 2, dtype=torch.float64)
    wanted = torch.zeros_like(grid)
    spread(wanted, whole, values, name)
    spread(part, slab, values, name)
    inside = (slice(None),) * (3 - axis) + (slice(8, 8 + count),)
    torch.testing.assert_close(part, wanted[inside], rtol=0, atol=1e-13)
    torch.testing.assert_close(interpolate(grid[inside].contiguous(), slab, name), interpolate(grid, whole, name))


def test_no_points() -> None:
    shape = SHAPES[1]
    taps = torch.from_numpy(window_for(1e-3, 2.0, 3).taps_DW)
    nothing = located(torch.zeros(0, 3, dtype=torch.float64), shape, taps)
    grid = drawn(1, *shape, 2)
    before = grid.clone()
    spread(grid, nothing, torch.zeros(1, 0, 2, dtype=torch.float64))
    assert torch.equal(grid, before) and interpolate(grid, nothing).shape == (1, 0, 2)
