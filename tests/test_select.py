"""verglas select: each rule by hand on a small table, rules combined, what is written, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from verglas.cli.main import main
from verglas.core.rotations import euler_from_matrix, random_rotations
from verglas.core.symmetry import symmetry_matrices
from verglas.errors import InputError
from verglas.io.star import StarBlock, read_star, write_star
from verglas.particles import selection
from verglas.particles.table import ParticleTable


def write_table(folder: Path, **columns: object) -> Path:
    """A STAR file of these columns; its images are never read."""
    frame = pd.DataFrame(columns)
    frame = frame.assign(rlnImageName=[f"{i:06d}@a.mrcs" for i in range(1, len(frame) + 1)])
    if "rlnOpticsGroup" not in frame:
        frame = frame.assign(rlnOpticsGroup=1)
    numbers = sorted(set(frame["rlnOpticsGroup"]))
    optics = pd.DataFrame({"rlnOpticsGroup": numbers, "rlnOpticsGroupName": [f"g{n}" for n in numbers],
                           "rlnImagePixelSize": 4.0, "rlnMicrographOriginalPixelSize": 1.0, "rlnImageSize": 32,
                           "rlnImageDimensionality": 2, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7,
                           "rlnAmplitudeContrast": 0.1})  # fmt: skip
    blocks = [StarBlock.table("optics", optics), StarBlock.table("particles", frame)]
    write_star(folder / "in.star", {block.name: block for block in blocks}, overwrite=True)
    return folder / "in.star"


def kept_by(folder: Path, rule: selection.Rule, **columns: object) -> list[int]:
    """Positions of the particles that a rule keeps."""
    return np.flatnonzero(rule.keep(ParticleTable.read(write_table(folder, **columns)))).tolist()


def test_columns_and_classes(tmp_path):
    assert kept_by(tmp_path, selection.of_classes([1, 3]), rlnClassNumber=[1, 2, 3, 1]) == [0, 2, 3]
    assert kept_by(tmp_path, selection.within("rlnX", 1, 2), rlnX=[0.5, 1.0, 2.0, 2.5]) == [1, 2]
    defocus = {"rlnDefocusU": [9000.0, 11000, 30000], "rlnDefocusV": [9500.0, 10000, 29000]}
    assert kept_by(tmp_path, selection.of_defocus(10000, 25000), **defocus) == [1]
    with pytest.raises(InputError, match="class 7"):
        kept_by(tmp_path, selection.of_classes([7]), rlnClassNumber=[1, 2])


def test_quality(tmp_path):
    gain = [5.0, 9, 1, 7, 3]
    assert kept_by(tmp_path, selection.best_share(0.4), vglLogLikelihoodGain=gain) == [1, 3]
    assert kept_by(tmp_path, selection.best_share(0.4, "rlnOther"), vglLogLikelihoodGain=gain, rlnOther=gain[::-1]) == [1, 3]
    # Group 2 is worse as a whole; its median is its own. By hand: group 1 has median 11, deviation 1.4826 * 1.
    values, groups = [10.0, 11, 12, 7, 13, 1, 2, 3], [1, 1, 1, 1, 1, 2, 2, 2]
    found = kept_by(tmp_path, selection.without_outliers(2.5), vglLogLikelihoodGain=values, rlnOpticsGroup=groups)
    assert found == [0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(InputError, match="--quality"):
        kept_by(tmp_path, selection.best_share(0.5), rlnX=gain)


def test_duplicates_are_measured_where_particles_are(tmp_path):
    columns = {
        "rlnMicrographName": ["a", "a", "a", "a", "b", "a"],
        "rlnCoordinateX": [100.0, 105, 110, 300, 100, 330], "rlnCoordinateY": [50.0] * 6,
        "rlnOriginXAngst": [0.0, 0, 0, 0, 0, 25], "rlnOriginYAngst": [0.0] * 6,
    }  # fmt: skip
    # 100, 105, 110: neighbours are closer than 8 Å. The first stays, the second goes, and so the third stays. The last lies
    # at 330 - 25 = 305, where its origin says.
    assert kept_by(tmp_path, selection.without_duplicates(8), **columns) == [0, 2, 3, 4]
    quality = {"vglLogLikelihoodGain": [1.0, 2, 1, 1, 1, 5]}
    assert kept_by(tmp_path, selection.without_duplicates(8), **columns, **quality) == [1, 4, 5]
    assert kept_by(tmp_path, selection.without_duplicates(8, pixel_size=4.0), **columns) == [0, 1, 2, 3, 4, 5]


def test_duplicates_in_a_crowd_are_never_closer_than_asked(tmp_path):
    place = np.random.default_rng(0).uniform(0, 400, (300, 2))
    columns = {"rlnMicrographName": ["a"] * 300, "rlnCoordinateX": place[:, 0], "rlnCoordinateY": place[:, 1]}
    kept = kept_by(tmp_path, selection.without_duplicates(30), **columns)
    distance = np.linalg.norm(place[kept][:, None] - place[kept][None], axis=2) + 1e9 * np.eye(len(kept))
    gone = np.setdiff1d(np.arange(300), kept)
    assert distance.min() > 30 and 30 < len(kept) < 200
    assert np.linalg.norm(place[gone][:, None] - place[kept][None], axis=2).min(1).max() <= 30  # none went without a reason


@pytest.mark.parametrize("symmetry, directions", [("C1", 40), ("D2", 160)])
def test_crowded_views_lose_their_worst(tmp_path, symmetry, directions):
    random = torch.Generator().manual_seed(0)
    even, mates = random_rotations(400, random), symmetry_matrices(symmetry)
    crowd = even[:1].repeat(200, 1, 1) @ mates[torch.arange(200) % len(mates)]  # one view, at any of its mates
    angles = euler_from_matrix(torch.cat([even, crowd])).T.numpy()
    columns = dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles)) | {"rlnQ": np.arange(600.0)}
    kept = np.array(kept_by(tmp_path, selection.rebalanced(2, directions, symmetry, "rlnQ"), **columns))
    crowded = kept[kept >= 400]
    assert (kept < 400).sum() > 380 and 20 <= len(crowded) <= 60
    assert crowded.tolist() == list(range(600 - len(crowded), 600))


def test_random_subsets_repeat(tmp_path):
    columns = {"rlnX": np.arange(100.0)}
    first = kept_by(tmp_path, selection.random_subset(30, 1), **columns)
    assert len(first) == 30 and first == kept_by(tmp_path, selection.random_subset(0.3, 1), **columns)
    assert first != kept_by(tmp_path, selection.random_subset(30, 2), **columns)
    assert len(kept_by(tmp_path, selection.random_subset(500, 1), **columns)) == 100


def test_command_combines_rules_and_says_why(tmp_path, capsys):
    star = write_table(tmp_path, rlnClassNumber=[1, 1, 2, 2, 3], vglPosteriorEntropy=[1.0, 6, 1, 1, 1], rlnNote=list("abcde"))
    words = ["select", "--particles", str(star), "--classes", "1", "2", "--max-entropy", "5", "--subset", "2"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    kept, gone = (read_star(tmp_path / "out" / name)["particles"].frame for name in ("particles.star", "discarded.star"))
    assert len(kept) == 2 and set(kept["rlnNote"]) < {"a", "c", "d"} and "vglDiscardedBy" not in kept
    reasons = dict(zip(gone["rlnNote"], gone["vglDiscardedBy"]))
    assert reasons["e"] == "other_class" and reasons["b"] == "vglPosteriorEntropy_not_at_most_5"
    assert "other class: 1 discarded" in capsys.readouterr().err
    assert "crowd" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "words, kept",
    [
        (["--min-defocus", "10000"], "bcd"),
        (["--min-defocus", "10000", "--max-defocus", "20000"], "bc"),
        (["--max-ctf-resolution", "4.5"], "ab"),
        (["--min-ctf-merit", "0.2"], "bcd"),
        (["--min-pmax", "0.5"], "acd"),
        (["--min-alignability", "0.7"], "cd"),
        (["--where", "rlnCtfMaxResolution", "4", "5"], "bc"),
        (["--outliers", "4"], "bcd"),
        (["--best", "0.5", "--quality", "rlnCtfFigureOfMerit"], "cd"),
        (["--duplicates", "30", "--micrograph-pixel", "1.5"], "bcd"),
        (["--classes", "2", "--fraction", "0.99"], "cd"),
    ],
)
def test_each_option_keeps_what_it_says(tmp_path, words, kept):
    star = write_table(
        tmp_path, rlnNote=list("abcd"), rlnDefocusU=[9e3, 1.1e4, 1.5e4, 2.5e4], rlnDefocusV=[9e3, 1e4, 1.4e4, 2.4e4],
        rlnDefocusAngle=[0.0] * 4, rlnCtfMaxResolution=[3.0, 4.5, 5, 6], rlnCtfFigureOfMerit=[0.1, 0.2, 0.3, 0.4],
        rlnMaxValueProbDistribution=[0.9, 0.1, 0.5, 0.8], vglAlignability=[0.1, 0.6, 0.7, 0.9], rlnClassNumber=[1, 1, 2, 2],
        vglLogLikelihoodGain=[1.0, 20, 21, 22], rlnMicrographName=["m"] * 4,
        rlnCoordinateX=[0.0, 19, 60, 60], rlnCoordinateY=[0.0, 0, 0, 21],
    )  # fmt: skip
    assert main(["select", "--particles", str(star), *words, "--out", str(tmp_path / "out")]) == 0
    assert "".join(read_star(tmp_path / "out/particles.star")["particles"].frame["rlnNote"]) == kept


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "no rule"),
        (["--classes", "9"], "class 9"),
        (["--where", "rlnX", "5", "1"], "the lower one first"),
        (["--where", "rlnNo", "0", "1"], "rlnNo"),
        (["--where", "rlnX", "50", "60"], "no particle is left"),
        (["--where", "rlnBad", "0", "1"], "finite"),
        (["--best", "1.5"], "share"),
        (["--outliers", "3"], "--quality"),
        (["--duplicates", "50"], "rlnMicrographName"),
        (["--rebalance", "2"], "rlnAngleRot"),
        (["--subset", "5", "--fraction", "0.5"], "one of the two"),
        (["--subset", "-1"], "above 0"),
        (["--min-ctf-merit", "0.1"], "rlnCtfFigureOfMerit"),
    ],
)
def test_bad_input_is_refused(tmp_path, capsys, words, said):
    star = write_table(tmp_path, rlnClassNumber=[1, 1, 2], rlnX=[1.0, 2, 3], rlnBad=[1.0, np.nan, 3])
    assert main(["select", "--particles", str(star), *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
