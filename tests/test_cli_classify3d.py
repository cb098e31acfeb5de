"""verglas classify3d: files, going on after a stop, refused options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verglas.cli.main import main
from verglas.core.rotations import angular_distance
from verglas.io.mrc import Map, read_map, write_map
from verglas.io.star import read_star
from verglas.particles.table import ParticleTable
from verglas.refinement import classes

OPTIONS = ["--diameter", "150", "--initial-resolution", "40", "--healpix-order", "1", "--iterations", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "set"
    words = ["simulate", "--n", "60", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--model", "demo-open", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(folder: Path, out: str, references: list[str], *more: str) -> list[str]:
    given = ["classify3d", "--particles", str(folder / "particles.star"), *OPTIONS, "--out", out, *more]
    return [*given, "--reference", *(str(folder / name) for name in references)]


BOTH = ["truth_class001.mrc", "truth_class002.mrc"]


def test_files_of_every_iteration_are_relions(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(simulated, "out", BOTH)) == 0
    out = Path("out")
    for number in (1, 2, 3):
        name = f"run_it{number:03d}"
        parts = {"data.star", "model.star", "sampling.star", "optimiser.star", "class001.mrc", "class002.mrc"}
        found = {path.name.removeprefix(f"{name}_") for path in out.glob(f"{name}_*")}
        assert found == parts | ({"class001.png", "class002.png"} if number == 3 else set())
    model = read_star(out / "run_it003_model.star")
    general, of_classes = model["model_general"].values, model["model_classes"].frame
    assert general["rlnNrClasses"] == 2 and general["rlnTau2FudgeFactor"] == 4
    assert of_classes["rlnClassDistribution"].sum() == pytest.approx(1)
    assert of_classes["rlnReferenceImage"].tolist() == [f"out/run_it003_class00{k}.mrc" for k in (1, 2)]
    for k in (1, 2):
        share = model[f"model_pdf_orient_class_{k}"].frame["rlnOrientationDistribution"].sum()
        assert share == pytest.approx(of_classes["rlnClassDistribution"][k - 1])
        assert len(model[f"model_class_{k}"].frame) == 17
    data = ParticleTable.read(out / "run_it003_data.star").frame
    assert set(data["rlnClassNumber"]) == {1, 2} and "rlnRandomSubset" not in data.columns
    optimiser = read_star(out / "run_it003_optimiser.star")["optimiser_general"].values
    assert optimiser["rlnDoSplitRandomHalves"] == 0 and optimiser["rlnNumberOfIterations"] == 3
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    iterations = [event for event in events if event["event"] == "iteration"]
    counts = [one["particles"] for one in iterations[-1]["classes"]]
    assert counts == np.bincount(data["rlnClassNumber"], minlength=3)[1:].tolist()
    assert [event["final"] for event in iterations] == [False, False, True]
    assert "Shares of the classes" in (out / "report.html").read_text()
    assert "classes " in capsys.readouterr().err


def test_maps_of_classes_are_not_each_others(simulated: Path) -> None:
    assert main(words(simulated, "out", BOTH)) == 0
    first, second = (read_map(f"out/run_it003_class00{k}.mrc").data_ZYX for k in (1, 2))
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] < 0.98


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_goes_on_and_writes_the_same(simulated: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = words(simulated, "out", ["start.mrc"], "--classes", "2")
    assert main(given) == 0
    whole = {path.name: path.read_bytes() for path in Path("out").glob("run_it*.*")}
    whole = {name: data.partition(b"\n#")[2] if name.endswith("optimiser.star") else data for name, data in whole.items()}
    original = classes.iterate

    def stopping(state: Any, *rest: Any) -> Any:
        if state.iteration + 1 == stop:
            raise KeyboardInterrupt
        return original(state, *rest)

    monkeypatch.setattr(classes, "iterate", stopping)
    assert main([*given, "--overwrite"]) == 130
    monkeypatch.setattr(classes, "iterate", original)
    assert main(["classify3d", "--continue", "out", "--device", "cpu"]) == 0
    again = {path.name: path.read_bytes() for path in Path("out").glob("run_it*.*")}
    for name, data in whole.items():
        same = again[name].partition(b"\n#")[2] if name.endswith("optimiser.star") else again[name]
        assert same == data, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--classes", "3"], "2 maps for 3 classes"),
        (["--classes", "0"], "--classes"),
        (["--iterations", "0"], "--iterations"),
        (["--tau2-fudge", "0"], "--tau2-fudge"),
        (["--limit-resolution-estep", "-5"], "--limit-resolution-estep"),
        (["--local-search", "-1"], "--local-search"),
        (["--local-search", "5"], "no poses"),
        (["--relax-sym", "D2"], "no poses"),
        (["--relax-sym", "C1"], "the group of --sym itself"),
        (["--relax-sym", "D2", "--sym", "C3"], "does not hold C3"),
        (["--relax-sym", "Q"], "--relax-sym: unknown symmetry"),
        (["--relax-sym", "D2", "--skip-align"], "--skip-align"),
        (["--offset-range", "1"], "--offset-range"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    simulated: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(simulated, "out", BOTH, *change)) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_more_classes_than_particles_can_fill_are_refused(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(simulated, "out", ["start.mrc"], "--classes", "4")) == 2
    assert "at most 3: 20 particles a class" in capsys.readouterr().err


def test_a_second_reference_that_is_inverted_is_refused(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = read_map(simulated / BOTH[1])
    write_map(Path("dark.mrc"), Map(-good.data_ZYX, good.pixel_size))
    given = words(simulated, "out", BOTH[:1])
    assert main([*given, "dark.mrc"]) == 2
    text = capsys.readouterr().err
    assert "dark.mrc" in text and "inverted" in text
    assert main([*given, "dark.mrc", "--ignore-contrast", "--iterations", "1"]) == 0


def test_runs_of_other_commands_are_not_continued(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(simulated, "out", BOTH, "--iterations", "1")) == 0
    assert main(["refine", "--continue", "out"]) == 2
    assert "classify3d" in capsys.readouterr().err
    assert main(["classify3d", "--continue", str(simulated)]) == 2
    assert "simulate" in capsys.readouterr().err
    assert main(["classify3d", "--continue", "out", "--iterations", "9"]) == 2
    assert "--iterations" in capsys.readouterr().err


def test_relaxed_symmetry_searches_near_every_mate(simulated: Path) -> None:
    """From poses that are a mate of the right ones, most are turned back; without, they stay. Files are those of --sym C1."""
    truth = ParticleTable.read(simulated / "truth.star")
    turned = truth.frame.assign(rlnAngleRot=truth.frame["rlnAngleRot"] + 120.0)  # A R: a turn about the map's z comes first
    replace(truth, frame=turned).write(simulated / "turned.star", overwrite=True)
    right = {}
    for name, more in (("relaxed", ["--relax-sym", "C3"]), ("local", ["--local-search", "5"])):
        given = words(simulated, name, BOTH, "--particles", str(simulated / "turned.star"), *more)
        given[given.index("--healpix-order") + 1] = "2"
        given[given.index("--iterations") + 1] = "2"
        assert main(given) == 0
        found = ParticleTable.read(Path(name) / "run_it002_data.star")
        away_B = angular_distance(found.rotations(), truth.rotations())
        right[name] = float((away_B < 30).double().mean())
    assert right["relaxed"] > 0.75 and right["local"] < 0.2
    sampling = read_star(Path("relaxed/run_it002_sampling.star"))["sampling_general"].values
    assert sampling["rlnSymmetryGroup"] == "C1"
    assert json.loads(Path("relaxed/config.json").read_text())["options"]["config"]["relax_symmetry"] == "C3"
