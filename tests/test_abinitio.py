"""First models: the gradient's schedule and sums, axes of a point group in a map, and whole searches from random starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from verglas.cli import abinitio_maps, abinitio_run
from verglas.cli.main import main
from verglas.cli.solve_choices import doubt_of_starts
from verglas.core.rotations import random_rotations
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import read_map
from verglas.io.star import read_star
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.reference import low_pass, symmetry_correlation
from verglas.maximization.running import accumulator_of, on_rows, rows_of, stepped
from verglas.particles.table import ParticleTable
from verglas.postprocess.align import align, turned
from verglas.refinement import abinitio, abinitio_symmetry
from verglas.refinement import abinitio_schedule as schedule
from verglas.refinement.abinitio_schedule import Stage
from verglas.refinement.abinitio_symmetry import Proposed
from verglas.refinement.config import AbInitioConfig
from verglas.refinement.step import Iteration

CONFIG = AbInitioConfig(diameter=150, steps=30, restarts=1)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "set"
    words = ["simulate", "--n", "100", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_stages_come_in_order() -> None:
    config = replace(CONFIG, restarts=2, symmetry="D2", full_iterations=2)
    stages = [schedule.stage_of(i, config) for i in range(1, schedule.total_iterations(config) + 2)]
    assert stages == [Stage.GRADIENT] * 6 + [Stage.COMPARE] + [Stage.FULL] * 2 + [Stage.SYMMETRIC] * 2 + [None]
    assert schedule.stage_of(schedule.total_iterations(CONFIG) + 1, CONFIG) is None


def test_steps_get_finer_larger_and_cooler() -> None:
    steps = [schedule.step_of(i, 1000, 4.0, CONFIG) for i in range(30)]
    assert steps[0].resolution == pytest.approx(40) and steps[-1].resolution == pytest.approx(15)
    assert len(steps[0].rows) == 100 and len(steps[-1].rows) == 300
    assert steps[0].size == 0.5 and steps[-1].size == pytest.approx(0.1)
    assert steps[0].temperature == CONFIG.temperature and steps[-1].temperature == pytest.approx(1)
    for earlier, later in pairwise(steps):
        assert later.resolution <= earlier.resolution and later.size <= earlier.size
    assert all(len(step.rows.unique()) == len(step.rows) for step in steps)
    assert not torch.equal(steps[0].rows, steps[1].rows)
    again = schedule.step_of(30, 1000, 4.0, replace(CONFIG, restarts=2))  # the first of the second restart
    assert again.resolution == steps[0].resolution and not torch.equal(again.rows, steps[0].rows)


def test_resolutions_follow_diameter_and_pixels() -> None:
    assert schedule.resolutions(replace(CONFIG, diameter=560), 2.0) == (112, 40)
    assert schedule.resolutions(CONFIG, 8.0) == (40, 20)


def test_sums_move_to_a_larger_sphere_unchanged() -> None:
    draw = torch.Generator().manual_seed(1)
    small, large = Accumulator(32, 5, 1.0), Accumulator(32, 9, 1.0)
    values_V3 = torch.randn(small.rows.count, 3, generator=draw)
    moved_V3 = on_rows(values_V3, small.rows, large.rows)
    places = {tuple(p): i for i, p in enumerate(large.rows.coordinates_V3().tolist())}
    for (x, y, z), value in zip(small.rows.coordinates_V3().tolist()[::7], values_V3[::7]):
        assert torch.equal(moved_V3[places[x, y, z]], value)
    assert moved_V3.abs().sum() == pytest.approx(float(values_V3.abs().sum()), rel=1e-5)
    assert rows_of(small.rows.count, large) == small.rows
    with pytest.raises(ValueError, match="no packed sphere"):
        rows_of(small.rows.count + 1, large)


def test_a_step_goes_towards_the_batch() -> None:
    batch = Accumulator(32, 5, 1.0)
    batch.running_V4[:, :3] = 8.0
    first_V3 = stepped(None, batch, 4, 0.5)
    assert torch.equal(first_V3, torch.full_like(first_V3, 2.0))
    second_V3 = stepped(torch.zeros_like(first_V3), batch, 4, 0.25)
    assert torch.equal(second_V3, torch.full_like(first_V3, 0.5))
    assert torch.equal(accumulator_of(second_V3, 32, 5, 1.0, 10).total()[:, :3], torch.full_like(first_V3, 5.0))


@pytest.mark.parametrize("symmetry", ["D2", "I3"])
def test_maps_and_poses_go_onto_the_axes_together(simulated: Path, symmetry: str) -> None:
    draw = torch.Generator().manual_seed(5)
    config = replace(CONFIG, symmetry=symmetry)
    session = abinitio.prepare(ParticleTable.read(simulated / "particles.star"), config, "cpu", 1)
    plain_ZYX = abinitio.random_blobs(32, 26, 4)
    map_ZYX = turned(plain_ZYX, symmetry_matrices(symmetry)).mean(0)
    away_ZYX = turned(map_ZYX, random_rotations(1, draw), torch.tensor([[1.0, -0.5, 0.7]]))[0]
    state = replace(session.state, halves=[replace(session.state.halves[0], map_ZYX=away_ZYX)])
    new, notes = abinitio_symmetry.on_axes(state, config, abinitio_maps.place_on_axes)
    assert symmetry_correlation(away_ZYX, symmetry) < 0.9 < symmetry_correlation(new.halves[0].map_ZYX, symmetry)
    assert new.halves[0].direction_prior_D.sum() == pytest.approx(1) and f"{symmetry} axes" in notes[0]
    # The pose was the identity, x = r + t: a point r of the old map is at R (r - c) in the new one.
    rotation_33, origin_2, point_3 = new.poses.rotation_B33[0], new.poses.origin_B2[0], torch.tensor([20.0, -10.0, 5.0]).double()
    found = abinitio_maps.place_on_axes(away_ZYX, 6.0, symmetry)
    seen_3 = rotation_33 @ (found.rotation_33 @ (point_3 - found.centre_3))
    assert torch.allclose(seen_3[:2] - origin_2, point_3[:2])  # origins bring what is off centre back to it


def test_a_point_group_needs_its_axes(simulated: Path) -> None:
    session = abinitio.prepare(ParticleTable.read(simulated / "particles.star"), replace(CONFIG, symmetry="C2"), "cpu", 1)
    with pytest.raises(ValueError, match="axes"):
        next(abinitio.iterations(session))
    with pytest.raises(ValueError, match="propose"):
        next(abinitio.iterations(replace(session, config=replace(CONFIG, find_symmetry=True)), place=abinitio_maps.place_on_axes))


def test_maps_say_their_point_group_if_all_large_classes_agree() -> None:
    plain_ZYX = abinitio.random_blobs(32, 26, 4)
    even_ZYX, other_ZYX = (turned(plain_ZYX, symmetry_matrices(name)).mean(0) for name in ("D2", "C3"))
    found = abinitio_maps.propose_group([even_ZYX, plain_ZYX], [0.9, 0.1], 6.0)  # the small class is not asked
    assert found.group == "D2" and found.weakest > 0.8 and "D2 1." in found.notes[0]
    assert abinitio_maps.propose_group([plain_ZYX], [1.0], 6.0).group == "C1"
    differ = abinitio_maps.propose_group([even_ZYX, other_ZYX], [0.5, 0.5], 6.0)
    assert differ.group == "C1" and "the classes differ" in differ.notes[-1]


@pytest.mark.parametrize(("group", "stages"), [("C1", [Stage.FULL]), ("C2", [Stage.FULL, Stage.SYMMETRIC])])
def test_the_search_goes_on_with_the_group_that_was_found(simulated: Path, group: str, stages: list[Stage]) -> None:
    config = replace(CONFIG, find_symmetry=True, steps=10, full_iterations=1, batch=15, healpix_order=1)
    session = abinitio.prepare(ParticleTable.read(simulated / "particles.star"), config, "cpu", 1)
    asked: list[int] = []

    def propose(maps: Sequence[torch.Tensor], shares: Sequence[float], pixel_size: float) -> Proposed:
        asked.append(len(maps))
        return Proposed(group, 0.7, ["scores"])

    done = list(abinitio.iterations(session, None, abinitio_maps.place_on_axes, propose))
    state = done[-1].state
    assert asked == [1] and "scores" in done[1].notes and state.found_group == group and state.found_agreement == 0.7
    now = abinitio_symmetry.decided(config, state)
    assert [schedule.stage_of(one.state.iteration, now) for one in done] == [Stage.GRADIENT, *stages]
    if group == "C2":
        assert symmetry_correlation(state.halves[0].map_ZYX, "C2") > 0.95


def test_a_random_start_finds_the_map(simulated: Path) -> None:
    config = replace(CONFIG, initial_resolution=50, final_resolution=20, batch=50, full_iterations=2)
    session = abinitio.prepare(ParticleTable.read(simulated / "particles.star"), config, "cpu", 1)
    truth_ZYX = low_pass(torch.tensor(read_map(simulated / "truth.mrc").data_ZYX), 20.0, 6.0)
    before = align(session.state.halves[0].map_ZYX, truth_ZYX, 1152, either_hand=True).correlation
    *_, last = abinitio.iterations(session)
    after = align(low_pass(last.state.halves[0].map_ZYX, 20.0, 6.0), truth_ZYX, 1152, either_hand=True).correlation
    assert after > 0.85 > before


def test_starts_that_find_different_maps_are_told(simulated: Path) -> None:
    config = replace(CONFIG, restarts=2, full_iterations=1)
    session = abinitio.prepare(ParticleTable.read(simulated / "particles.star"), config, "cpu", 1)
    noise_RZYX = torch.randn(2, 32, 32, 32, generator=torch.Generator().manual_seed(3))
    blobs_ZYX = low_pass(abinitio.random_blobs(32, 26, 4), 20.0, 6.0)
    again_ZYX = turned(blobs_ZYX, random_rotations(1, torch.Generator().manual_seed(1)))[0].flip(2)  # also mirrored
    for candidates, agrees in ((list(noise_RZYX), False), ([blobs_ZYX, again_ZYX], True)):
        state = replace(session.state, iteration=2 * schedule.rounds(config) + 1, candidates=candidates)
        record = abinitio_run.abinitio_record(Iteration(state, {}, ["first"], torch.zeros(0, 2)), config, None)
        assert (record["consistency"] > 0.9) == agrees == (record["notes"] == ["first"])
    assert doubt_of_starts(0.49) is not None and doubt_of_starts(0.5) is None and doubt_of_starts(None) is None


@pytest.mark.slow
@pytest.mark.parametrize(("snr", "doubted"), [("1e-6", True), ("0.5", False)])
def test_noise_is_told_from_particles(tmp_path: Path, snr: str, doubted: bool) -> None:
    words = ["--n", "300", "--box", "32", "--pixel", "6", "--snr", snr, "--seed", "1", "--device", "cpu", "--model", "demo"]
    assert main(["simulate", *words, "--out", "set"]) == 0
    given = ["--particles", "set/particles.star", "--diameter", "150", "--batch", "60", "--device", "cpu", "--out", "out"]
    assert main(["abinitio", *given]) == 0
    assert ("warning" in json.loads(Path("out/result.json").read_text())["figures"]) == doubted
    assert ("Random starts found different maps" in Path("out/report.html").read_text()) == doubted
    assert ("Random starts found different maps" in Path("out/run.log").read_text()) == doubted


OPTIONS = ["--diameter", "150", "--restarts", "1", "--steps", "20", "--full-iterations", "1", "--batch", "15",
           "--healpix-order", "1", "--device", "cpu"]  # fmt: skip


def words(folder: Path, *more: str) -> list[str]:
    return ["abinitio", "--particles", str(folder / "particles.star"), *OPTIONS, "--out", "out", *more]


def test_files_events_and_report(simulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abinitio_maps, "CONSISTENCY_ROTATIONS", 64)
    assert main(words(simulated, "--steps", "10", "--restarts", "2", "--sym", "c2")) == 0
    out = Path("out")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    iterations = [event for event in events if event["event"] == "iteration"]
    assert [event["stage"] for event in iterations] == ["gradient"] * 2 + [
        "restarts compared", "all particles", "all particles, point group"]  # fmt: skip
    assert [event["final"] for event in iterations] == [False] * 4 + [True]
    assert iterations[1]["consistency"] is None and 0 < iterations[-1]["consistency"] <= 1
    data = ParticleTable.read(out / "run_it005_data.star").frame
    assert len(data) == 100 and set(data["rlnClassNumber"]) == {1}
    first, same = (read_map(out / name).data_ZYX for name in ("initial_model.mrc", "run_it005_class001.mrc"))
    assert np.array_equal(first, same)
    names = [read_star(out / f"run_it00{i}_sampling.star")["sampling_general"].values["rlnSymmetryGroup"] for i in (4, 5)]
    assert names == ["C1", "C2"]
    assert "hand of the maps is undetermined" in (out / "report.html").read_text()


def test_a_stopped_search_goes_on_and_writes_the_same(simulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = words(simulated, "--classes", "2")
    assert main(given) == 0
    data = ParticleTable.read("out/run_it003_data.star").frame
    last = json.loads([line for line in Path("out/events.jsonl").read_text().splitlines() if '"iteration"' in line][-1])
    counts = [one["particles"] for one in last["classes"]]
    assert counts == np.bincount(data["rlnClassNumber"], minlength=3)[1:].tolist() and sum(counts) == 100
    whole = {path.name: path.read_bytes() for path in Path("out").glob("run_it*.mrc")}
    original = abinitio.iterate

    def stopping(state: Any, *rest: Any) -> Any:
        if state.iteration + 1 == 2:  # in the middle of the gradient
            raise KeyboardInterrupt
        return original(state, *rest)

    monkeypatch.setattr(abinitio, "iterate", stopping)
    assert main([*given, "--overwrite"]) == 130
    monkeypatch.setattr(abinitio, "iterate", original)
    assert main(["abinitio", "--continue", "out", "--device", "cpu"]) == 0
    assert {path.name: path.read_bytes() for path in Path("out").glob("run_it*.mrc")} == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--classes", "0"], "--classes"),
        (["--classes", "8"], "8 for 100 particles"),
        (["--restarts", "0"], "--restarts"),
        (["--steps", "0"], "--steps"),
        (["--final-resolution", "50"], "--final-resolution"),
        (["--diameter", "500"], "--diameter"),
        (["--sym", "Q5"], "--sym"),
    ],
)
def test_refused_options(simulated: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(simulated), *change]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_inverted_images_are_refused(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stack", "--particles", str(simulated / "particles.star"), "--invert", "--out", "dark"]) == 0
    given = ["abinitio", "--particles", "dark/particles.star", *OPTIONS, "--out", "out"]
    assert main(given) == 2
    assert "contrast is inverted" in capsys.readouterr().err
