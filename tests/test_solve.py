"""verglas solve: what it decides, which stages it runs again, what it says when there is nothing to see.

The commands themselves are stood in for by small made-up results; tests/test_solve_whole.py runs the real ones.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from verglas.cli import solve_choices as choices
from verglas.cli import solve_run
from verglas.cli.main import main
from verglas.errors import InputError
from verglas.io.mrc import Map, StackWriter, write_map
from verglas.io.star_block import StarBlock
from verglas.io.star_write import write_star
from verglas.particles.table import ParticleTable

N, BOX, PIXEL = 1200, 16, 4.0


def test_numbers_of_classes_follow_the_particles() -> None:
    assert [choices.classes2d(n, None)[0] for n in (200, 1000, 2374, 100_000)] == [10, 20, 47, 200]
    assert [choices.classes3d(n, None)[0] for n in (999, 1000, 1700, 50_000)] == [1, 2, 3, 4]
    assert choices.classes2d(1000, 50) == (50, "asked for with --classes2d")
    for ask in (choices.classes2d, choices.classes3d):
        with pytest.raises(InputError, match="20 particles a class"):
            ask(1000, 51)


def test_classes_of_one_structure_go_together() -> None:
    kept, why = choices.kept_classes([0.5, 0.3, 0.05, 0.15], [12.0, 9.0, 5.0, 20.0], lambda best: [0.95, 1.0, 0.97, 0.3])
    assert kept == [1, 0, 2]  # 5 Å counts for nothing: too few particles; but its map agrees
    assert "class 2 has the finest map (9 Å, 30 %" in why and "class 1 is the same structure (correlation 0.95" in why


def test_what_may_be_claimed() -> None:
    assert choices.claim(8.1, 9.0).resolution == 8.1
    assert ["smaller ones may show more" in choices.claim(8.1, 9.0, finest).text for finest in (8.0, 6.0)] == [True, False]
    for corrected, unmasked in ((29.0, 35.0), (45.0, 60.0), (20.0, 45.0)):
        refused = choices.claim(corrected, unmasked)
        assert refused.resolution is None and "no resolution is claimed" in refused.text
    assert choices.hand_text(4.1)[0] and not choices.hand_text(3.9)[0]


def test_the_proposed_symmetry_is_taken() -> None:
    name, why = choices.symmetry("D2", 0.8)
    assert name == "D2" and "at least 0.80" in why and choices.symmetry("C1", 1.0)[0] == "C1"


class Commands:
    """Stands in for the commands of the stages: writes the files that the next one reads, and notes the words it was called with.

    selected: 2-D classes that look good; agreement: of random starts; resolution: between the half-maps; stop: command that is
    stopped by Ctrl-C.
    """

    def __init__(self, table: ParticleTable) -> None:
        self.table = table
        self.calls: list[tuple[str, list[str]]] = []
        self.selected, self.agreement, self.resolution, self.stop = 6, 0.9, 8.0, ""

    def __call__(self, name: str, words: list[str]) -> None:
        self.calls.append((name, words))
        out = Path(words[words.index("--out" if "--out" in words else "--continue") + 1])
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text(json.dumps({"command": name, "command_line": f"verglas {shlex.join([name, *words])}"}))
        if name == self.stop:
            raise KeyboardInterrupt
        figures = getattr(self, name.replace("-", "_"))(out)
        figures = {key: {"value": value, "unit": ""} for key, value in figures.items()}
        (out / "result.json").write_text(json.dumps({"figures": figures, "seconds": 1.0}))

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def data(self, path: Path, count: int, classes: int) -> None:
        columns = {"rlnClassNumber": 1 + np.arange(count) % classes}
        columns |= {f"rlnAngle{name}": np.linspace(0, 90, count) for name in ("Rot", "Tilt", "Psi")}
        self.table.subset(count, 0).with_columns(**columns).write(path, overwrite=True)

    def classify2d(self, out: Path) -> dict[str, object]:
        self.data(out / "run_it025_data.star", N, 10)
        self.data(out / "particles_selected.star", 1100, 10)
        names = [f"{k:06d}@run_it025_classes.mrcs" for k in range(10, 0, -1)]
        chosen = [int(i < self.selected) for i in range(10)]
        frame = pd.DataFrame({"rlnReferenceImage": names, "rlnClassScore": np.linspace(1, 0, 10), "rlnSelected": chosen,
                              "rlnClassDistribution": 0.1})  # fmt: skip
        write_star(out / "class_ranking.star", {"class_ranking": StarBlock.table("class_ranking", frame)}, overwrite=True)
        with StackWriter(out / "run_it025_classes.mrcs", n=10, box_yx=(BOX, BOX), pixel_size=PIXEL, overwrite=True) as stack:
            stack.append(np.random.default_rng(0).normal(size=(10, BOX, BOX)).astype(np.float32))
        return {}

    def some_map(self, path: Path, radius: float = 5.0) -> None:
        axis = np.arange(BOX) - BOX // 2
        ball = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < radius**2).astype(np.float32)
        write_map(path, Map(ball, PIXEL), overwrite=True)

    def abinitio(self, out: Path) -> dict[str, object]:
        self.some_map(out / "initial_model.mrc")
        return {"consistency_of_restarts": self.agreement}

    def abinitio_anew(self, out: Path, time: float) -> None:
        """As if its command had been run again by hand at that time."""
        content = json.loads((out / "result.json").read_text())
        content["figures"]["consistency_of_restarts"]["value"] = self.agreement
        (out / "result.json").write_text(json.dumps(content))
        os.utime(out / "result.json", (time, time))

    def align_symmetry(self, out: Path) -> dict[str, object]:
        self.some_map(out / "symmetrised.mrc")
        return {"symmetry": "D2", "worst_operation": 0.8}

    def classify3d(self, out: Path) -> dict[str, object]:
        self.data(out / "run_it015_data.star", 1100, 2)
        self.some_map(out / "run_it015_class001.mrc", 2.0)
        self.some_map(out / "run_it015_class002.mrc", 6.0)
        shares = {f"class_{k}_share": 0.5 for k in (1, 2)}
        return shares | {"class_1_resolution_at_SSNR_1": 20.0, "class_2_resolution_at_SSNR_1": 10.0}

    def refine(self, out: Path) -> dict[str, object]:
        self.data(out / "run_data.star", 550, 1)
        return {}

    def postprocess(self, out: Path) -> dict[str, object]:
        for name in ("map.mrc", "mask.mrc"):
            self.some_map(out / name)
        x = np.arange(9) / (BOX * PIXEL)
        pd.DataFrame({"frequency_1_per_A": x, "fsc_used": np.linspace(1, 0, 9)}).to_csv(out / "fsc.csv")
        return {"resolution": self.resolution, "resolution_unmasked": self.resolution + 1}

    def localres(self, out: Path) -> dict[str, object]:
        self.some_map(out / "localres.mrc")
        return {}


ORDER = ["classify2d", "abinitio", "align-symmetry", "classify3d", "refine", "postprocess", "localres"]


@pytest.fixture
def particles(tmp_path: Path) -> ParticleTable:
    with StackWriter(tmp_path / "images.mrcs", n=2, box_yx=(BOX, BOX), pixel_size=PIXEL) as stack:
        stack.append(np.zeros((2, BOX, BOX), np.float32))
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnImagePixelSize": [PIXEL], "rlnImageSize": [BOX],
                           "rlnImageDimensionality": [2], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
                           "rlnAmplitudeContrast": [0.1]})  # fmt: skip
    frame = pd.DataFrame({"rlnImageName": [f"{1 + i % 2:06d}@images.mrcs" for i in range(N)], "rlnOpticsGroup": 1,
                          "rlnDefocusU": 15000.0})  # fmt: skip
    table = ParticleTable(frame, optics, tmp_path, tmp_path / "particles.star")
    table.write(tmp_path / "particles.star")
    return table


@pytest.fixture
def commands(particles: ParticleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.chdir(tmp_path)
    made = Commands(particles)
    monkeypatch.setattr(solve_run, "run_command", made)
    return made


def solve(*more: str) -> int:
    return main(["solve", "--particles", "particles.star", "--diameter", "50", "--out", "out", "--device", "cpu", *more])


def test_the_whole_story(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve() == 0
    assert commands.names() == ORDER
    words = dict(commands.calls)
    out = Path("out").absolute()
    assert words["classify3d"][words["classify3d"].index("--reference") + 1] == str(out / "4_symmetry" / "symmetrised.mrc")
    assert words["refine"][words["refine"].index("--sym") + 1] == "D2"
    assert words["refine"][words["refine"].index("--reference") + 1] == str(out / "5_classify3d" / "run_it015_class002.mrc")
    assert len(ParticleTable.read("out/particles_3d.star")) == 550
    decisions = json.loads(Path("out/decisions.json").read_text())["decisions"]
    told = {one["stage"]: one["decision"] for one in decisions}
    assert told["Symmetry"] == "D2" and told["Resolution"] == "8 Å" and told["Hand"] == "undetermined"
    result = json.loads(Path("out/result.json").read_text())["figures"]
    assert result["resolution"]["value"] == 8.0 and result["particles_used"]["value"] == 550
    page = Path("out/report.html").read_text()
    for text in ("verglas flip --maps", "the hand cannot be told", "kept: 6 classes", "left out: 4 classes",
                 "3-D classes of another", "from random starts", "Agreement of the half-maps", "Viewing directions",
                 "Local resolution"):  # fmt: skip
        assert text in page, text
    assert Path("out/map.png").is_file()


@pytest.mark.parametrize("stage", ["classify2d", "classify3d", "refine", "localres"])
def test_a_stopped_run_goes_on_at_its_stage(commands: Commands, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands.stop = stage
    assert solve() == 130
    assert "verglas solve --continue" in capsys.readouterr().err.replace("\n", " ")
    assert not Path("out/result.json").exists()
    commands.stop, commands.calls = "", []
    assert main(["solve", "--continue", "out"]) == 0
    assert commands.names() == ORDER[ORDER.index(stage) :]
    first = commands.calls[0][1]
    assert ("--continue" in first) == (stage in solve_run.ITERATIVE) and ("--overwrite" in first) != ("--continue" in first)
    assert Path("out/result.json").is_file()


def test_the_same_command_goes_on_if_it_may(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    commands.stop = "refine"
    assert solve("--elastic") == 130
    commands.stop = ""
    begun = len(commands.calls)
    assert solve() == 2 and "--overwrite" in capsys.readouterr().err
    assert solve("--elastic", "--seed", "1") == 2 and len(commands.calls) == begun  # another run
    assert solve("--elastic") == 0 and commands.names()[begun:] == ["refine", "postprocess", "localres"]
    assert solve("--elastic") == 2  # it is finished


def test_a_stage_that_was_made_anew_makes_later_ones_anew(commands: Commands) -> None:
    assert solve() == 0
    later = Path("out/result.json").stat().st_mtime + 10
    os.utime("out/5_classify3d/result.json", (later, later))
    commands.calls = []
    assert main(["solve", "--continue", "out"]) == 0
    assert commands.names() == ["refine", "postprocess", "localres"]
    assert "--overwrite" in commands.calls[0][1] and "--continue" not in commands.calls[0][1]


def test_junk_gives_no_map(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    commands.selected = 0
    assert solve() == 2
    assert "No map. None of the 2-D class averages" in capsys.readouterr().err.replace("\n", " ")
    assert commands.names() == ["classify2d"]
    assert json.loads(Path("out/result.json").read_text())["figures"]["outcome"]["value"] == "no map"
    page = Path("out/report.html").read_text()
    assert "None of the 2-D class averages looks like a particle" in page and "left out: 10 classes" in page


def test_starts_that_do_not_agree_give_no_map(commands: Commands) -> None:
    commands.agreement = 0.38  # as on pure noise
    assert solve() == 2
    assert commands.names() == ["classify2d", "abinitio"]
    page = Path("out/report.html").read_text()
    assert "Random starts found different maps: they correlate by 0.38" in page and "--restarts 2" in page
    commands.agreement, commands.calls = 0.9, []
    later = Path("out/3_abinitio/result.json").stat().st_mtime + 10
    commands.abinitio_anew(Path("out/3_abinitio"), later)
    assert main(["solve", "--continue", "out"]) == 0
    assert commands.names() == ORDER[2:]


def test_halves_that_do_not_agree_give_no_resolution(commands: Commands) -> None:
    commands.resolution = 35.0
    assert solve() == 2
    assert "localres" not in commands.names()
    figures = json.loads(Path("out/result.json").read_text())["figures"]
    assert figures["outcome"]["value"] == "no map" and "resolution" not in figures
    assert "no resolution is claimed" in Path("out/report.html").read_text()


def test_few_particles_are_one_class(commands: Commands) -> None:
    assert solve("--classes3d", "1", "--sym", "c1") == 0
    assert commands.names() == ["classify2d", "abinitio", "refine", "postprocess", "localres"]
    refined = dict(commands.calls)["refine"]
    assert refined[refined.index("--sym") + 1] == "C1"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--classes2d", "90"], "1 to 60"),
        (["--classes3d", "0"], "--classes3d"),
        (["--sym", "X9"], "X9"),
        (["--diameter", "0"], "--diameter"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    commands: Commands, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solve(*more) == 2
    assert message in capsys.readouterr().err and not Path("out").exists() and not commands.calls


def test_inverted_contrast_is_told_before_anything_is_made(
    commands: Commands, particles: ParticleTable, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--n", "200", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "3", "--device", "cpu", "--model", "demo"]
    assert main(["simulate", *words, "--out", "set"]) == 0
    assert main(["stack", "--particles", "set/particles.star", "--invert", "--out", "dark"]) == 0
    assert solve("--particles", "dark/particles.star", "--diameter", "150") == 2
    assert "contrast is inverted" in capsys.readouterr().err and not Path("out").exists()
    assert solve("--particles", "dark/particles.star", "--diameter", "150", "--ignore-contrast", "--classes3d", "1") == 0
    assert all("--ignore-contrast" in words for name, words in commands.calls if name in solve_run.ITERATIVE)


def test_too_few_particles(commands: Commands, particles: ParticleTable, capsys: pytest.CaptureFixture[str]) -> None:
    particles.subset(99, 0).write("few.star")
    assert solve("--particles", "few.star") == 2
    assert "at least 100" in capsys.readouterr().err


def test_other_runs_are_not_continued(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other").mkdir()
    Path("other/config.json").write_text('{"command": "refine", "options": {}}')
    assert main(["solve", "--continue", "other"]) == 2
    assert "one of `verglas solve`" in capsys.readouterr().err
