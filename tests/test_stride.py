"""The convolution by strides against one transform, its kernels, what ranks send; exact gridding weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from verglas.core.rows import RowTable, packed_sphere
from verglas.distributed.ranks import ALONE, Ranks
from verglas.errors import InputError
from verglas.kernels.fold import divide, fold, radial, unfold
from verglas.maximization.device_memory import DeviceMemory
from verglas.maximization.gridding import blob_factor, blob_transform, even_out, memory
from verglas.maximization.stride import StrideConvolution, residue_bytes, strides_for, voxels_in
from verglas.projection.volume import unpack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RANKS = 2
DEVICES = {"cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda"}


def versions() -> list[pytest.param]:
    runnable = INTERPRETED or torch.cuda.is_available()
    skip = pytest.mark.skipif(not runnable, reason="Triton needs a GPU or TRITON_INTERPRET=1")
    return [pytest.param("cpu"), pytest.param("triton", marks=skip)]


def even_voxels(rows: RowTable) -> torch.Tensor:
    """Random voxels, float64, alike at (0, y, z) and (0, -y, -z), 0 from the radius on."""
    generator = torch.Generator().manual_seed(1)
    values_V = torch.rand(rows.count, generator=generator, dtype=torch.float64)
    x, y, z = rows.coordinates_V3().long().unbind(1)
    values_V[x * x + y * y + z * z >= rows.radius**2] = 0
    partner = rows.start_ZY[-z + rows.half, -y + rows.half].long()
    return torch.where(x == 0, (values_V + values_V[torch.where(x == 0, partner, 0)]) / 2, values_V)


def by_one_transform(values_V: torch.Tensor, rows: RowTable, size: int) -> torch.Tensor:
    """The convolution in float64 by one dense transform, at the voxels within the radius."""
    dense = torch.view_as_real(unpack(torch.stack([values_V, 0 * values_V], 1), rows, size))[..., 0]
    real = torch.fft.irfftn(dense.to(torch.complex128), s=(size,) * 3)
    axis = torch.fft.fftfreq(size, dtype=torch.float64)
    r = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    table = blob_factor(2.0, values_V)
    factor = np.interp(r.numpy(), np.arange(len(table.values_T)) * table.step, table.values_T.numpy())
    found = torch.fft.rfftn(real * torch.from_numpy(factor)).real
    x, y, z = rows.coordinates_V3().long().unbind(1)
    inside = (x * x + y * y + z * z) < rows.radius**2
    return torch.where(inside, found[z % size, y % size, torch.where(inside, x, 0)], 0)


@pytest.mark.parametrize("strides", range(1, 9))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_strides_make_one_transform(strides: int, dtype: torch.dtype, limit: float) -> None:
    size = 4 * strides if strides > 2 else 20
    rows = packed_sphere(size / 2 - 1)
    values_V = even_voxels(rows)
    wanted = by_one_transform(values_V, rows, size)
    found = StrideConvolution(rows, size, blob_factor(2.0, values_V.to(dtype)), strides)(values_V.to(dtype))
    assert float((found - wanted)[wanted != 0].abs().max()) < limit * float(wanted.abs().max())


@pytest.mark.parametrize("name", versions())
@pytest.mark.parametrize("planes", [18, 9, 3])
def test_fold_and_unfold(name: str, planes: int) -> None:
    size, columns, dtype = 18, 8, torch.float32 if name == "triton" else torch.float64
    rows = packed_sphere(9)
    values_V = even_voxels(rows) + 1  # also beyond the radius and the columns, which is not to be read
    phase_Z2 = torch.randn(rows.edge, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    here = rows.to(DEVICES[name])
    wanted = fold(values_V, rows, phase_Z2, (planes, size, columns), "reference")
    found = fold(values_V.to(DEVICES[name], dtype), here, phase_Z2, (planes, size, columns), name).cpu()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-5)
    out_V, other_V = values_V.clone(), values_V.to(DEVICES[name], dtype, copy=True)
    unfold(wanted, rows, phase_Z2, out_V, "reference")
    unfold(wanted.to(DEVICES[name], dtype), here, phase_Z2, other_V, name)
    torch.testing.assert_close(other_V.cpu().double(), out_V, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-4)
    adjoint = (wanted * wanted).sum() - ((out_V - values_V) * values_V).sum()
    assert abs(float(adjoint)) < 1e-12 * float((wanted * wanted).sum())


@pytest.mark.parametrize("name", versions())
def test_products_with_a_function_of_the_distance(name: str) -> None:
    dtype = torch.float32 if name == "triton" else torch.float64
    planes_MYX = torch.rand(6, 18, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = planes_MYX.to(DEVICES[name], dtype, copy=True)
    radial(planes_MYX, blob_factor(2.0, planes_MYX), 3, 2, "reference")
    radial(found, blob_factor(2.0, found), 3, 2, name)
    torch.testing.assert_close(found.cpu().double(), planes_MYX, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


def test_the_blob_is_that_of_its_definition() -> None:
    """Its transform by numerical integration of sinc(2 pi r t) I0(alpha sqrt(1 - t²/a²)) t² over the ball."""
    a = 3.8
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) * (a / 20000)
    profile = torch.special.i0(15 * (1 - (t / a) ** 2).sqrt()) * t**2
    r = torch.tensor([0.0, 0.1, 0.3, 0.6, 0.7, 0.86], dtype=torch.float64)
    wanted = (torch.special.sinc(2 * r[:, None] * t) * profile).sum(1) / profile.sum()
    torch.testing.assert_close(blob_transform(r, 2.0), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", versions())
def test_quotients(name: str) -> None:
    dtype = torch.float32 if name == "triton" else torch.float64
    generator = torch.Generator().manual_seed(4)
    values_V, divisor_V = torch.rand(5000, generator=generator), torch.randn(5000, generator=generator)
    values_V[7], divisor_V[7] = 0, 0
    found_V = values_V.to(DEVICES[name], dtype, copy=True)
    divide(found_V, divisor_V.to(found_V), 0.1, name)
    wanted_V = values_V.double()
    divide(wanted_V, divisor_V.double(), 0.1, "reference")
    torch.testing.assert_close(found_V.cpu().double(), wanted_V, rtol=1e-6, atol=0)
    assert float(wanted_V.max()) <= 10 and float(found_V[7]) == 0


def evened(weight_V: torch.Tensor, rows: RowTable, iterations: int = 10, ranks: Ranks = ALONE) -> torch.Tensor:
    """v w of the weights within the radius."""
    x, y, z = rows.coordinates_V3().unbind(1)
    product_V = torch.where(x * x + y * y + z * z < rows.radius**2, weight_V, 0)
    even_out(product_V, rows, 24, 2.0, iterations, ranks)
    return product_V


def test_gridding_makes_the_sampling_even() -> None:
    rows = packed_sphere(12.0)
    weight_V = 0.2 + even_voxels(rows)
    x, y, z = rows.coordinates_V3().unbind(1)
    r = (x * x + y * y + z * z).double().sqrt()
    convolved = StrideConvolution(rows, 28, blob_factor(2.0, weight_V, 27 / 24), 1)  # as `even_out` does it

    def unevenness(iterations: int) -> float:
        return float((convolved(evened(weight_V, rows, iterations))[r < 7] - 1).abs().max())  # near the edge it cannot be even

    assert unevenness(10) < 0.04 and unevenness(10) < 0.5 * unevenness(2)
    assert float(evened(weight_V, rows)[r >= 12].abs().max()) == 0
    torch.testing.assert_close(evened(3 * weight_V, rows), evened(weight_V, rows), rtol=1e-9, atol=0)


def shared_convolution(rank: int, folder: str) -> None:
    """What each process does; its result and what it sent go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", RANKS), rank=rank, world_size=RANKS)
    rows = packed_sphere(11.0)
    values_V = even_voxels(rows)
    ranks = Ranks(rank, RANKS, RANKS)
    convolved = StrideConvolution(rows, 24, blob_factor(2.0, values_V), 4, ranks)
    found_V = convolved(values_V)
    weights_V = evened(values_V + 0.1, rows, 2, ranks)
    entry = ranks.meter.entries["convolution"]
    torch.save((found_V, weights_V, entry.bytes / entry.count, convolved.traffic(values_V)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_the_strides(tmp_path: Path) -> None:
    multiprocessing.spawn(shared_convolution, (str(tmp_path),), RANKS)
    rows = packed_sphere(11.0)
    values_V = even_voxels(rows)
    wanted = by_one_transform(values_V, rows, 24)
    weights_V = evened(values_V + 0.1, rows, 2)
    for rank in range(RANKS):
        found_V, shared_V, sent, expected = torch.load(tmp_path / f"rank{rank}.pt")
        assert float((found_V - wanted)[wanted != 0].abs().max()) < 1e-13 * float(wanted.abs().max())
        torch.testing.assert_close(shared_V, weights_V, rtol=1e-10, atol=0)
        assert sent == expected == 2 * (RANKS - 1) / RANKS * 8 * rows.count


def test_strides_fit_memory() -> None:
    assert strides_for(64, 4) == 8 and strides_for(30, 4) == 5  # half the transforms, before passes over the voxels tell
    assert [strides_for(1620, size) for size in (4, 8)] == [15, 15] and strides_for(2160, 4) == 15
    for size in (432, 810, 1620, 2160):
        assert residue_bytes(size, strides_for(size, 4), 4) <= max(1e9, 6 * voxels_in(size))
    assert strides_for(64, 4, 8) == 16 and strides_for(64, 4, 2) == 8
    with pytest.raises(ValueError, match="strides"):
        strides_for(8, 4, 5)
    with pytest.raises(ValueError, match="divide"):
        StrideConvolution(packed_sphere(3.0), 8, blob_factor(2.0, torch.zeros(1)), 3)
    assert residue_bytes(1620, 1, 4, True) == 8 * 1620 * 818 * 811 and residue_bytes(1620, 3, 4, True) == 8 * 1620 * 818 * 540
    voxels = packed_sphere(800.0).count
    assert strides_for(1620, 4, fused=True) == 2 and strides_for(1620, 4, fused=True, result=4.0 * voxels) == 1
    assert memory(voxels, 800.0) == residue_bytes(1620, 1, 4, True)  # the convolution itself is not kept
    assert memory(voxels, 800.0, granted=3e9) == 4 * voxels + residue_bytes(1620, 6, 4, True)
    assert strides_for(810, 4, 2, fused=True) == 2  # a residue for each of two ranks


def test_memory_of_a_reconstruction() -> None:
    """By hand: 400 px, radius 400 of the padded grid of 800, convolved on 810 at once: 406 of 810 planes."""
    voxels = packed_sphere(400.0).count
    found = DeviceMemory.of(400, 200, exact=True)
    assert found.adding == 16 * voxels + 2.2e9
    assert found.evening == (16 + 4) * voxels + 4 * 810 * (810 + 16) * 406
    assert found.mapping == 20 * voxels + 8 * 400**2 * 401 + 4 * 400**3 + 2.2e9
    assert found.peak == found.mapping and DeviceMemory.of(400, 200).evening == 0
    assert DeviceMemory.of(400, 200, sets=2).adding == 32 * voxels + 2.2e9
    turned = DeviceMemory.of(400, 200, turned=True)
    assert turned.adding == 40 * voxels + 2.2e9 and turned.mapping == found.mapping + 8 * voxels
    largest = DeviceMemory.of(1024, 512, exact=True)
    assert largest.peak < 80e9
    assert "at most 62.8 GB expected, of 80 GB" in largest.verdict(80e9) and "may not fit" in largest.verdict(60e9)
    with pytest.raises(InputError, match="for the sums alone"):
        largest.verdict(30e9)
