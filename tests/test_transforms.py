"""The shared transform of a map: three forms, 1 to 3 ranks, against one process; what ranks send; which form is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from counted import peak_bytes
from verglas.core.masks import fill_outside, soft_sphere
from verglas.core.rows import RowTable, packed_sphere
from verglas.distributed.ranks import ALONE, Ranks, side_by_side
from verglas.maximization import transforms
from verglas.maximization.slabs import Slabs
from verglas.maximization.stride_parts import Strides
from verglas.maximization.transform_costs import FORMS
from verglas.maximization.transforms import MapPart, SharedTransform
from verglas.projection import pruned
from verglas.projection.pruned import PaddedGrid, map_of, voxels_of
from verglas.projection.volume import gridding_correction, pack, padded_size, unpack
from verglas.testing.dense import cropped_map, padded_transform

# box, shells, padding, rows y that are wanted, of the map
CASES = {"whole": (20, 10, 2.0, range(20)), "part": (20, 7, 1.5, range(3, 16)), "odd": (22, 9, 2.0, range(22)),
         "few": (20, 8, 2.0, range(9, 11))}  # fmt: skip
DTYPES = {"single": (torch.float32, 1e-6), "double": (torch.float64, 1e-13)}
SIZES = (1, 2, 3)
LARGE = (48, 24, 2.0, range(48))  # for bytes of memory: in a smaller map whole planes divide less evenly


def made_up(case: tuple[int, int, float, range], dtype: torch.dtype) -> tuple[RowTable, int, torch.Tensor, torch.Tensor]:
    """Rows, size of the padded map, voxels, map."""
    box, radius, padding, _ = case
    size = padded_size(box, padding)
    rows, generator = packed_sphere(float(int(radius * size / box + 0.5))), torch.Generator().manual_seed(1)
    voxels_V2 = torch.randn(rows.count, 2, generator=generator, dtype=torch.float64).to(dtype)
    return rows, size, voxels_V2, torch.randn(box, box, box, generator=generator, dtype=torch.float64).to(dtype)


def alone(case: tuple[int, int, float, range], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(map, finished where it is wanted; packed voxels), by one process."""
    rows, size, voxels_V2, map_ZYX = made_up(case, dtype)
    grid, box, wanted = PaddedGrid.of(rows, case[0], size), case[0], case[3]
    found = map_of(grid.filler(voxels_V2, rows), grid, dtype, wanted)
    MapPart(found, torch.arange(box), wanted).finish(size, True, ALONE)
    out = torch.zeros(box, box, box, dtype=dtype)
    out[:, wanted.start : wanted.stop] = found
    return out, voxels_of(map_ZYX, rows, size)


def shared(ranks: Ranks, case: tuple[int, int, float, range], dtype: torch.dtype, form: str) -> tuple[Any, ...]:
    """The same by ranks, and bytes sent: (map, voxels, sent on the way there, back, expected of both)."""
    rows, size, voxels_V2, map_ZYX = made_up(case, dtype)
    slabs = Slabs.of(rows, size / case[0], case[0], ranks)
    assert slabs is not None
    one = SharedTransform(slabs, case[0], size, form)  # type: ignore[arg-type]
    ranks.meter.read()
    part = one.to_map(one.grid().filler(slabs.cut(voxels_V2), slabs.rows), dtype, case[3])
    there = sum(entry.bytes for entry in ranks.meter.read().values())
    part.finish(size, True, ranks)
    whole = one.whole(part, case[3], None)
    support_ZYX = torch.rand(whole.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    for devices in ((), ("cpu",)):
        transforms.GATHERED_WHOLE = devices
        assert torch.equal(one.whole(part, case[3], support_ZYX), whole * support_ZYX)
    ranks.meter.read()
    mine_V2 = one.from_map(map_ZYX)
    back = sum(entry.bytes for entry in ranks.meter.read().values())
    sent = ranks.add_up(torch.tensor([there, back], dtype=torch.float64), "sent") / ranks.size
    return whole, slabs.joined(mine_V2), sent.tolist(), list(one.traffic(len(case[3]), voxels_V2.element_size()))


def peaks(ranks: Ranks) -> dict[str, int]:
    """Most bytes that a rank has at a time while the map of its slab of sums comes about: sums, workspace, and the new map."""
    rows, size, _, _ = made_up(LARGE, torch.float32)
    slabs = Slabs.of(rows, size / LARGE[0], LARGE[0], ranks)
    assert slabs is not None
    before, pruned.NUMBERS_AT_ONCE["cpu"] = pruned.NUMBERS_AT_ONCE["cpu"], 1  # a column at a time
    found = {}
    for form in FORMS:
        one = SharedTransform(slabs, LARGE[0], size, form)

        def solved(one: SharedTransform = one) -> None:
            sums_V4 = torch.zeros(slabs.rows.count, 4)  # as an accumulator holds them
            part = one.to_map(one.grid().filler(sums_V4[:, :2], slabs.rows), torch.float32, LARGE[3])
            part.finish(size, True, ranks)

        found[form] = peak_bytes(solved)
    pruned.NUMBERS_AT_ONCE["cpu"] = before
    return found


def work(number: int, folder: str) -> None:
    """What each process does: groups of 1, 2 and 3 at a time."""
    size, rank = [(size, rank) for size in SIZES for rank in range(size)][number]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting{size}", size), rank=rank, world_size=size)
    ranks = Ranks(rank, size, size)
    transforms.GATHERED_AT_ONCE = 2000  # several pieces of a map
    found = {(c, d, form): shared(ranks, CASES[c], DTYPES[d][0], form) for c in CASES for d in DTYPES for form in FORMS}
    torch.save((found, peaks(ranks)), f"{folder}/{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), sum(SIZES))
    return {(size, rank): torch.load(folder / f"{size}-{rank}.pt") for size in SIZES for rank in range(size)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_find_what_one_process_finds(case: str, precision: str, form: str, of_ranks: dict[tuple[int, int], Any]) -> None:
    dtype, limit = DTYPES[precision]
    for name, wanted in zip(("map", "voxels"), alone(CASES[case], dtype), strict=True):
        scale = float(wanted.abs().max())
        for key, (found, _) in of_ranks.items():
            value = found[case, precision, form][0 if name == "map" else 1]
            assert float((value - wanted).abs().max()) <= limit * scale, (name, key)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_send_what_the_formula_says(form: str, of_ranks: dict[tuple[int, int], Any]) -> None:
    for (size, _), (found, _) in of_ranks.items():
        for (case, _, one), (_, _, sent, expected) in found.items():
            if one == form and case != "few":  # the formula is of rows that ranks share evenly
                assert sent == pytest.approx(expected, rel=1e-12)
                assert (expected[0] > 0) == (size > 1)


@pytest.mark.parametrize("case", CASES)
def test_one_process_finds_the_plain_transform(case: str) -> None:
    rows, size, voxels_V2, map_ZYX = made_up(CASES[case], torch.float64)
    box, wanted = CASES[case][0], pack(padded_transform(map_ZYX, size), rows)
    torch.testing.assert_close(voxels_of(map_ZYX, rows, size), wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))
    x, y, z = rows.coordinates_V3().long().unbind(1)
    inside_V2 = torch.where((x * x + y * y + z * z < rows.radius**2)[:, None], voxels_V2, 0)
    plain, grid = cropped_map(unpack(inside_V2, rows, size), box), PaddedGrid.of(rows, box, size)
    found = map_of(grid.filler(voxels_V2, rows), grid, torch.float64)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-13 * float(plain.abs().max()))
    filled = fill_outside(plain.float(), soft_sphere(box, box / 2, 3)) / gridding_correction(box, size / box)
    part = MapPart(found.float(), torch.arange(box), range(box))
    part.finish(size, True, ALONE)
    torch.testing.assert_close(part.values_ZYX, filled, rtol=0, atol=1e-6 * float(filled.abs().max()))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("strides", range(1, 9))
def test_strides_make_the_whole_map(strides: int, precision: str) -> None:
    dtype, limit = DTYPES[precision]
    case = (20, 9, 2.1 if strides in (3, 6, 7) else 2.0, range(20))
    rows, size, voxels_V2, _ = made_up(case, dtype)
    grid, one = PaddedGrid.of(rows, 20, size), Strides(20, size, strides, ALONE, torch.device("cpu"))
    fill = grid.filler(voxels_V2, rows)
    wanted = map_of(fill, grid, dtype)
    cut_ZYX = grid.along_y(grid.filled(fill, slice(0, grid.columns), dtype), range(20))
    found = torch.cat([one.planes_of_map(grid, cut_ZYX, residue) for residue in range(strides)])
    order_A = one.planes_of(0)
    assert torch.equal(order_A.sort().values, torch.arange(20))
    assert float((found - wanted[order_A]).abs().max()) <= limit * float(wanted.abs().max())


def test_a_rank_holds_its_share_of_a_map_that_is_solved_for(of_ranks: dict[tuple[int, int], Any]) -> None:
    alone = of_ranks[1, 0][1]["transposed"]
    assert alone < 60 * LARGE[0] ** 3  # sums 40 N^3 bytes, half transform 8, map 4; a dense transform would take 34 more
    for (size, rank), (_, found) in of_ranks.items():
        assert found["transposed"] <= 1.25 / size * alone, (size, rank)


def test_parts_that_lie_side_by_side_are_not_copied() -> None:
    numbers = torch.arange(24).view(6, 4)
    rows = side_by_side([numbers[:2], numbers[2:5], numbers[5:]])
    assert rows.data_ptr() == numbers.data_ptr() and torch.equal(rows, numbers.flatten())
    for parts in ([numbers[2:], numbers[:2]], [numbers[:, :2], numbers[:, 2:]], [numbers[:2], torch.zeros(3, dtype=torch.int64)]):
        found = side_by_side(parts)
        assert found.data_ptr() != numbers.data_ptr() and torch.equal(found, torch.cat([part.flatten() for part in parts]))
