"""Half-sets' maps that one rank each solves for are those that one process finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tests.test_slabs import BOX, CASES, SIZE, sums_of, support
from torch import Tensor

from verglas.distributed.ranks import Ranks
from verglas.maximization import solvers as module
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import solve_halves
from verglas.maximization.solvers import Frame, Solvers, chosen, collect, low_voxels, solve_by_ranks

GIVERS: dict[str, tuple[list[int], list[int]]] = {  # of the half-sets: ranks that have sums of each
    "each one": ([0], [2]), "some": ([0, 1], [1, 2]), "all": ([0, 1, 2], [0, 1, 2]), "one alone": ([1], [1]),
    "one of many slices": ([0], [2]),  # these are in double precision then
}  # fmt: skip
RUNS = [("C1", "each one"), ("C1", "some"), ("D7", "all"), ("O", "one alone"), ("D2", "some"), ("C1", "one of many slices")]
LOW = "few shells", "each one"  # quotients are less than a map


def given(rank: int, half: int, case: str, givers: str) -> Accumulator:
    """What a rank has added up of a half-set."""
    one = sums_of(rank, half + 1, "C1") if case == LOW[0] else sums_of(rank, half + 1, case)
    if case == LOW[0]:
        cut = Accumulator(BOX, 4)
        cut.running_V4, cut.slices = one.running_V4[: cut.rows.count].clone(), 1
        one = cut
    if rank not in GIVERS[givers][half]:
        one.running_V4.zero_()
        one.slices = 0
    elif not one.slices:
        one.slices = 1
    if givers == "one of many slices" and one.slices and half == 0:
        one.flush()
    return one


def expected(case: str, givers: str) -> dict[str, Tensor]:
    pair = []
    for half in range(2):
        first, *others = (given(rank, half, case, givers) for rank in range(SIZE))
        for other in others:
            first.merge(other)
        pair.append(first)
    return named(*solve_halves((pair[0], pair[1]), symmetry_of(case), 2))


def symmetry_of(case: str) -> str:
    return "C1" if case == LOW[0] else CASES[case][0]


def named(solutions: list[Any], curve_S: Tensor) -> dict[str, Tensor]:
    found = {f"{number} {what}": value for number, one in enumerate(solutions) for what, value in vars(one).items()}
    return found | {"fsc": curve_S}


def of_rank(case: str, givers: str, ranks: Ranks, wanted: Tensor) -> dict[str, Tensor]:
    own = [given(ranks.rank, half, case, givers) for half in range(2)]
    frame = Frame(own[0].box, own[0].padding, own[0].rows, own[0].running_V4[:0, 0].clone())
    solvers = Solvers.agreed(ranks, BOX, [one.slices for one in own], torch.device("cpu"))
    assert solvers is not None and solvers.givers == GIVERS[givers]
    for half, one in enumerate(own):
        here = ranks.rank in solvers.givers[half] or solvers.mine == half
        collect(one if here else None, frame.rows.count, half, solvers, frame.like)
    mine = None if solvers.mine is None else own[solvers.mine]
    return named(*solve_by_ranks(mine, frame, solvers, symmetry_of(case), 2, 1.0, wanted))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", SIZE), rank=rank, world_size=SIZE)
    ranks, found = Ranks(rank, SIZE), {}
    module.VOXELS_AT_ONCE = 700
    for run in RUNS:
        found[run] = of_rank(*run, ranks, support())
    ranks.communication()
    found[LOW] = of_rank(*LOW, ranks, torch.ones(BOX, BOX, BOX, dtype=torch.bool))
    found["sent"] = ranks.communication()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("solvers")
    multiprocessing.spawn(work, (str(folder),), SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.parametrize(("case", "givers"), [*RUNS, LOW])
def test_two_ranks_find_what_one_process_finds(case: str, givers: str, of_ranks: list[dict[Any, Any]]) -> None:
    inside = support()
    for name, value in expected(case, givers).items():
        everyones = [one[case, givers][name] for one in of_ranks]
        if name.endswith("map_ZYX"):
            everyones, value = [one[inside] for one in everyones], value[inside]
        assert torch.allclose(everyones[1], value.to(everyones[1].dtype), atol=2e-5 * float(value.abs().max())), name
        assert all(torch.equal(everyones[0], one) for one in everyones), name


def test_few_bytes_are_sent(of_ranks: list[dict[Any, Any]]) -> None:
    """Sums stay where they are; of half-sets apart only averages, and quotients in place of a larger map, travel."""
    sent = of_ranks[0]["sent"]["by_name"]
    whole = given(0, 0, *LOW).rows.count
    assert "sums of slices, at who solves" not in sent
    assert sent["maps"]["payload"] == 2 * (8 * whole + 4 * 8 * (BOX // 2 + 1))
    averages = [one["sent"]["by_name"] for one in of_ranks]
    assert len({one["sent"]["bytes_of_ranks"][2] for one in of_ranks}) == 1 and averages[0]["averages"]["payload"] == 0


def test_who_solves() -> None:
    assert chosen([0], [1], 2) == (0, 1) and chosen([0, 1], [2, 3], 4) == (0, 3)
    assert chosen([1], [1], 3) == (1, 2) and chosen([], [], 2) == (0, 1) and chosen([2], [2], 3) == (2, 0)


def test_low_voxels_are_all_near_the_origin() -> None:
    rows = sums_of(0, 1, "C3").rows
    near = rows.coordinates_V3().double().norm(dim=1) <= 5
    assert torch.equal(low_voxels(rows, 5).sort().values, near.nonzero().squeeze(1))
