"""verglas info and verglas convert, from the command line in."""

import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import tyro

from verglas.cli.convert import Convert
from verglas.cli.info import Info
from verglas.errors import InputError, OutputError
from verglas.io.cs_file import load_cs
from verglas.io.mrc import Map, Stack, StackWriter, read_map, write_map
from verglas.io.star import StarBlock, read_star, write_star

RNG = np.random.default_rng(0)


def run(command, *arguments):
    tyro.cli(command, args=[str(argument) for argument in arguments]).run()


def info(*arguments):
    run(Info, *arguments)


def convert(*arguments):
    run(Convert, *arguments)


def facts_of(capsys, *arguments):
    capsys.readouterr()
    info("--json", *arguments)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def particles(tmp_path, monkeypatch):
    """Two stacks of float16 images and a STAR that names some of them, one twice, in mixed order."""
    monkeypatch.chdir(tmp_path)
    images = {}
    for name in ("a", "b"):
        images[name] = RNG.normal(size=(5, 8, 8)).astype(np.float16)
        with StackWriter(tmp_path / f"{name}.mrcs", 5, (8, 8), 2.0, "float16") as stack:
            stack.append(images[name])
    names = ["000003@b.mrcs", "000001@a.mrcs", "000002@a.mrcs", "000003@b.mrcs", "000005@b.mrcs"]
    frame = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": 1, "rlnDefocusU": RNG.uniform(1e4, 2e4, 5)})
    frame["myOwn"] = list("vwxyz")
    optics = pd.DataFrame({
        "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [2.0], "rlnImageSize": [8], "rlnImageDimensionality": [2],
    })  # fmt: skip
    write_star("p.star", {"optics": StarBlock.table("optics", optics), "particles": StarBlock.table("particles", frame)})
    return images, frame


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_info_of_a_map(tmp_path, capsys):
    data = RNG.normal(2, 3, (6, 6, 6)).astype(np.float32)
    write_map(tmp_path / "a.mrc", Map(data, 1.5, (1.0, 2.0, 3.0), ("my label",)))
    (facts,) = facts_of(capsys, tmp_path / "a.mrc")
    assert (facts["kind"], facts["box"], facts["pixel_size"], facts["mode"]) == ("map", [6, 6, 6], [1.5, 1.5, 1.5], 2)
    assert facts["mean"] == pytest.approx(data.mean(), rel=1e-5) and facts["std"] == pytest.approx(data.std(), rel=1e-5)
    assert (facts["min"], facts["max"]) == (data.min(), data.max())
    info(tmp_path / "a.mrc")
    text = " ".join(capsys.readouterr().out.split())  # lines break where the folder's name is long
    assert "map of 6 x 6 x 6 voxels" in text and "1.5 Å" in text and "my label" in text and "x 1 y 2 z 3 Å" in text


def test_info_of_a_stack_names_bad_images(tmp_path, capsys):
    images = RNG.normal(size=(4, 8, 8))
    images[1], images[2, 3, 3] = 0, np.nan
    with StackWriter(tmp_path / "a.mrcs", 4, (8, 8), 2.0) as stack:
        stack.append(images)
    (facts,) = facts_of(capsys, tmp_path / "a.mrcs")
    assert (facts["kind"], facts["images"], facts["box"]) == ("stack", 4, [8, 8])
    assert (facts["constant_images"], facts["not_finite_images"], facts["not_finite"]) == (1, 1, 1)
    info(tmp_path / "a.mrcs")
    assert "1 images are constant" in capsys.readouterr().out


def test_info_of_particles(particles, capsys, tmp_path):
    (facts,) = facts_of(capsys, "p.star")
    optics, table = facts["blocks"]
    assert optics["groups"][0]["rlnVoltage"] == 300 and table["rows"] == 5
    columns = {column["name"]: column for column in table["columns"]}
    assert columns["myOwn"]["distinct"] == 5
    assert columns["rlnDefocusU"]["min"] == particles[1]["rlnDefocusU"].min()
    assert (facts["images_named"]["images"], facts["images_named"]["stacks"]) == (5, 2)
    assert not any(facts["images_named"][key] for key in ("missing_stacks", "damaged_stacks", "short_stacks"))
    (tmp_path / "a.mrcs").unlink()
    with StackWriter(tmp_path / "b.mrcs", 4, (8, 8), 2.0, overwrite=True) as stack:
        stack.append(np.ones((4, 8, 8)))
    (facts,) = facts_of(capsys, "p.star")
    assert facts["images_named"]["missing_stacks"] == ["a.mrcs"] and facts["images_named"]["short_stacks"] == ["b.mrcs"]
    info("p.star")
    text = capsys.readouterr().out
    assert "data_optics" in text and "missing" in text and "too short" in text and "5 different, first v" in text


def test_info_of_real_files(shared, capsys):
    data = shared / "data"
    star, cs = facts_of(capsys, data / "betagal_tutorial/particles_1391_with_poses.star",
                        data / "star_cs_variants/cryosparc_P12_J24_001_particles.cs")  # fmt: skip
    images = star["images_named"]
    assert (images["images"], images["stacks"], images["missing_stacks"]) == (1391, 10, [])
    images = cs["images_named"]
    assert cs["rows"] == 2019 and len(images["missing_stacks"]) == images["stacks"] == 50


@pytest.mark.parametrize(("name", "content", "text"), [
    ("a.mrc", b"hello world\n" * 100, "looks like a text file"),
    ("a.star", b"", "is empty"),
    ("a.cs", b"x", "not a NumPy file"),
    ("a.txt", b"x", "unknown kind of file"),
])  # fmt: skip
def test_info_says_what_is_wrong(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=text):
        info(tmp_path / name)


def test_images_of_a_star_become_float32(particles, tmp_path):
    images, frame = particles
    convert("p.star", "--out", "new.star", "--float32")
    assert files_in(tmp_path) == ["a.mrcs", "b.mrcs", "new.mrcs", "new.result.json", "new.star", "p.star"]
    stack = Stack.open(tmp_path / "new.mrcs")
    assert (stack.n, stack.mode, stack.pixel_size) == (4, 2, 2.0)  # the image that is named twice is there once
    new = read_star("new.star")["particles"].frame
    assert new["rlnImageName"].tolist() == [f"{i:06d}@new.mrcs" for i in (1, 2, 3, 1, 4)]
    expected = np.stack([images["b"][2], images["a"][0], images["a"][1], images["b"][4]]).astype(np.float32)
    np.testing.assert_array_equal(stack.read(slice(None)), expected)
    pd.testing.assert_frame_equal(new.drop(columns="rlnImageName"), frame.drop(columns="rlnImageName"), check_dtype=False)
    assert json.loads((tmp_path / "new.result.json").read_text())["figures"]["particles"]["value"] == 5


def test_images_into_a_folder(particles, tmp_path):
    convert("p.star", "--out", "done", "--float16")
    assert {"particles.star", "particles.mrcs", "result.json", "report.html", "run.log"} <= set(files_in(tmp_path / "done"))
    assert Stack.open(tmp_path / "done/particles.mrcs").mode == 12
    with pytest.raises(OutputError, match="exists"):
        convert("p.star", "--out", "done", "--float16")


def test_groups_of_different_box_get_stacks_of_their_own(particles, tmp_path):
    with StackWriter(tmp_path / "b.mrcs", 5, (6, 6), 2.5, overwrite=True) as stack:
        stack.append(RNG.normal(size=(5, 6, 6)))
    blocks = read_star("p.star")
    optics = blocks["optics"].frame
    blocks["optics"].frame = pd.concat([optics, optics.assign(rlnOpticsGroup=2, rlnImagePixelSize=2.5, rlnImageSize=6)])
    frame = blocks["particles"].frame
    blocks["particles"].frame = frame.assign(rlnOpticsGroup=np.where(frame["rlnImageName"].str.endswith("b.mrcs"), 2, 1))
    write_star("p.star", blocks, overwrite=True)
    convert("p.star", "--out", "new.star", "--float32")
    names = read_star("new.star")["particles"].frame["rlnImageName"]
    for name, old in zip(names, frame["rlnImageName"]):
        (new_index, new_path), (old_index, old_path) = name.split("@"), old.split("@")
        new_image = Stack.open(tmp_path / new_path).read(np.array([int(new_index) - 1]))
        np.testing.assert_array_equal(new_image, Stack.open(tmp_path / old_path).read(np.array([int(old_index) - 1])))
    assert {Stack.open(path).box_yx for path in tmp_path.glob("new_*.mrcs")} == {(6, 6), (8, 8)}


def test_old_star_becomes_new(particles, tmp_path):
    blocks = read_star("p.star")
    frame = blocks["particles"].frame.drop(columns="rlnOpticsGroup")
    frame = frame.assign(rlnVoltage=300.0, rlnSphericalAberration=2.7, rlnAmplitudeContrast=0.1, rlnDetectorPixelSize=5.0,
                         rlnMagnification=25000.0, rlnOriginX=1.5, rlnOriginY=-2.0)  # fmt: skip
    write_star("old.star", {"": StarBlock.table("", frame)})
    convert("old.star", "--out", "new.star")
    new = read_star("new.star")
    assert new["optics"].frame["rlnImagePixelSize"].tolist() == [2.0]  # 1e4 * 5 um / 25,000
    assert new["particles"].frame["rlnOriginXAngst"].tolist() == [3.0] * 5
    assert new["particles"].frame["rlnOriginYAngst"].tolist() == [-4.0] * 5
    assert new["particles"].frame["myOwn"].tolist() == list("vwxyz")


def test_star_to_cs_and_back(particles, tmp_path):
    convert("p.star", "--out", "p.cs")
    assert load_cs("p.cs")["blob/idx"].tolist() == [2, 0, 1, 2, 4]
    convert("p.cs", "--out", "back.star")
    back = read_star("back.star")["particles"].frame
    assert back["rlnImageName"].tolist() == particles[1]["rlnImageName"].tolist()
    assert back["myOwn"].tolist() == list("vwxyz")


def test_cs_with_images(particles, tmp_path):
    convert("p.star", "--out", "p.cs")
    convert("p.cs", "--out", "f32.star", "--float32")
    assert Stack.open(tmp_path / "f32.mrcs").n == 4


def test_maps_and_stacks_change_their_numbers(particles, tmp_path):
    convert("a.mrcs", "--out", "f32.mrcs", "--float32")
    np.testing.assert_array_equal(Stack.open(tmp_path / "f32.mrcs").read(slice(None)), particles[0]["a"].astype(np.float32))
    data = RNG.normal(size=(4, 6, 8)).astype(np.float16).astype(np.float32)
    write_map("map.mrc", Map(data, 1.5, (3.0, 0.0, 0.0), ("kept",)))
    convert("map.mrc", "--out", "f16.mrc", "--float16")
    again = read_map("f16.mrc", cubic=False)
    np.testing.assert_array_equal(again.data_ZYX, data)
    assert (again.pixel_size, again.origin, again.labels) == (1.5, (3.0, 0.0, 0.0), ("kept",))


@pytest.mark.parametrize(("arguments", "error", "text"), [
    (["p.star", "--out", "p.star"], OutputError, "exists already"),
    (["p.star", "--out", "x.mrc"], InputError, "cannot be made of particles"),
    (["p.star", "--out", "x.star", "--float32", "--float16"], InputError, "both given"),
    (["p.star", "--out", "x.star", "--passthrough", "p.cs"], InputError, "a .cs file to complete"),
    (["a.mrcs", "--out", "x.mrcs"], InputError, "no kind of numbers"),
    (["a.mrcs", "--out", "x.txt", "--float32"], InputError, ".mrcs for a stack"),
    (["a.mrcs", "--out", "a.mrcs", "--float32", "--overwrite"], OutputError, "is the file to be read"),
    (["missing.star", "--out", "x.star"], InputError, "No such file"),
    (["gone.star", "--out", "x.star", "--float32"], InputError, "gone.mrcs"),
    (["beyond.star", "--out", "x.star", "--float32"], InputError, "image 9 is asked for; expected 1 to 5"),
])  # fmt: skip
def test_bad_requests_leave_nothing_behind(particles, tmp_path, arguments, error, text):
    text_of_star = (tmp_path / "p.star").read_text()
    (tmp_path / "gone.star").write_text(text_of_star.replace("b.mrcs", "gone.mrcs"))
    (tmp_path / "beyond.star").write_text(text_of_star.replace("000005@", "000009@"))
    before = files_in(tmp_path)
    with pytest.raises(error, match=text):
        convert(*arguments)
    assert files_in(tmp_path) == before


@pytest.mark.interop
def test_relion_reads_what_convert_writes(particles, tmp_path):
    if shutil.which("relion_stack_create") is None:
        pytest.skip("RELION is not installed")
    convert("p.star", "--out", "new.star", "--float32")
    command = ["relion_stack_create", "--i", "new.star", "--o", "by_relion"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ours = [int(name[:6]) - 1 for name in read_star("new.star")["particles"].frame["rlnImageName"]]
    expected = Stack.open(tmp_path / "new.mrcs").read(np.array(ours))
    np.testing.assert_allclose(Stack.open(tmp_path / "by_relion.mrcs").read(slice(None)), expected, atol=1e-6)
    by_relion = read_star("by_relion.star")["particles"].frame
    assert by_relion["myOwn"].tolist() == list("vwxyz")
    np.testing.assert_allclose(by_relion["rlnDefocusU"], particles[1]["rlnDefocusU"], atol=1e-6)
