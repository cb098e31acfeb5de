"""verglas refine around the engine, with an engine that makes its iterations up: options, files, events, report, going on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

import verglas
import verglas.refinement
from made_up_engine import BOX, LAST, PIXEL, SHELLS, Iteration, N, engine_of, made_up
from verglas.cli import plan, refine_report
from verglas.cli.main import main
from verglas.cli.refine_report import sections_of
from verglas.cli.refine_run import Refinement, result_of
from verglas.cli.refine_watch import Watch, block, iterations_left, read_history, record_of, searches_ahead, seconds_left
from verglas.core.fourier import centred_irfft3, centred_rfft3, shells_of_half_volume
from verglas.core.shells import fsc, resolution_angstrom
from verglas.errors import InputError
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig
from verglas.refinement.files import FinalMaps
from verglas.refinement.plan_sizes import Machine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The made-up engine in place of the driver; returns what controls it."""
    control = SimpleNamespace(stop=None, refuse=None, prepared=0)
    fake = engine_of(control)
    monkeypatch.setitem(sys.modules, "verglas.refinement.driver", fake)
    monkeypatch.setattr(verglas.refinement, "driver", fake, raising=False)
    return control


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without figures, which take most of the time."""

    def write(path: Path, title: str, *rest: object, **options: object) -> None:
        path.write_text(title)

    monkeypatch.setattr(refine_report, "write_report", write)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated set with start.mrc."""
    out = tmp_path_factory.mktemp("simulated") / "set"
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--snr", 0.5, "--seed", 1, "--device", "cpu", "--out", out]
    assert main([str(word) for word in words]) == 0
    return out


def refine(data: Path, out: Path, *words: object) -> int:
    """Exit code of the command on the CPU."""
    arguments = ["--particles", data / "particles.star", "--reference", data / "start.mrc", "--diameter", 110, "--out", out]
    return main(["refine", *map(str, arguments), "--device", "cpu", *map(str, words)])


def events(out: Path, name: str) -> list[dict]:
    return [record for record in map(json.loads, (out / "events.jsonl").open()) if record["event"] == name]


def test_a_run_leaves_files_events_and_report(engine, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert refine(data, out) == 0
    names = {path.name for path in out.iterdir()}
    for number in range(1, LAST + 1):
        start = f"run_it{number:03d}"
        assert {f"{start}_data.star", f"{start}_half1_model.star", f"{start}_half1_class001.mrc"} <= names
    assert {"run_class001.mrc", "run_class001.png", "run_data.star"} <= names
    assert {f"run_half{half}_class001_unfil.mrc" for half in (1, 2)} <= names
    assert [record["iteration"] for record in events(out, "iteration")] == list(range(1, LAST + 1))
    last = events(out, "iteration")[-1]
    assert last["final"] and last["resolution"] == pytest.approx(40 / (LAST + 1)) and len(last["fsc"]) == SHELLS
    assert last["took"]["expectation"] == 1.5 and last["changes_angles"] == pytest.approx(8.0 / LAST)
    assert events(out, "iteration")[0]["changes_angles"] is None  # 999 is no number
    result = json.loads((out / "result.json").read_text())
    assert result["figures"]["resolution_at_SSNR_1"]["value"] == pytest.approx(40 / (LAST + 1), abs=5e-3)
    halves = [torch.tensor(read_map(out / f"run_half{half}_class001_unfil.mrc").data_ZYX) for half in (1, 2)]
    assert result["figures"]["resolution"]["value"] == resolution_angstrom(fsc(*halves), BOX, PIXEL) and result["seed"] == 0
    assert result["kernels"] == "made up" and result["precision"] == "single"
    page = (out / "report.html").read_text()
    maps = ("reference of half-set 2", "map of all particles")
    for title in ("Fourier shell", "Viewing directions", "Where the time went", "Junk shows", *maps):
        assert title in page
    assert "sampling refined: the resolution does not improve" in page
    assert np.array_equal(read_map(out / "run_class001.mrc").data_ZYX, made_up(N, LAST).halves[0].map_ZYX.numpy())
    told = capsys.readouterr().err
    assert "iteration 2: 13.3 Å, image size 20 px, sampling 7.5° and 1 px (global)" in told
    assert "final iteration: 6.67 Å" in told and "planned: at most" in told and "images are kept in memory" in told


@pytest.mark.parametrize("stop", [1, 2, 4, LAST])
def test_a_stopped_run_goes_on_and_ends_the_same(engine, no_report, data, tmp_path, capsys, stop):
    """Stopped before the first checkpoint (1), it begins again; stopped later, it goes on after the last one."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert refine(data, whole) == 0
    engine.stop = stop
    assert refine(data, out) == 130
    assert f"verglas refine --continue {out}" in capsys.readouterr().err.replace("\n", " ")
    assert not (out / "result.json").exists()
    engine.stop = None
    assert main(["refine", "--continue", str(out), "--device", "cpu"]) == 0
    assert [record["iteration"] for record in events(out, "iteration")] == list(range(1, LAST + 1))
    for name in ("run_class001.mrc", "run_half2_class001_unfil.mrc", f"run_it{LAST:03d}_data.star"):
        ours, theirs = (out / name).read_bytes(), (whole / name).read_bytes()
        assert ours[1024:] == theirs[1024:]  # the header of a map holds the date
    assert (out / "report.html").read_text() == "Refinement, C1"
    assert ("from the beginning" in capsys.readouterr().err) == (stop == 1)


def test_iterations_beyond_the_last_checkpoint_are_done_again(engine, no_report, data, tmp_path):
    """A kill between the files of an iteration and its checkpoint leaves both event and files of that iteration."""
    out = tmp_path / "out"
    engine.stop = 4
    assert refine(data, out) == 130
    (out / "run_it003.checkpoint").unlink()
    with (out / "events.jsonl").open("a") as file:
        file.write('{"event": "iteration", "iteration": 9')  # cut off
        file.write("\n")
    engine.stop = None
    assert main(["refine", "--continue", str(out), "--device", "cpu"]) == 0
    history = read_history(out / "events.jsonl", LAST)
    assert [record["iteration"] for record in history] == [1, 2, 3, 4, 5]


KILLED = """
import sys
from types import SimpleNamespace
sys.path.insert(0, {tests!r})
import made_up_engine, verglas.refinement
from verglas.cli import refine_report
from verglas.cli.main import main
fake = made_up_engine.engine_of(SimpleNamespace(stop=None, refuse=None, prepared=0))
sys.modules["verglas.refinement.driver"] = verglas.refinement.driver = fake
refine_report.write_report = lambda path, title, *rest, **options: path.write_text(title)
sys.exit(main({words!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.06, 0.1, 0.15, 0.25])
def test_a_killed_run_goes_on_and_ends_the_same(engine, no_report, data, tmp_path, delay):
    """kill -9 a while after the folder appeared: no file is half-written, and the maps are those of an undisturbed run."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert refine(data, whole) == 0
    words = ["refine", "--particles", data / "particles.star", "--reference", data / "start.mrc", "--diameter", 110, "--out", out]
    code = KILLED.format(tests=str(Path(__file__).parent), words=[*map(str, words), "--device", "cpu"])
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (out / "events.jsonl").exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()
    code_of_continue = main(["refine", "--continue", str(out), "--device", "cpu"])
    assert code_of_continue == (2 if process.returncode == 0 else 0)  # 2: it was quicker than the kill
    for path in sorted(whole.glob("run_*")):
        ours, theirs = (out / path.name).read_bytes(), path.read_bytes()
        if path.suffix == ".mrc":
            assert ours[1024:] == theirs[1024:], path.name
        elif path.name.endswith("_data.star"):
            assert ours == theirs, path.name
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_what_cannot_be_continued(engine, no_report, data, tmp_path, capsys):
    assert main(["refine", "--continue", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
    out = tmp_path / "out"
    assert refine(data, out) == 0
    assert main(["refine", "--continue", str(out)]) == 2
    assert "this run is finished" in capsys.readouterr().err
    assert main(["refine", "--continue", str(out), "--seed", "3"]) == 2
    assert "--seed" in capsys.readouterr().err
    assert main(["refine", "--continue", str(data)]) == 2
    assert "verglas simulate" in capsys.readouterr().err


def test_other_particles_are_not_continued(engine, no_report, data, tmp_path, capsys):
    table = ParticleTable.read(data / "particles.star")
    own = data / "own.star"
    table.write(own, overwrite=True)
    engine.stop = 3
    assert main(["refine", "--particles", str(own), "--reference", str(data / "start.mrc"), "--diameter", "110",
                 "--out", str(tmp_path / "out"), "--device", "cpu"]) == 130  # fmt: skip
    table.with_columns(rlnDefocusU=table.frame["rlnDefocusU"] + 10).write(own, overwrite=True)
    capsys.readouterr()
    assert main(["refine", "--continue", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "not the particles" in capsys.readouterr().err and (tmp_path / "out/run_it002.checkpoint").exists()


def test_refused_input_leaves_no_folder_and_keeps_the_old_run(engine, no_report, data, tmp_path, capsys):
    engine.refuse = InputError("image 3", "NaN", "numbers")
    assert refine(data, tmp_path / "new") == 2 and not (tmp_path / "new").exists()
    engine.refuse = None
    assert refine(data, tmp_path / "old") == 0
    before = (tmp_path / "old/result.json").read_bytes()
    engine.refuse = InputError("image 3", "NaN", "numbers")
    assert refine(data, tmp_path / "old", "--overwrite") == 2
    assert (tmp_path / "old/result.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--diameter", "-1"), "--diameter"),
        (("--diameter", "500"), "the width of the box"),
        (("--initial-resolution", "0"), "--initial-resolution"),
        (("--offset-range", "1"), "--offset-range"),
        (("--healpix-order", "9"), "--healpix-order"),
        (("--max-iterations", "0"), "--max-iterations"),
        (("--memory", "0"), "above 0"),
        (("--image-memory", "-1"), "above 0"),
        (("--solvent-corrected-fsc",), "--mask"),
        (("--seed", "-1"), "--seed"),
        (("--sym", "X7"), "--sym"),
    ],
)
def test_options_that_make_no_sense(engine, data, tmp_path, capsys, words, said):
    assert refine(data, tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists() and engine.prepared == 0


def test_a_run_that_cannot_fit_is_refused_with_what_would(engine, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "this_machine", lambda device, ranks: Machine("cpu", 1e6))
    assert refine(data, tmp_path / "out") == 2
    assert "memory of the host" in capsys.readouterr().err and not (tmp_path / "out").exists() and engine.prepared == 0


def test_what_a_new_run_needs(capsys):
    assert main(["refine", "--out", "nowhere"]) == 2
    assert "--particles: not given" in capsys.readouterr().err


# What is told


def example(number: int, final: bool = False) -> Iteration:
    state = made_up(N, number)
    maps = FinalMaps(state.halves[0], [half.map_ZYX for half in state.halves]) if final else None
    return Iteration(state, {"expectation": 8.0, "maximization": 2.0, "total": 10.0}, [], maps, torch.zeros(192, 2))


def test_expected_iterations():
    """Fine step 7.5° must come below 0.75 x 2°: three halvings of three iterations each, two more, and the final one. However
    rough the accuracy, a global search gets to order 5 at least; a local one does not."""
    schedule = made_up(N, 2).schedule
    assert schedule.healpix_order == 2 and not schedule.local_sigma
    assert iterations_left(schedule) == 3 * 3 + 2 + 1
    assert iterations_left(replace(schedule, accuracy_angles=1.2)) == 4 * 3 + 2 + 1
    assert iterations_left(replace(schedule, accuracy_angles=999.0)) is None
    assert iterations_left(replace(schedule, accuracy_angles=20.0)) == 3 * 3 + 2 + 1
    local = replace(schedule, accuracy_angles=20.0, local_sigma=3.75)
    assert iterations_left(local) == 3
    settled = replace(local, iterations_without_gain=1, iterations_without_changes=1)
    assert iterations_left(settled) == 2
    assert iterations_left(replace(settled, converged=True)) == 1


def test_expected_end():
    """The search: twice as now, three times on a grid that costs 8 times as much, then local, a quarter of that; the final one
    counts twice. What is no search (2 s) stays as it is."""
    schedule = made_up(N, 2).schedule
    assert searches_ahead(schedule) == [1.0] * 2 + [8.0] * 3 + [2.0] * 6 + [4.0]
    history = [record_of(example(2))]
    assert seconds_left(history) is None
    history += [record_of(example(3))]
    assert seconds_left(history) == pytest.approx(8.0 * (2 + 24 + 12 + 4) + 2.0 * 12)
    assert seconds_left(history, now=4.0) == pytest.approx(356.0)
    slow = record_of(example(2)) | {"took": {"expectation": 80.0}}
    assert seconds_left([slow, *history]) == seconds_left(history)
    assert seconds_left([record_of(example(LAST, final=True))]) is None


def test_lines_of_an_iteration():
    lines = block(record_of(example(2)), 75.0)
    assert lines[0] == "iteration 2: 13.3 Å, image size 20 px, sampling 7.5° and 1 px (global)"
    assert lines[1].startswith("  changes 4° and 0.444 px, accuracy 2° and 0.2 px, Pmax 0.")
    assert lines[2].startswith("  10 s: expectation 8.0 s, maximization 2.0 s; about 1 min 15 s left, ends ")


def test_what_is_not_known_yet_is_left_out():
    first = "".join(block(record_of(example(1)), None))
    assert "?" not in first and "changes" not in first and "Pmax" in first


def test_a_note_that_lasts_is_told_once():
    """Numbers may differ; a note of another kind, or after an iteration without it, is told."""
    notes = ["The FSC dips near 12.5 Å."], ["The FSC dips near 9 Å.", "refined to 3.75°"], [], ["The FSC dips near 8 Å."]
    records = [record_of(example(number)) | {"notes": said} for number, said in enumerate(notes, 1)]
    told = [block(record, None, before)[3:] for before, record in zip([None, *records], records)]
    assert told == [["  The FSC dips near 12.5 Å."], ["  refined to 3.75°"], [], ["  The FSC dips near 8 Å."]]


def test_live_view_tells_where_it_is():
    watch = Watch(lambda line: None, [record_of(example(3))])
    watch.progress("expectation", 60, N)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(watch.view())
    shown = console.export_text()
    for text in ("iteration 4", "expectation: 60 of 120 particles", "10 Å", "7.5° and 1 px (global)", "min", "ends"):
        assert text in shown


def test_report_of_the_first_iteration_and_of_a_long_run():
    """One iteration without any change measured is enough for a page; many do not make it long."""
    config = RefineConfig(diameter=110)
    first = sections_of([record_of(example(1))], example(1), config, {}, {})
    assert len(first) == 14 and "not changed" not in str(first)
    long = [record_of(example(number % 4 + 1)) | {"iteration": number} for number in range(1, 41)]
    curves = sections_of(long, example(LAST, final=True), config, {}, {})[1]
    assert len(curves.ys) == 12 and curves.labels[0] == "iteration 1" and curves.labels[-1].startswith("iteration 40")


def test_report_ends_curves_where_images_end_and_tells_lasting_notes_once():
    notes = ["The FSC dips near 12 Å."], ["The FSC dips near 9 Å.", "refined"], [], ["The FSC dips near 8 Å."]
    history = [record_of(example(number)) | {"notes": said} for number, said in enumerate(notes, 1)]
    sections = sections_of(history, example(4), RefineConfig(diameter=110), {}, {})
    curve_S = sections[1].ys[0]  # of images of 20 px: shells 0 to 10
    assert np.isfinite(curve_S[:11]).all() and np.isnan(curve_S[11:]).all() and len(curve_S) == SHELLS
    assert sections[-1].rows == [["1 to 2", "The FSC dips near 9 Å."], ["2", "refined"], ["4", "The FSC dips near 8 Å."]]


# What comes out


def test_resolution_is_where_the_unfiltered_halves_part(data):
    """Halves that agree up to shell 8 of 32 px and share nothing beyond."""
    made = example(LAST, final=True)
    assert made.final is not None
    common, own = (centred_rfft3(one) for one in torch.randn(2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(3)))
    shared = shells_of_half_volume(BOX) <= 8
    halves = [centred_irfft3(one, BOX) for one in (common, torch.where(shared, common, own))]
    made = replace(made, final=FinalMaps(made.final.joined, halves))
    result = result_of(made, ParticleTable.read(data / "particles.star"))
    assert result.resolution == pytest.approx(BOX * PIXEL / 8) and result.fsc_S[8] > 0.99 > 0.2 > abs(result.fsc_S[9])
    said = block(record_of(made, result.resolution), None)[0]
    assert said.startswith("final iteration: 6.67 Å (FSC 0.143: 18 Å)")


# From Python


def test_from_python_without_files(engine, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refinement = verglas.refine(data / "particles.star", data / "start.mrc", diameter=110, seed=4, device="cpu")
    assert isinstance(refinement, Refinement) and refinement.job.config.seed == 4
    first = next(refinement)
    assert first.state.iteration == 1 and first.final is None
    with pytest.raises(RuntimeError, match="not finished"):
        _ = refinement.result
    assert [event.state.iteration for event in refinement] == list(range(2, LAST + 1))
    result = refinement.result
    assert result.map.data_ZYX.shape == (BOX,) * 3 and result.map.pixel_size == PIXEL
    assert result.resolution == resolution_angstrom(result.fsc_S, BOX, PIXEL) and len(result.particles) == N
    assert torch.allclose(result.particles.rotations(), result.state.poses.rotation_B33, atol=1e-6)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_from_python_with_files_and_with_tables(engine, no_report, data, tmp_path):
    config = RefineConfig(diameter=100)
    made = verglas.refine(str(data / "particles.star"), str(data / "start.mrc"), config, out=tmp_path / "out", diameter=110,
                          device="cpu").run()  # fmt: skip
    assert (tmp_path / "out/run_class001.mrc").exists() and made.half_maps[1].box == BOX
    assert json.loads((tmp_path / "out/config.json").read_text())["options"]["config"]["diameter"] == 110
    table, reference = ParticleTable.read(data / "particles.star"), read_map(data / "start.mrc")
    again = verglas.refine(table, reference, config, device="cpu").run()
    assert np.array_equal(again.map.data_ZYX, made.map.data_ZYX)
    with pytest.raises(InputError, match="in memory"):
        verglas.refine(table, reference, config, out=tmp_path / "other")
    with pytest.raises(InputError, match="diameter"):
        verglas.refine(table, reference)
    with pytest.raises(AttributeError, match="reconstructt"):
        _ = verglas.reconstructt
