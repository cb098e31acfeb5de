"""Ranks that share the sums and the solving find the maps and curves that one process finds."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from verglas.core.rows import packed_sphere
from verglas.distributed.arrivals import AT_ONCE, Arrivals, Piece
from verglas.distributed.coding import BLOCK, LARGEST, coded, coded_bytes, decoded, link_is_slow, pays
from verglas.distributed.ranks import ALONE, Ranks
from verglas.distributed.ways import Ways
from verglas.kernels import voxels
from verglas.maximization import accumulate
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import solve_halves, solve_joined, solve_single
from verglas.maximization.slabs import Slabs, stays_in_planes
from verglas.refinement.step import advance

BOX, SIZE = 20, 3
CASES = {  # symmetry, radius, padding, precision
    "C1": ("C1", 10, 2.0, torch.float32), "C3": ("C3", 7, 2.0, torch.float32), "D2": ("D2", 10, 1.5, torch.float64),
    "D7": ("D7", 10, 2.0, torch.float32), "O": ("O", 9, 2.0, torch.float32),
}  # fmt: skip


def sums_of(rank: int, half: int, case: str) -> Accumulator:
    """What one rank has added up of a half-set: noise, and a part that the halves share. C3, D2: some ranks nothing."""
    _, radius, padding, dtype = CASES[case]
    out = Accumulator(BOX, radius, padding, dtype=dtype)
    if (case == "C3" and rank == half) or (case == "D2" and rank != half):
        return out
    out.slices = 1
    for seed, scale in ((100 * half + rank, 1.0), (1000 + rank, 2.0)):
        out.running_V4 += scale * torch.randn(out.running_V4.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    out.running_V4[:, 2] = out.running_V4[:, 2].abs() + 0.1
    return out


def support() -> torch.Tensor:
    axis = torch.arange(BOX) - BOX // 2
    return (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) < 36


def solved(case: str, ranks: Ranks, mine: list[int]) -> dict[str, Any]:
    """Everything that is solved for, from the sums of some ranks."""
    symmetry = CASES[case][0]

    def halves() -> tuple[Accumulator, Accumulator]:
        pair = []
        for half in (1, 2):
            first, *others = (sums_of(rank, half, case) for rank in mine)
            for other in others:
                first.merge(other)
            first.add_up(ranks, share=True)
            pair.append(first)
        return pair[0], pair[1]

    solutions, curve_S = solve_halves(halves(), symmetry, 2, support_ZYX=support())
    mean = solve_halves(halves(), symmetry, 0, fsc_S=lambda maps: torch.full((BOX // 2 + 1,), float(maps[0].mean() ** 2)))
    joined, unfil, joined_S = solve_joined(halves(), symmetry, join_shell=2)
    single = solve_single(halves()[0], symmetry, torch.ones(BOX // 2 + 1))
    found = {"fsc": curve_S, "joined fsc": joined_S, "unfiltered": unfil[1], "judged": mean[0][1].map_ZYX}
    for name, one in (("first", solutions[0]), ("second", solutions[1]), ("joined", joined), ("single", single)):
        found |= {f"{name} {what}": value for what, value in vars(one).items()}
    return found


def begun_and_finished(ranks: Ranks) -> torch.Tensor:
    """A slab's sums that travel in pieces while ranks, each at its own pace, do other things and talk of them."""
    ranks = replace(ranks, behind=dist.new_group())
    accumulate.VOXELS_AT_ONCE = 500
    sums = [sums_of(ranks.rank, half, "C1") for half in (1, 2)]
    under_way = deque(arrivals for one in sums if (arrivals := one.begin_adding(ranks)) is not None)
    assert len(under_way) == 2
    for _ in range(3 * ranks.rank):  # the first rank sends nothing before the end
        advance(under_way)
        time.sleep(0.01)
    ranks.meet("expectation", partial(advance, under_way))
    for one in sums:
        assert ranks.add_up(torch.ones(1), "something else") == SIZE
        one.add_up(ranks)
    assert sums[0].slabs is not None
    return sums[1].slabs.joined(sums[1].running_V4)


def waits_for_its_device(ranks: Ranks) -> bool:
    """The last rank does not come to the meeting before all that it has under way has arrived, as a host that waits for its GPU:
    whether that came to an end. The others have much left to send when they come."""
    ranks, arrived = replace(ranks, behind=dist.new_group()), []
    pieces = [Piece(0, lambda: torch.ones(1), arrived.append) for _ in range(10 * AT_ONCE)]
    arrivals, until = Arrivals(ranks, pieces, "sums"), time.monotonic() + 20
    while ranks.rank == SIZE - 1 and arrivals.left and time.monotonic() < until:
        arrivals.advance()
    in_time = not arrivals.left or ranks.rank < SIZE - 1
    ranks.meet("expectation", arrivals.advance)
    arrivals.finish()
    assert [float(one) for one in arrived] == [SIZE] * len(pieces) * ranks.is_lead
    return in_time


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", SIZE), rank=rank, world_size=SIZE)
    ranks, found = Ranks(rank, SIZE), {}
    for case in CASES:
        found[case] = solved(case, ranks, [rank])
    found["behind"] = begun_and_finished(ranks)
    found["in time"] = waits_for_its_device(ranks)
    by_codes = replace(ranks, ways=Ways(compress=True))
    found["coded"], found["coded maps"] = begun_and_finished(by_codes), solved("C1", by_codes, [rank])
    found["sent by codes"], found["slow link"] = ranks.communication(), link_is_slow(ranks, torch.device("cpu"))
    accumulate.VOXELS_AT_ONCE = 8_000_000
    voxels.compiled = lambda values: False
    found["plain"] = solved("C1", ranks, [rank])
    found["sent"] = ranks.communication()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.parametrize("case", [*CASES, "plain"])
def test_ranks_find_what_one_process_finds(case: str, of_ranks: list[dict[str, Any]]) -> None:
    expected = solved("C1" if case == "plain" else case, ALONE, list(range(SIZE)))
    inside = support()
    for name, value in expected.items():
        found = of_ranks[1][case][name]
        scale = float(value.abs().max())
        if name.endswith("map_ZYX") and name.split()[0] in ("first", "second"):
            assert float(found[~inside].abs().max()) == 0  # not asked for, not sent
            found, value = found[inside], value[inside]
        assert torch.allclose(found, value.to(found.dtype), atol=2e-5 * scale), name
        assert all(torch.equal(of_ranks[1][case][name], other[case][name]) for other in of_ranks), name


def test_who_waits_at_a_meeting_goes_on_sending(of_ranks: list[dict[str, Any]]) -> None:
    assert all(one["in time"] for one in of_ranks)


def test_sums_that_travel_behind_other_things_arrive(of_ranks: list[dict[str, Any]]) -> None:
    expected = sum(sums_of(rank, 2, "C1").running_V4 for rank in range(SIZE))
    for found in of_ranks:
        assert torch.allclose(found["behind"][:, :3], expected[:, :3], atol=1e-5)
    entry = of_ranks[0]["sent by codes"]["by_name"]["sums of slices"]
    assert entry["kind"] == "reduce" and entry["count"] > 20 and len(of_ranks[0]["sent"]["hidden_seconds_of_ranks"]) == SIZE


def test_sums_that_travel_as_codes_take_half_the_bytes(of_ranks: list[dict[str, Any]]) -> None:
    exact = sum(sums_of(rank, 2, "C1").running_V4 for rank in range(SIZE))[:, :3]
    for found in of_ranks:
        assert 0 < float((found["coded"][:, :3] - exact).abs().max()) < 2 * SIZE * float(exact.abs().max()) / LARGEST
        assert torch.equal(found["coded"], of_ranks[0]["coded"]) and found["slow link"] == of_ranks[0]["slow link"]
    for name, value in solved("C1", ALONE, list(range(SIZE))).items():
        found = of_ranks[1]["coded maps"][name]
        if not name.endswith("map_ZYX") or name.split()[0] not in ("first", "second"):
            assert torch.allclose(found, value.to(found.dtype), atol=5e-4 * float(value.abs().max())), name
    sent = of_ranks[0]["sent by codes"]["by_name"]
    plain, codes = (sent[name]["payload"] / sent[name]["count"] for name in ("sums of slices", "sums of slices, coded"))
    assert sent["sums of slices, coded"]["kind"] == "all-to-all" and plain > 0 and codes > 0


def test_codes_are_near_their_values() -> None:
    values_VC = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 4, 1000)[:, None]
    values_VC[:BLOCK] = 0
    made = coded(values_VC)
    assert len(made) == coded_bytes(1000, 3) < 0.56 * values_VC.nbytes
    error_VC = (decoded(made, 1000, 3) - values_VC).abs()
    for part, error in zip(values_VC.split(BLOCK), error_VC.split(BLOCK), strict=True):
        largest = part.abs().amax(0)
        assert bool((error <= 6.2e-5 * largest.pow(0.25) * part.abs().pow(0.75) + 1e-8 * largest).all())
    assert torch.equal(decoded(made, 1000, 3)[BLOCK:].sign(), values_VC[BLOCK:].sign())
    assert coded_bytes(0, 3) == len(coded(values_VC[:0])) == 0


def test_codes_are_sent_where_the_link_is_slower_than_they_are_made() -> None:
    assert pays(link=0.010, coding=0.002) and not pays(link=0.0001, coding=0.0002)


@pytest.mark.parametrize(("size", "radius"), [(2, 64), (3, 41), (8, 64), (5, 20)])
def test_slabs_hold_every_voxel_once_and_are_alike(size: int, radius: int) -> None:
    whole = packed_sphere(float(radius))
    slabs = [Slabs.of(whole, 2.0, 64, Ranks(rank, size)) for rank in range(size)]
    values = torch.arange(whole.count)
    assert all(one is not None and one.rows.count == len(one.cut(values)) for one in slabs)
    assert torch.equal(torch.cat([one.cut(values) for one in slabs if one]).sort().values, values)
    for one in slabs:
        assert one is not None
        coordinates = whole.coordinates_V3()[one.cut(values)]
        assert torch.equal(one.rows.coordinates_V3(), coordinates)  # in the order of the rank's own table
        assert one.rows.count < 1.6 * whole.count / size
    assert Slabs.of(packed_sphere(8.0), 2.0, 64, Ranks(0, 8)) is None


def test_groups_that_stay_in_a_slab() -> None:
    assert all(stays_in_planes(name) for name in ("C1", "C3", "C7", "D2", "D3", "D7"))
    assert not any(stays_in_planes(name) for name in ("T", "O", "I"))
