"""Maps made one at a time, data and weights apart, are those of sums in memory; what they take is counted before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_by_columns import BOX, CPU, GEOMETRY, Notes, check_halves, some_slices, whole_of

from verglas.cli import reconstruct_columns
from verglas.cli.main import main
from verglas.cli.reconstruct import Reconstruct, Task
from verglas.cli.reconstruct_rounds import ByRounds, in_rounds
from verglas.cli.reconstruct_slabs import way_on_gpu
from verglas.core import memory, shells
from verglas.distributed.ranks import ALONE
from verglas.kernels.backproject import bricks
from verglas.maximization import round_choice
from verglas.maximization.anew import solve_anew
from verglas.maximization.apart import ApartSums
from verglas.maximization.in_rounds import InRounds, SumsInRounds
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.reconstruction import solve
from verglas.maximization.round_choice import RoundChoice, roomy, served


def how(
    symmetry: str = "C1", exact: bool = False, halves: bool = False, geometry: Geometry = GEOMETRY, remade: bool = False
) -> InRounds:
    return InRounds(geometry, symmetry, CPU, exact, 7, 9, 1e5, remade, 2**20, halves)


def sums_of(seed: int, way: InRounds) -> SumsInRounds:
    def add(sums: ApartSums, stage: str, weights_alone: bool) -> None:
        data, weight, rotation, coordinates = some_slices(seed)
        assert weights_alone == (sums.sums.data_V2 is None)
        for part in (slice(0, 3), slice(3, 30), slice(30, None)):  # fewer and more than wait
            sums.add(0 * data[part] if weights_alone else data[part], weight[part], rotation[part], coordinates)

    return SumsInRounds(way, add, "all")


@pytest.mark.parametrize("symmetry", ["C1", "D2", "O"])
@pytest.mark.parametrize(("exact", "remade"), [(False, False), (True, False), (True, True)])
def test_maps_are_those_made_in_memory(symmetry: str, exact: bool, remade: bool) -> None:
    """Of groups whose rotations turn the grid onto itself: slices added turned are then the same."""
    sums = sums_of(1, how(symmetry, exact, remade=remade))
    found = solve_anew([sums], GEOMETRY, CPU).map_ZYX
    expected = solve([whole_of(1)], symmetry, 2.0, exact=exact).map_ZYX
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert sums.slices == 40


@pytest.mark.parametrize("exact", [False, True])
def test_half_maps_and_curves(exact: bool) -> None:
    geometry = Geometry(BOX, 2.0, 10, 1.5)
    way = how(exact=exact, halves=True, geometry=geometry)
    check_halves(solve_anew([sums_of(1, way), sums_of(2, way)], geometry, CPU, None, 8.0), geometry, exact)


def test_correlation_some_planes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(14, 14, 14, generator=generator)
    second = first + torch.randn(14, 14, 14, generator=generator)
    monkeypatch.setattr(shells, "NUMBERS_AT_ONCE", 3 * 14 * 8)
    found_S = shells.fsc_by_planes(*(torch.fft.rfftn(one) for one in (first, second)))
    assert float(found_S[1:].min()) > 0.3 and float((found_S - shells.fsc(first, second)).abs().max()) < 1e-6


@pytest.mark.parametrize(("box", "exact"), [(box, exact) for box in (200, 400, 512) for exact in (False, True)])
def test_a_third_of_the_formula_is_enough(box: int, exact: bool) -> None:
    """Of 1,000 images by default, 35 % of 1.1e-8 (2N)^3 GB (RELION, of a rank's GPU)."""
    geometry = Geometry(box, 1.0, box // 2)
    choice = RoundChoice.of(geometry, exact, 0, 1000, roomy(geometry))
    assert choice is not None and choice.peak <= 0.35 * 11 * (2 * box) ** 3
    assert choice.waiting_weights >= choice.waiting  # half maps ask for weights alone, too
    assert choice.batch >= 7 and choice.waiting * 0.39 * box**2 > bricks.FEWEST_PER_VOXEL * geometry.rows().count
    assert RoundChoice.of(geometry, exact, 0, 1000, 0.8 * roomy(geometry)) is None


def test_what_is_served() -> None:
    geometry = Geometry(200, 1.0, 100)
    assert served(geometry, torch.device("cuda"), 25_000)
    assert not served(geometry, torch.device("cuda"), 25_001)  # single precision would stall
    assert not served(geometry, CPU, 100) and not served(Geometry(202 * 17, 1.0, 100), torch.device("cuda"), 100)


@pytest.mark.parametrize("words", [[], ["--gridding", "exact"], ["--gridding", "exact", "--skip-bad"]])
def test_the_command_makes_one_map_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """What `verglas reconstruct` does on a GPU, here on a CPU: the same map; the choice is said and noted."""
    simulate = ["simulate", "--n", 30, "--box", BOX, "--pixel", 5.5, "--seed", 1, "--float16", "--out", tmp_path / "set"]
    assert main([str(word) for word in simulate]) == 0
    star = tmp_path / "set" / "truth.star"
    options = Reconstruct(particles=star, out=tmp_path / "out", gridding="exact" if words else "plain", skip_bad=len(words) > 2)
    task, notes = Task.of(options, ALONE, CPU), Notes()
    monkeypatch.setattr(round_choice, "served", lambda *asked: True)
    run: Any = notes
    way = in_rounds(task, run, 1e8, "x GB (--memory)", 1e9)
    assert way is not None and "one map at a time" in notes.lines[0] and "1 GB" in notes.lines[0]
    assert notes.figures["memory_expected"] > 0 and "one_map_at_a_time" in notes.figures
    read: list[int] = []
    monkeypatch.setattr(reconstruct_columns, "KeptImages", counting(read))
    found = type(way)(replace(way.choice, waiting=11, batch=4)).solved(task, run).map_ZYX
    assert len(read) == (2 if options.skip_bad else 1)  # weights need no images
    assert main(["reconstruct", "--particles", str(star), "--out", str(tmp_path / "out"), "--device", "cpu", *words]) == 0
    from verglas.io.mrc import read_map

    expected = torch.from_numpy(read_map(tmp_path / "out" / "map.mrc").data_ZYX.copy())
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert in_rounds(task, run, 1e5, "x GB (--memory)", 1e9) is None


@pytest.mark.parametrize(
    ("words", "free", "one_at_a_time"),
    [
        ({}, 1e9, True), ({"memory": 0.5}, 1e9, False), ({"sym": "D2"}, 1e9, False), ({"half_maps": True}, 1e9, False),
        ({"sym": "D2"}, 6e6, True), ({"half_maps": True}, 8e6, True), ({"memory": 0.006}, 1e9, True),
    ],
)  # fmt: skip
def test_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any], free: float, one_at_a_time: bool
) -> None:
    """Of one process on a GPU with so many bytes free; all at once takes 21 MB, with half maps 30, with a point group 26."""
    simulate = ["simulate", "--n", 30, "--box", 48, "--pixel", 4, "--seed", 1, "--out", tmp_path / "set", "--device", "cpu"]
    assert main([str(word) for word in simulate]) == 0
    task = Task.of(Reconstruct(particles=tmp_path / "set" / "truth.star", out=tmp_path / "out", **words), ALONE, CPU)
    monkeypatch.setattr(round_choice, "served", lambda *asked: True)
    monkeypatch.setattr(memory, "usable_device_memory", lambda device: free)
    monkeypatch.setattr(round_choice, "roomy", lambda geometry: 6e6)
    run: Any = Notes()
    way = way_on_gpu(task, run)
    assert isinstance(way, ByRounds) if one_at_a_time else way is None, run.lines
    assert ("one map at a time" in run.lines[0]) == one_at_a_time and run.figures["memory_expected"] > 0


def counting(read: list[int]) -> type:
    class Counted(reconstruct_columns.KeptImages):
        def __iter__(self) -> Any:
            read.append(1)
            return super().__iter__()

    return Counted
