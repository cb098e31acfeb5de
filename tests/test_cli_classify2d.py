"""verglas classify2d: files, selection, going on after a stop, refused options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verglas.cli.main import main
from verglas.io.mrc import Stack
from verglas.io.star import read_star
from verglas.particles.table import ParticleTable
from verglas.refinement import classify2d, classify2d_schedule

OPTIONS = ["--diameter", "150", "--classes", "3", "--iterations", "3", "--psi-step", "30", "--device", "cpu"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "set"
    words = ["simulate", "--n", "60", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(folder: Path, *more: str) -> list[str]:
    return ["classify2d", "--particles", str(folder / "particles.star"), *OPTIONS, "--out", "out", *more]


def test_files_of_every_iteration_are_relions(simulated: Path) -> None:
    assert main(words(simulated, "--select", "1-2")) == 0
    out = Path("out")
    for number in (1, 2, 3):
        name = f"run_it{number:03d}"
        found = {path.name.removeprefix(f"{name}_") for path in out.glob(f"{name}_*")}
        assert found == {"data.star", "model.star", "sampling.star", "optimiser.star", "classes.mrcs"}
    model = read_star(out / "run_it003_model.star")
    general, of_classes = model["model_general"].values, model["model_classes"].frame
    assert general["rlnReferenceDimensionality"] == 2 and general["rlnNrClasses"] == 3
    assert of_classes["rlnReferenceImage"].tolist() == [f"00000{k}@out/run_it003_classes.mrcs" for k in (1, 2, 3)]
    assert of_classes["rlnClassDistribution"].sum() == pytest.approx(1)
    stack = Stack.open(out / "run_it003_classes.mrcs")
    assert len(stack) == 3 and np.isfinite(stack.read(slice(0, 3))).all()
    sampling = read_star(out / "run_it003_sampling.star")["sampling_general"].values
    assert sampling["rlnIs3DSampling"] == 0 and sampling["rlnPsiStep"] == 30
    data = ParticleTable.read(out / "run_it003_data.star").frame
    assert (data["rlnAngleRot"].abs() < 1e-9).all() and (data["rlnAngleTilt"].abs() < 1e-9).all()
    assert data["rlnAnglePsi"].nunique() > 10 and "rlnRandomSubset" not in data.columns
    chosen = ParticleTable.read(out / "particles_selected.star").frame
    assert set(chosen["rlnClassNumber"]) <= {1, 2} and len(chosen) == (data["rlnClassNumber"] <= 2).sum()
    ranking = read_star(out / "class_ranking.star")["class_ranking"].frame
    assert ranking["rlnClassScore"].is_monotonic_decreasing and ranking["rlnSelected"].sum() == 2
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "iteration"][-1]
    assert [one["particles"] for one in last["averages"]] == np.bincount(data["rlnClassNumber"], minlength=4)[1:].tolist()
    assert "Class averages by score" in (out / "report.html").read_text()


@pytest.mark.parametrize(("stop", "mode"), [(1, "--em"), (3, "--em"), (2, "--gradient"), (3, "--gradient")])
def test_a_stopped_run_goes_on_and_writes_the_same(
    simulated: Path, stop: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify2d_schedule, "FEWEST_IN_BATCH", 20)
    options = words(simulated, mode, "--batch", "5")
    assert main(options) == 0
    whole = {path.name: path.read_bytes() for path in Path("out").glob("*.*") if path.suffix in (".star", ".mrcs")}
    whole = {name: data.partition(b"\n#")[2] if name.endswith("optimiser.star") else data for name, data in whole.items()}
    original = classify2d.iterate

    def stopping(state: Any, *rest: Any) -> Any:
        if state.iteration + 1 == stop:
            raise KeyboardInterrupt
        return original(state, *rest)

    monkeypatch.setattr(classify2d, "iterate", stopping)
    assert main([*options, "--overwrite"]) == 130
    monkeypatch.setattr(classify2d, "iterate", original)
    assert main(["classify2d", "--continue", "out", "--device", "cpu"]) == 0
    for name, data in whole.items():
        again = (Path("out") / name).read_bytes()
        assert (again.partition(b"\n#")[2] if name.endswith("optimiser.star") else again) == data, name


def test_the_gradient_looks_at_batches_and_at_all_particles_at_last(
    simulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify2d_schedule, "FEWEST_IN_BATCH", 20)
    assert main(words(simulated, "--gradient", "--batch", "5")) == 0
    events = [json.loads(line) for line in Path("out/events.jsonl").read_text().splitlines()]
    iterations = [event for event in events if event["event"] == "iteration"]
    assert [event["seen"] for event in iterations] == [20, 45, 60]
    assert iterations[0]["searches_left"] == pytest.approx(105 / 20) and iterations[-1]["final"]
    assert "found by the gradient" in Path("out/run.log").read_text()
    data = ParticleTable.read("out/run_it003_data.star").frame
    assert (data["rlnNrOfSignificantSamples"] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--classes", "0"], "--classes"),
        (["--classes", "501"], "1 to 500"),
        (["--classes", "13"], "at most 12"),
        (["--iterations", "0"], "--iterations"),
        (["--gradient", "--em"], "--em"),
        (["--batch", "0"], "--batch"),
        (["--tau2-fudge", "0"], "--tau2-fudge"),
        (["--psi-step", "0"], "--psi-step"),
        (["--select", "best"], "'best'"),
        (["--select", "score>=x"], "--select"),
        (["--select", "2,9"], "classes from 1 to 3"),
        (["--diameter", "900"], "--diameter"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    simulated: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(simulated, *change)) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_dark_particles_are_refused(simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stack", "--particles", str(simulated / "particles.star"), "--invert", "--out", str(tmp_path / "dark")]) == 0
    given = ["classify2d", "--particles", str(tmp_path / "dark/particles.star"), *OPTIONS, "--out", "out"]
    assert main(given) == 2
    assert "contrast is inverted" in capsys.readouterr().err and not Path("out").exists()
