"""Sums of a half-set that wait on the host: the same maps, curves and refinements, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verglas.cli.main import main
from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.io.mrc import read_map
from verglas.kernels import voxels
from verglas.maximization import waiting
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import solve_halves, solve_joined
from verglas.maximization.waiting import Waiting
from verglas.particles.table import ParticleTable
from verglas.refinement import checkpoint, driver, expect
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Machine, Problem, Turns
from verglas.refinement.state import State
from verglas.refinement.step import HalfSetExpectation

GB = 1e9
BOX = 24


def halves(flushed: tuple[bool, bool] = (False, False)) -> tuple[Accumulator, Accumulator]:
    """Sums of random slices, the same every time; flushed: which are in double precision."""
    generator = torch.Generator().manual_seed(3)
    coordinates = half_plane_pixels(BOX, 11).coordinates_K3()
    made = []
    for flush in flushed:
        sums = Accumulator(BOX, 11)
        data = torch.randn(40, 2, len(coordinates), generator=generator)
        sums.add(data, 0.5 + data[:, 0].abs(), random_rotations(40, generator), coordinates)
        if flush:
            sums.flush()
        made.append(sums)
    return made[0], made[1]


def judged(maps: list[torch.Tensor]) -> torch.Tensor:
    """A curve that tells which maps were given, in which order."""
    return (maps[0].double().std() / maps[1].double().std() / torch.arange(1, BOX // 2 + 2)).clamp_max(0.99)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("symmetry", ["C1", "D2", "O"])
@pytest.mark.parametrize("flushed", [(False, False), (True, True)])
@pytest.mark.parametrize("curve", [None, judged])
def test_what_waits_is_solved_to_the_same_bits(compiled, symmetry, flushed, curve, monkeypatch):
    monkeypatch.setattr(voxels, "compiled", lambda values: compiled)
    monkeypatch.setattr(waiting, "PIECE", 1000)
    for first in (0, 1):
        sums = list(halves(flushed))
        sums[first] = Waiting.of_accumulator(sums[first], symmetry)
        solutions, found_S = solve_halves((sums[0], sums[1]), symmetry, 3, fsc_S=curve)
        expected, expected_S = solve_halves(halves(flushed), symmetry, 3, fsc_S=curve)
        assert torch.equal(found_S, expected_S)
        for one, other in zip(solutions, expected, strict=True):
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("map_ZYX", "tau2_S", "coverage_S"))
        sums = list(halves(flushed))
        sums[first] = Waiting.of_accumulator(sums[first], symmetry)
        joined, maps, found_S = solve_joined((sums[0], sums[1]), symmetry, curve, join_shell=3)
        expected_joined, expected_maps, expected_S = solve_joined(halves(flushed), symmetry, curve, join_shell=3)
        assert torch.equal(found_S, expected_S) and torch.equal(joined.map_ZYX, expected_joined.map_ZYX)
        assert all(torch.equal(one, other) for one, other in zip(maps, expected_maps, strict=True))


@pytest.mark.parametrize("flushed", [(True, False), (False, True)])
def test_sums_of_different_precision(flushed: tuple[bool, bool]) -> None:
    for first in (0, 1):
        sums = list(halves(flushed))
        sums[first] = Waiting.of_accumulator(sums[first], "C1")
        joined, maps, found_S = solve_joined((sums[0], sums[1]), "C1", join_shell=3)
        expected_joined, expected_maps, expected_S = solve_joined(halves(flushed), "C1", join_shell=3)
        torch.testing.assert_close(found_S, expected_S, rtol=1e-6, atol=1e-6)
        for one, other in zip([joined.map_ZYX, *maps], [expected_joined.map_ZYX, *expected_maps], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * float(other.abs().max()))


def refined(data: Path, turns: Turns, stop_and_go: Path | None = None) -> tuple[State, list[torch.Tensor]]:
    """(state, maps) after two iterations and the last; stop_and_go: by way of a checkpoint after the first one."""
    table = ParticleTable.read(data / "particles.star")
    config = RefineConfig(diameter=120, initial_resolution=40, healpix_order=1, max_iterations=2)
    planned = replace(plan(Problem.of(table), config, Machine("cpu", 8 * GB)), turns=turns)
    session = driver.prepare(table, read_map(data / "start.mrc"), config, planned=planned)
    if stop_and_go is not None:
        first = next(driver.iterations(session))
        checkpoint.save(stop_and_go, first.state, config, "1")
        session = driver.resume(session, checkpoint.load(stop_and_go)[0])
    *_, last = driver.iterations(session)
    assert last.final is not None
    return last.state, [last.final.joined.map_ZYX, *last.final.unfil_halves]


def test_a_refinement_is_the_same_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["simulate", "--n", "60", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "1", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "set")]) == 0
    expected, expected_maps = refined(tmp_path / "set", "overlapping")
    made = []
    original = HalfSetExpectation.make_way
    monkeypatch.setattr(HalfSetExpectation, "make_way", lambda half: (original(half), made.append(half.waiting)))
    order, references_of, sums_of = list[str](), expect.references_of, expect.Accumulator
    monkeypatch.setattr(expect, "references_of", lambda *given: (order.append("references"), references_of(*given))[1])
    monkeypatch.setattr(expect, "Accumulator", lambda *given: (order.append("sums"), sums_of(*given))[1])
    for turns, name in (("waiting", None), ("waiting", "state.checkpoint"), ("apart", None)):
        made.clear()
        state, maps = refined(tmp_path / "set", turns, None if name is None else tmp_path / name)
        assert len(made) == 3 and all((one is not None) == (turns == "waiting") for one in made)
        assert all(torch.equal(one, other) for one, other in zip(maps, expected_maps, strict=True))
        assert torch.equal(state.poses.origin_B2, expected.poses.origin_B2) and torch.equal(state.fsc_S, expected.fsc_S)
    # making references takes much beside them, when there are no sums of this half-set yet
    assert order.count("sums") == 3 * 3 * 2 and all(order[n - 1] == "references" for n, one in enumerate(order) if one == "sums")


def test_sums_wait_where_the_plan_says_that_both_do_not_fit() -> None:
    config, h100 = RefineConfig(diameter=330, symmetry="D2"), Machine("cuda", 128 * GB, 80 * GB)
    large = plan(Problem(500, 1024, 0.4), config, h100)
    assert large.fits and large.turns == "waiting" and "wait in the memory of the host (27 GB)" in large.half_sets
    assert large.as_dict()["half_sets"] == "waiting" and large.peak("device") < 70 * GB
    waits = [one.bytes for last in large.iterations[-1:] for one in last.items if one.name == "sums that wait"]
    assert waits[0] == pytest.approx(27e9, rel=0.02)
    assert not plan(Problem(500, 1024, 0.4), config, replace(h100, host_memory=70 * GB)).fits  # the host's memory counts, too
    assert plan(Problem(2000, 800, 0.4), config, h100).turns == "apart"
    limited = replace(config, memory_gb=45.0)
    assert plan(Problem(2000, 800, 0.4), limited, h100).turns == "waiting"
    assert plan(Problem(2000, 360, 0.9), config, h100).turns == "overlapping"
    assert plan(Problem(500, 1024, 0.4), config, replace(h100, ranks=2)).turns == "apart"  # ranks share solving instead
