"""What the plan says of solving and of references against the bytes that are taken, at small sizes on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counted import peak_bytes
from verglas.kernels import voxels
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import solve_halves, solve_joined
from verglas.projection.pruned import BYTES_OF_NUMBER
from verglas.projection.volume import FourierVolume
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import RunPlan, plan
from verglas.refinement.plan_memory import Item, batch_items, reference_items, solution_phases
from verglas.refinement.plan_sizes import Machine, Problem

GB = 1e9
BOX = 64
H100 = Machine("cuda", 200 * GB, 80 * GB)


def planned(box: int = BOX, n: int = 200, machine: Machine = Machine("cpu", 20 * GB), **changes) -> RunPlan:  # noqa: B008
    return plan(Problem(n, box, 1.0), RefineConfig(**{"diameter": 0.6 * box} | changes), machine)


def total(items: list[Item]) -> float:
    return sum(item.bytes for item in items)


def sums(radius: int) -> tuple[Accumulator, Accumulator]:
    made = [Accumulator(BOX, radius) for _ in range(2)]
    for one in made:
        one.running_V4[:, :3] = 1
    return made[0], made[1]


@pytest.mark.parametrize("compiled", [True, False])
def test_solving_takes_what_is_planned(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxels, "compiled", lambda values: compiled)
    if not compiled:  # as on a GPU
        monkeypatch.setitem(BYTES_OF_NUMBER, "cpu", BYTES_OF_NUMBER["cuda"])
    made = planned()
    last = made.iterations[-1].sizes
    ((*items,),) = solution_phases(made, last)
    counted = peak_bytes(lambda: solve_joined(sums(last.radius), "C1", join_shell=2))
    assert counted == pytest.approx(total(items), rel=0.1)
    before = next(one.sizes for one in made.iterations if one.sizes.kind == "global")
    ((*items,),) = solution_phases(made, before)
    without_mask = total(items) - 5 * BOX**3
    assert peak_bytes(lambda: solve_halves(sums(before.radius), "C1", 2)) == pytest.approx(without_mask, rel=0.1)


@pytest.mark.parametrize("symmetry", ["D2", "C3", "O"])
def test_solving_with_a_point_group_takes_what_is_planned(symmetry: str) -> None:
    made = planned(symmetry=symmetry)
    last = made.iterations[-1].sizes
    counted = peak_bytes(lambda: solve_joined(sums(last.radius), symmetry, join_shell=2))
    assert counted == pytest.approx(max(total(items) for items in solution_phases(made, last)), rel=0.1)


def test_a_reference_takes_what_is_planned() -> None:
    made = planned()
    last = made.iterations[-1].sizes
    items = [item for item in reference_items(made, last) if item.name != "sums of all maps"]
    counted = peak_bytes(lambda: FourierVolume.from_map(torch.ones(BOX, BOX, BOX), last.radius))
    assert counted == pytest.approx(total(items), rel=0.1)


def test_nothing_as_large_as_a_padded_transform_is_planned_for_large_boxes() -> None:
    for box in (512, 800, 1024):
        made = planned(box, 1000, replace(H100, device_memory=500 * GB), symmetry="C1")
        cube = 8 * (2 * box) ** 2 * (box + 1)
        packed = ("sums of all maps", "reference, packed")
        items = [item for one in made.iterations for item in one.items if item.where == "device"]
        workspace = [item for item in items if "transform" in item.name or ("map" in item.name and item.name not in packed)]
        assert workspace and max(item.bytes for item in workspace) < 0.4 * cube  # a map in double and in single precision: 0.375


def test_800_px_fit_one_gpu_and_references_give_way_before_that() -> None:
    small, large = (planned(box, 2000, H100) for box in (360, 800))
    assert small.fits and small.cells and "neighbours" in small.references
    assert large.fits and not large.cells and large.turns == "apart" and "single precision alone" in large.references
    assert large.peak("device") < 76 * GB


def test_searches_of_two_batches_stand_side_by_side_only_where_a_half_set_has_two() -> None:
    def items(run: RunPlan) -> dict[str, float]:
        return {item.name: item.bytes for item in batch_items(run, run.iterations[-1].sizes, run.iterations[-1].batch)}

    few, many = planned(360, 60, H100), planned(360, 20_000, H100)
    assert few.iterations[-1].batch == 30 and many.iterations[-1].batch < 10_000
    assert "coarse search of a batch" in items(few) and "fine search of a batch" not in items(few)
    assert {"coarse search of a batch", "fine search of a batch"} < set(items(many))
    assert many.turns == "overlapping"  # no second reference: the first half-set's is given up before
    assert items(many)["reference, packed"] == items(replace(many, turns="apart"))["reference, packed"]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_layers_of_volumes_where_whole_ones_do_not_fit(ranks: int) -> None:
    small = replace(H100, device_memory=42 * GB)
    one, several = planned(800, 2000, H100), planned(800, 2000 // ranks, replace(small, ranks=ranks))
    assert several.fits and several.in_layers and "layers" in several.references
    last = one.iterations[-1]

    def volumes(run: RunPlan, items: list[Item]) -> float:
        return sum(item.bytes for item in items if item.name in ("sums of all maps", "reference, packed"))

    found, whole = (volumes(run, batch_items(run, last.sizes, 1)) for run in (several, one))
    assert whole / ranks < found < 1.06 * whole / ranks
    for items in solution_phases(several, last.sizes):  # maps are on the host
        assert total([item for item in items if item.name != "columns of the transform"]) < 1.25 / ranks * whole
    large = planned(800, 2000 // ranks, replace(H100, ranks=ranks))
    assert several.iterations[-1].seconds["ranks"] > large.iterations[-1].seconds["ranks"] and not large.in_layers


def test_ranks_solve_with_their_share() -> None:
    one, four = (planned(800, 2000, replace(H100, ranks=ranks)) for ranks in (1, 4))
    last = one.iterations[-1].sizes
    alone, (adding, solving) = solution_phases(one, last)[0], solution_phases(four, last)
    whole = 4 * 800**3  # of the maps that come about, every rank has three
    columns = next(item.bytes for item in alone if item.name == "columns of the transform")
    assert total(solving) - 3 * whole - columns <= 1.25 / 4 * (total(alone) - 3 * whole - columns)
    assert total(adding) > 2 * 4 * 4 * 1e9 and "each of 4 ranks" in four.references  # not before sums are added up
