"""axes.cu on the CPU, thread by thread (block_on_cpu.h), or on a GPU: against torch in double precision."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.axes_on_cpu import on_cpu

from verglas.core.rows import RowTable, packed_sphere
from verglas.distributed.ranks import ALONE, Ranks
from verglas.maximization.slabs import Slabs
from verglas.maximization.solve import SolvedSums
from verglas.maximization.transforms import MapPart, SharedTransform
from verglas.projection import axes as kernels
from verglas.projection.pruned import PaddedGrid, map_of, voxels_of

CASES = {  # box, padded size, radius: lengths along y and z with factors 2, 5, 11, 13, 7, 3, 15 along x
    "32": (16, 32, 16), "40": (20, 40, 13), "44": (22, 44, 22), "26": (13, 26, 12), "28": (14, 28, 14), "30": (20, 30, 15),
    "54": (27, 54, 20),
}  # fmt: skip
LIMIT = 2e-6


def test_lengths_that_kernels_take() -> None:
    gpu = torch.device("cuda")
    assert kernels.serves(800, 1600, gpu, torch.float32) and kernels.serves(256, 512, gpu, torch.float32)
    for box, size, dtype in ((800, 1600, torch.float64), (134, 268, torch.float32), (64, 128, torch.float32)):
        assert not kernels.serves(box, size, gpu, dtype)  # 268 = 4 x 67
    assert not kernels.serves(800, 1600, torch.device("cpu"), torch.float32)


def test_passes() -> None:
    wanted = {1600: (40, 40), 800: (20, 40), 1024: (32, 32), 512: (16, 32), 2048: (8, 16, 16), 400: (20, 20), 300: (10, 30)}
    for length, radices in wanted.items():
        assert kernels.passes(length, 40) == radices
    for length in (26, 54, 130, 2028, 4394, 7000):
        radices = kernels.passes(length, 40)
        assert math.prod(radices) == length and radices[0] % 2 == 0


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the kernels run: on the CPU axes.cu stands in for a GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SMALLEST", 1)
        if torch.cuda.is_available():
            yield "cuda"
            return
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        patch.setattr(kernels, "kernel", functools.partial(on_cpu, kernels, tmp_path_factory.mktemp("axes")))
        patch.setattr(kernels, "serves", lambda box, size, device, dtype: dtype == torch.float32)
        yield "cpu"


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs of columns."""
    monkeypatch.setattr(kernels, "NUMBERS_AT_ONCE", 2**13)


def made_up(case: str, device: str, wide: bool = False) -> tuple[RowTable, torch.Tensor, torch.Tensor]:
    """Rows, sums [V, 4] as accumulators hold them, a map; on x = 0 of a real map."""
    box, size, radius = CASES[case]
    rows, generator = packed_sphere(float(radius), device), torch.Generator().manual_seed(size)
    rows = replace(rows, start_ZY=rows.start_ZY.long()) if wide else rows
    map_ZYX = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    sums_V4 = torch.zeros(rows.count, 4, dtype=torch.float64)
    sums_V4[:, :2] = voxels_of(map_ZYX, packed_sphere(float(radius)), size)
    sums_V4[:, 2] = 0.1 + torch.rand(rows.count, generator=generator, dtype=torch.float64)
    start, partner = (table[rows.length_ZY.cpu() > 0].long() for table in (rows.start_ZY.cpu(), rows.start_ZY.cpu().flip(0, 1)))
    sums_V4[start, 2] = (sums_V4[start, 2] + sums_V4[partner, 2]) / 2
    return rows, sums_V4.to(device), map_ZYX.to(device)


def near(found: torch.Tensor, wanted: torch.Tensor, limit: float = LIMIT) -> None:
    assert torch.isfinite(found).all()
    assert float((found.double() - wanted.double()).abs().max()) <= limit * float(wanted.abs().max())


RADICES = [(case, 40) for case in CASES] + [(case, 13) for case in CASES] + [(case, 5) for case in ("32", "40", "30", "54")]


@pytest.mark.parametrize(("case", "largest"), RADICES)
@pytest.mark.usefixtures("small_runs")
def test_maps_of_voxels_and_voxels_of_maps(case: str, largest: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGEST_RADIX", largest)
    box, size, _ = CASES[case]
    rows, sums_V4, map_ZYX = made_up(case, device, wide=case == "40")
    grid, wanted = PaddedGrid.of(rows, box, size), range(3, box - 2)
    for rows_y in (range(box), wanted):
        plain = map_of(grid.filler(sums_V4[:, :2], rows), grid, torch.float64, rows_y)
        found = map_of(grid.filler(sums_V4.float()[:, :2], rows), grid, torch.float32, rows_y)
        near(found, plain)
    plain_V2, found_V2 = voxels_of(map_ZYX, rows, size), voxels_of(map_ZYX.float(), rows, size)
    near(found_V2, plain_V2)
    assert torch.equal(found_V2.any(1), plain_V2.any(1))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.usefixtures("small_runs")
def test_solved_sums(together: bool, device: str) -> None:
    (box, size, radius), (rows, sums_V4, _) = CASES["40"], made_up("40", device)
    shells = radius * box // size
    prior_S = torch.linspace(0, 2, shells + 1, dtype=torch.float64, device=device)
    sums_V4[::7, 2] = 0  # as of voxels that were not seen

    def solved(values_V4: torch.Tensor, **more: Any) -> torch.Tensor:
        weight_V = values_V4[:, 2] if together else values_V4[:, 2].contiguous()
        return SolvedSums(values_V4[:, :2], weight_V, rows, box, shells, size / box).map(prior_S, **more)

    for more in ({}, {"keep_scale": True}):
        near(solved(sums_V4.float(), **more), solved(sums_V4, **more), 1e-5)


@pytest.mark.parametrize("filled", [True, False])
def test_finished_maps(filled: bool, device: str) -> None:
    part = torch.randn(9, 11, 20, generator=torch.Generator().manual_seed(0)).to(device) + 3
    z_A, y = torch.arange(4, 13, device=device), range(2, 13)
    plain, found = MapPart(part.double(), z_A, y), MapPart(part.clone(), z_A, y)
    plain.finish(40, filled, ALONE)
    found.finish(40, filled, ALONE)
    near(found.values_ZYX, plain.values_ZYX)


@pytest.mark.parametrize("form", ["transposed", "replicated"])
def test_ranks_that_exchange_lines(form: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks in one process, one after the other: a first round keeps what they send, a second one delivers it."""
    case = "44"
    (box, size, _), (rows, sums_V4, map_ZYX) = CASES[case], made_up(case, device)
    sent: dict[tuple[int, int], list[torch.Tensor]] = {}
    order: dict[int, int] = {}

    def exchanged(
        self: Ranks, parts: list[torch.Tensor], shapes: list[tuple[int, ...]], name: str, lent: bool
    ) -> list[torch.Tensor]:
        number = order[self.rank] = order.get(self.rank, -1) + 1
        sent[self.rank, number] = [part.clone() for part in parts]
        nothing = [torch.zeros(shape, device=device) for shape in shapes]
        found = [sent[q, number][self.rank] if (q, number) in sent else nothing[q] for q in range(2)]
        assert [one.numel() for one in found] == [math.prod(shape) for shape in shapes]
        whole = torch.cat([one.flatten() for one in found])  # one array, as ranks make it
        return [one.view(shape) for one, shape in zip(whole.split([one.numel() for one in found]), shapes, strict=True)]

    monkeypatch.setattr(Ranks, "exchanging", lambda *given, lent: functools.partial(exchanged, *given, lent))
    slabs = [Slabs.of(rows, size / box, box, Ranks(rank, 2, 2)) for rank in range(2)]
    assert slabs[0] is not None and slabs[1] is not None
    wanted, both = range(1, box - 1), [SharedTransform(one, box, size, form) for one in slabs if one is not None]  # type: ignore[arg-type]
    if form == "transposed":
        for _ in range(2):
            order.clear()
            parts = [one.to_map(one.grid().filler(one.slabs.cut(sums_V4[:, :2].float()), one.slabs.rows), torch.float32, wanted)
                     for one in both]  # fmt: skip
        grid = PaddedGrid.of(rows, box, size)
        plain = map_of(grid.filler(sums_V4[:, :2], rows), grid, torch.float64, wanted)
        near(torch.cat([part.values_ZYX for part in parts], 1), plain)
        lines = sum(part.nbytes for (q, _), each in sent.items() for p, part in enumerate(each) if p != q)
        assert lines / 2 == pytest.approx(both[0].traffic(len(wanted), 4)[0], rel=1e-12)
    sent.clear()
    for _ in range(2):
        order.clear()
        found = [one.from_map(map_ZYX.float()) for one in both]
    for one, found_V2 in zip(both, found, strict=True):
        near(found_V2, one.slabs.cut(voxels_of(map_ZYX, rows, size)))
