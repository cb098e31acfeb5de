"""`verglas stack` from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import tyro

from verglas.cli.stack import Stack
from verglas.errors import InputError, OutputError
from verglas.particles.table import ParticleTable


def run(*arguments: object) -> None:
    tyro.cli(Stack, args=[str(a) for a in arguments], config=(tyro.conf.OmitArgPrefixes,)).run()


def make_set(folder: Path, n: int = 6, box: int = 16, seed: int = 0, voxel: float = 2.0) -> tuple[Path, np.ndarray]:
    folder.mkdir()
    data = np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32)
    with mrcfile.new(folder / "stack.mrcs") as file:
        file.set_data(data)
        file.set_image_stack()
        file.voxel_size = voxel
    optics = pd.DataFrame([{"rlnOpticsGroupName": "g", "rlnOpticsGroup": 1, "rlnImagePixelSize": 2.0, "rlnImageSize": box}])
    names = [f"{i + 1:06d}@stack.mrcs" for i in range(n)]
    frame = pd.DataFrame(
        {"rlnImageName": names, "rlnOpticsGroup": 1, "rlnDefocusU": 1e4, "rlnOriginXAngst": 3.0, "rlnOriginYAngst": 0.5}
    )
    ParticleTable(frame, optics, folder, folder / "p.star").write(folder / "p.star")
    return folder / "p.star", data


def test_merge_downsample_and_report(tmp_path):
    (first, _), (second, _) = make_set(tmp_path / "a"), make_set(tmp_path / "b", seed=1)
    out = tmp_path / "out"
    run("--particles", first, second, "--out", out, "--box", 8, "--recentre", "--float16")
    table = ParticleTable.read(out / "particles.star")
    assert len(table) == 12
    assert (table.groups[0].box, table.groups[0].pixel_size) == (8, 4.0)
    stack = mrcfile.mmap(out / "particles.mrcs")
    assert stack.data.shape == (12, 8, 8) and stack.data.dtype == np.float16
    assert float(stack.voxel_size.x) == pytest.approx(4.0)
    figures = json.loads((out / "result.json").read_text())["figures"]
    assert figures["particles"]["value"] == 12
    assert figures["pixel_size"] == {"value": 4.0, "unit": "Å"}
    assert (out / "report.html").stat().st_size > 1000
    assert {"run.log", "config.json", "events.jsonl"} <= {path.name for path in out.iterdir()}


def test_subset_is_the_same_for_the_same_seed(tmp_path):
    star, data = make_set(tmp_path / "a", n=30)
    stacks = []
    for name, seed in (("x", 3), ("y", 3), ("z", 4)):
        run("--particles", star, "--out", tmp_path / name, "--subset", 5, "--seed", seed, "--invert")
        stacks.append(mrcfile.read(tmp_path / name / "particles.mrcs"))
    assert np.array_equal(stacks[0], stacks[1]) and not np.array_equal(stacks[0], stacks[2])
    assert all((data == -image).all(axis=(1, 2)).any() for image in stacks[0])


def test_plain_stacks(tmp_path):
    _, data = make_set(tmp_path / "a")
    run("--particles", tmp_path / "a/stack.mrcs", "--out", tmp_path / "out")
    assert np.array_equal(mrcfile.read(tmp_path / "out/particles.mrcs"), data)
    assert ParticleTable.read(tmp_path / "out/particles.star").groups[0].pixel_size == 2.0


def test_voxel_size_zero_needs_the_option(tmp_path):
    make_set(tmp_path / "a", voxel=0.0)
    with pytest.raises(InputError, match=r"voxel size 0.*--pixel-size"):
        run("--particles", tmp_path / "a/stack.mrcs", "--out", tmp_path / "out")
    run("--particles", tmp_path / "a/stack.mrcs", "--out", tmp_path / "out", "--pixel-size", 1.25)
    assert ParticleTable.read(tmp_path / "out/particles.star").groups[0].pixel_size == 1.25


def test_bad_images_are_refused_or_left_out(tmp_path):
    star, data = make_set(tmp_path / "a")
    with mrcfile.mmap(tmp_path / "a/stack.mrcs", "r+") as file:
        file.data[3] = 0
    with pytest.raises(InputError, match="000004@"):
        run("--particles", star, "--out", tmp_path / "out")
    run("--particles", star, "--out", tmp_path / "out", "--skip-bad")
    assert np.array_equal(mrcfile.read(tmp_path / "out/particles.mrcs"), data[[0, 1, 2, 4, 5]])
    assert "000004@" in (tmp_path / "out/run.log").read_text()


@pytest.mark.parametrize(
    "spoil, options, said",
    [
        (lambda folder: (folder / "stack.mrcs").unlink(), [], "not found"),
        (lambda folder: (folder / "stack.mrcs").write_bytes((folder / "stack.mrcs").read_bytes()[:3000]), [], "stack.mrcs"),
        (lambda folder: None, ["--box", "32"], "not larger"),
        (lambda folder: None, ["--box", "7"], "even"),
        (lambda folder: None, ["--box", "8", "--pixel", "4"], "one of the two"),
        (lambda folder: None, ["--float16", "--float32"], "one of the two"),
        (lambda folder: None, ["--subset", "0"], "above 0"),
        (lambda folder: None, ["--normalise", "100"], "--normalise"),
    ],
    ids=["missing", "truncated", "larger", "odd", "box and pixel", "both types", "subset", "normalise"],
)
def test_bad_input_leaves_nothing_behind(tmp_path, spoil, options, said):
    star, _ = make_set(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(InputError, match=said):
        run("--particles", star, "--out", tmp_path / "out", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_existing_output_is_kept(tmp_path):
    star, _ = make_set(tmp_path / "a")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        run("--particles", star, "--out", tmp_path / "out")
    run("--particles", star, "--out", tmp_path / "out", "--overwrite")
    run("--particles", star, "--out", tmp_path / "out", "--overwrite", "--box", "8")
    assert mrcfile.read(tmp_path / "out/particles.mrcs").shape == (6, 8, 8)
