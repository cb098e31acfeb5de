"""Bad input from the command line: exit code 2, one clear paragraph on stderr, nothing left behind.

Every case spoils one thing of a small data set that works, runs a command on it in this process, and checks the ending.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest

from verglas.cli.main import main
from verglas.io.cryosparc import write_cs
from verglas.io.mrc import Map, write_map
from verglas.io.star import StarBlock, write_star

BOX, N, PIXEL = 16, 8, 4.0


def write_images(path: Path, data_BYX: np.ndarray, pixel: float = PIXEL) -> None:
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(data_BYX)
        file.set_image_stack()
        file.voxel_size = pixel


def write_table(path: Path, names: list[str], drop: tuple[str, ...] = (), box: int = BOX, **columns: object) -> None:
    n = len(names)
    angles = np.random.default_rng(1).uniform(0, 180, (3, n))
    frame = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": 1, "rlnAngleRot": angles[0], "rlnAngleTilt": angles[1],
                          "rlnAnglePsi": angles[2], "rlnDefocusU": 1e4, "rlnDefocusV": 1e4, "rlnDefocusAngle": 0.0})  # fmt: skip
    optics = pd.DataFrame([{"rlnOpticsGroupName": "first", "rlnOpticsGroup": 1, "rlnVoltage": 300.0,
                            "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1,
                            "rlnImagePixelSize": PIXEL, "rlnImageSize": box}])  # fmt: skip
    frame = frame.assign(**columns).drop(columns=[label for label in drop if label in frame])
    optics = optics.drop(columns=[label for label in drop if label in optics])
    write_star(path, {"optics": StarBlock.table("optics", optics), "particles": StarBlock.table("particles", frame)}, True)


@dataclass
class DataSet:
    """A working data set in `folder`; `write` makes the STAR file anew with something else in it."""

    folder: Path

    @property
    def stack(self) -> Path:
        return self.folder / "stack.mrcs"

    @property
    def star(self) -> Path:
        return self.folder / "p.star"

    def images(self) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(N, BOX, BOX)).astype(np.float32)

    def names(self, n: int = N) -> list[str]:
        return [f"{i + 1:06d}@stack.mrcs" for i in range(n)]

    def write(self, n: int = N, drop: tuple[str, ...] = (), box: int = BOX, **columns: object) -> None:
        write_table(self.star, self.names(n), drop, box, **columns)

    def density(self, name: str, box: int = BOX, pixel: float = PIXEL) -> Path:
        data = np.random.default_rng(len(name)).normal(size=(box,) * 3).astype(np.float32)
        write_map(self.folder / name, Map(data, 1.0))
        with mrcfile.mmap(self.folder / name, "r+") as file:
            file.voxel_size = pixel
        return self.folder / name


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    (tmp_path / "in").mkdir()
    made = DataSet(tmp_path / "in")
    write_images(made.stack, made.images())
    made.write()
    made.density("map.mrc")
    made.density("half1.mrc")
    made.density("half2.mrc")
    return made


@pytest.fixture
def refuse(data: DataSet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Run a command that has to be refused; returns the one paragraph. What lies on the disk must not have changed."""
    monkeypatch.delenv("VERGLAS_DEBUG", raising=False)

    def run(*words: object) -> str:
        before = files_below(data.folder.parent)
        code = main([str(word) for word in words])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "crash:", "Traceback"))]
        assert code == 2, errors
        assert len(errors) == 1 and errors[0].startswith("error: ")
        assert files_below(data.folder.parent) == before
        return errors[0]

    yield run


def files_below(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_size if path.is_file() else -1) for path in folder.rglob("*"))


def commands(data: DataSet) -> dict[str, list[object]]:
    """The commands that read images, without their --out."""
    return {
        "reconstruct": ["reconstruct", "--particles", data.star, "--threads", 1],
        "stack": ["stack", "--particles", data.star, "--threads", 1],
        "convert": ["convert", data.star, "--float16"],
    }


# What each case does to the data set, and what the message has to say: the culprit, what was found, what was expected.


def missing_stack(data: DataSet) -> tuple[str, ...]:
    data.stack.unlink()
    return "stack.mrcs", "not found", "p.star"


def truncated_stack(data: DataSet) -> tuple[str, ...]:
    data.stack.write_bytes(data.stack.read_bytes()[: 1024 + 5 * BOX * BOX * 4 + 100])
    return "stack.mrcs", "truncated", "5 sections", f"{1024 + N * BOX * BOX * 4} bytes ({N} sections)"


def index_beyond_the_stack(data: DataSet) -> tuple[str, ...]:
    data.write(n=N + 3)
    return f"0000{N + 3}@", "stack.mrcs", f"{N} images"


def odd_box(data: DataSet) -> tuple[str, ...]:
    write_images(data.stack, data.images()[:, :15, :15].copy())
    data.write(box=15)
    return "p.star, optics group 1", "odd box of 15 px", "even"


def odd_box_untold(data: DataSet) -> tuple[str, ...]:
    odd_box(data)
    data.write(drop=("rlnImageSize",))
    return "odd box of 15 px", "even"


def box_against_its_group(data: DataSet) -> tuple[str, ...]:
    data.write(box=24)
    return "stack.mrcs", "box of 16 px", "24 px", "optics group 'first'", "p.star"


def text_named_mrcs(data: DataSet) -> tuple[str, ...]:
    data.stack.write_text("data_particles\n\nloop_\n_rlnImageName #1\n" * 60)
    return "stack.mrcs", "text file", "MRC"


STACKS = [missing_stack, truncated_stack, index_beyond_the_stack, odd_box, odd_box_untold, box_against_its_group, text_named_mrcs]


@pytest.mark.parametrize("spoil", STACKS, ids=lambda case: case.__name__)
@pytest.mark.parametrize("command", ["reconstruct", "stack"])
def test_stacks(data: DataSet, refuse: Callable[..., str], command: str, spoil: Callable[[DataSet], tuple[str, ...]]) -> None:
    said = spoil(data)
    message = refuse(*commands(data)[command], "--out", data.folder.parent / "out")
    assert all(part in message for part in said), message


@pytest.mark.parametrize("spoil", [missing_stack, truncated_stack, index_beyond_the_stack, text_named_mrcs])
def test_stacks_to_be_converted(data: DataSet, refuse: Callable[..., str], spoil: Callable[[DataSet], tuple[str, ...]]) -> None:
    spoil(data)
    assert "stack.mrcs" in refuse(*commands(data)["convert"], "--out", data.folder.parent / "out.star")
    assert "stack.mrcs" in refuse(*commands(data)["convert"], "--out", data.folder.parent / "out")


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
@pytest.mark.parametrize("value, reason", [(np.nan, "1 pixels are not finite"), (0.0, "constant image")], ids=["NaN", "constant"])
@pytest.mark.parametrize("command", ["reconstruct", "stack"])
def test_bad_images(data: DataSet, refuse: Callable[..., str], command: str, value: float, reason: str) -> None:
    """Named and refused; left out and reported only with --skip-bad."""
    images = data.images()
    images[4, 3:4, 2:3] = value
    if value == 0:
        images[4] = value
    write_images(data.stack, images)
    out = data.folder.parent / "out"
    message = refuse(*commands(data)[command], "--out", out)
    assert "000005@" in message and reason in message and "--skip-bad" in message
    assert main([str(word) for word in (*commands(data)[command], "--out", out, "--skip-bad")]) == 0
    figures = json.loads((out / "result.json").read_text())["figures"]
    left_out = [figure["value"] for name, figure in figures.items() if name.replace("_", " ") == "images left out"]
    assert left_out == [1] and figures["particles"]["value"] == N - 1
    assert "000005@" in (out / "run.log").read_text()


def test_only_bad_images(data: DataSet, refuse: Callable[..., str]) -> None:
    write_images(data.stack, np.ones((N, BOX, BOX), np.float32))
    assert "bad" in refuse(*commands(data)["stack"], "--out", data.folder.parent / "out", "--skip-bad")


@pytest.mark.parametrize(
    "drop",
    [("rlnImageName",), ("rlnAngleRot", "rlnAnglePsi"), ("rlnDefocusU",), ("rlnVoltage",), ("rlnImagePixelSize",)],
    ids=", ".join,
)
def test_missing_columns(data: DataSet, refuse: Callable[..., str], drop: tuple[str, ...]) -> None:
    data.write(drop=drop)
    message = refuse(*commands(data)["reconstruct"], "--out", data.folder.parent / "out")
    assert "p.star" in message and all(label in message for label in drop)
    words = ("project", "--ctf", "--map", data.folder / "map.mrc", "--particles", data.star)
    message = refuse(*words, "--out", data.folder.parent / "out")
    assert all(label in message for label in drop)


def test_values_that_are_no_poses(data: DataSet, refuse: Callable[..., str]) -> None:
    data.write(rlnAngleTilt=[np.nan, *[1.0] * (N - 1)])
    message = refuse(*commands(data)["reconstruct"], "--out", data.folder.parent / "out")
    assert "rlnAngleTilt" in message and "row 1" in message
    data.write(rlnRandomSubset=3)
    assert "rlnRandomSubset" in refuse(*commands(data)["reconstruct"], "--out", data.folder.parent / "out")
    data.write(rlnRandomSubset=1)
    assert "half" in refuse(*commands(data)["reconstruct"], "--out", data.folder.parent / "out")


def test_no_particles(data: DataSet, refuse: Callable[..., str]) -> None:
    data.write(n=0)
    assert "0 particles" in refuse(*commands(data)["reconstruct"], "--out", data.folder.parent / "out")
    data.write(n=1)
    assert "one image" in refuse(*commands(data)["reconstruct"], "--half-maps", "--out", data.folder.parent / "out")
    data.star.unlink()
    assert "p.star" in refuse(*commands(data)["reconstruct"], "--out", data.folder.parent / "out")


@pytest.mark.parametrize("name", ["X3", "D", "C0", "I5", ""])
def test_unknown_symmetry(data: DataSet, refuse: Callable[..., str], name: str) -> None:
    assert f"'{name}'" in refuse(*commands(data)["reconstruct"], "--sym", name, "--out", data.folder.parent / "out")
    words = ("map", "--map", data.folder / "map.mrc", "--sym", name, "--out", data.folder.parent / "out.mrc")
    assert f"'{name}'" in refuse(*words)


MAP_READERS = {
    "mask": ("mask", "--map", "map.mrc", "--out", "../out.mrc"),
    "map": ("map", "--map", "map.mrc", "--out", "../out.mrc"),
    "convert": ("convert", "map.mrc", "--float16", "--out", "../out.mrc"),
    "postprocess": ("postprocess", "--half1", "map.mrc", "--half2", "half2.mrc", "--out", "../out"),
    "localres": ("localres", "--half1", "map.mrc", "--half2", "half2.mrc", "--out", "../out"),
    "project": ("project", "--map", "map.mrc", "--particles", "p.star", "--out", "../out"),
    "simulate": ("simulate", "--model", "map.mrc", "--n", "4", "--box", "16", "--out", "../out"),
    "reconstruct": ("reconstruct", "--particles", "p.star", "--mask", "map.mrc", "--out", "../out"),
}


@pytest.mark.parametrize("command", MAP_READERS)
def test_bad_maps(data: DataSet, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Voxel size 0, NaN, truncated, a text, not there: each command names the file and what is wrong with it."""
    monkeypatch.chdir(data.folder)
    path, words = data.folder / "map.mrc", MAP_READERS[command]
    path.unlink()
    assert "map.mrc" in refuse(*words)
    path.write_text("a text, not a map\n" * 100)
    assert "map.mrc: " in (message := refuse(*words)) and "text file" in message
    path.unlink()
    whole = data.density("map.mrc", pixel=0.0).read_bytes()
    assert "map.mrc: voxel size 0" in (message := refuse(*words)) and "--pixel" in message
    path.write_bytes(whole[:-100])
    assert "map.mrc: truncated" in refuse(*words)
    broken = np.frombuffer(whole, np.uint8).copy()
    broken[1024:1028] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    path.write_bytes(broken.tobytes())
    assert "map.mrc: 1 voxels are not finite" in refuse(*words)


@pytest.mark.parametrize("command", ["postprocess", "localres"])
def test_half_maps_of_different_size(data: DataSet, refuse: Callable[..., str], command: str) -> None:
    (data.folder / "half2.mrc").unlink()
    data.density("half2.mrc", box=BOX + 2)
    message = refuse(command, "--half1", data.folder / "half1.mrc", "--out", data.folder.parent / "out")
    assert "half2.mrc" in message and "18 px" in message and "16 px" in message and "half1.mrc" in message


def test_empty_maps_and_impossible_sizes(data: DataSet, refuse: Callable[..., str]) -> None:
    empty, out = data.folder / "empty.mrc", data.folder.parent / "out.mrc"
    write_map(empty, Map(np.zeros((BOX,) * 3, np.float32), PIXEL))
    assert "empty.mrc: all voxels have one value" in refuse("mask", "--map", empty, "--out", out)
    assert "empty.mrc: all voxels" in refuse("map", "--map", empty, "--align-to", data.folder / "map.mrc", "--out", out)
    assert "empty.mrc: all voxels" in refuse("map", "--map", data.folder / "map.mrc", "--align-to", empty, "--out", out)
    assert "memory" in refuse("map", "--map", data.folder / "map.mrc", "--new-pixel", "0.0001", "--out", out)
    for command in ("map", "mask"):
        message = refuse(command, "--map", data.folder / "map.mrc", "--out", out.with_suffix(".txt"))
        assert "out.txt: suffix '.txt'" in message and ".mrc" in message


def test_cs_file(data: DataSet, refuse: Callable[..., str]) -> None:
    path = data.folder / "p.cs"
    path.write_text("not numpy\n")
    assert "p.cs" in refuse("reconstruct", "--particles", path, "--out", data.folder.parent / "out")
    path.unlink()
    frame = pd.DataFrame({"rlnImageName": data.names(), "rlnOpticsGroup": 1})
    write_cs(path, frame, pd.DataFrame([{"rlnOpticsGroup": 1, "rlnImagePixelSize": PIXEL, "rlnImageSize": BOX}]))
    assert "rlnAngleRot" in refuse("reconstruct", "--particles", path, "--out", data.folder.parent / "out")


def test_output_that_exists(data: DataSet, refuse: Callable[..., str]) -> None:
    """A run is replaced only with --overwrite; a folder that is no run of verglas not even then."""
    out = data.folder.parent / "out"
    words = [*commands(data)["reconstruct"], "--out", out]
    assert main([str(word) for word in words]) == 0
    assert "out exists" in (message := refuse(*words)) and "--overwrite" in message
    assert main([str(word) for word in (*words, "--overwrite")]) == 0
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "not a run of verglas" in refuse(*words, "--overwrite")
    (data.folder / "config.json").write_text("{}")  # as if the input were a run
    assert "is an input" in refuse(*words[:-1], data.folder, "--overwrite")
    target = data.density("there.mrc")
    for name in ("mask", "map"):
        message = refuse(name, "--map", data.folder / "map.mrc", "--out", target)
        assert "there.mrc" in message and "exists" in message


def test_output_that_cannot_be(data: DataSet, refuse: Callable[..., str]) -> None:
    words = commands(data)["stack"]
    assert "cannot be the folder of a run" in refuse(*words, "--out", "/", "--overwrite")
    assert "p.star" in refuse(*words, "--out", data.star / "out")
    assert "--seed: -1" in refuse(*words, "--out", data.folder.parent / "out", "--seed", -1)


class FullDisk:
    """Stands in for a file: takes `room` bytes, then says what the system says of a full disk."""

    def __init__(self, file: object, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        self.room -= len(memoryview(content).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)  # type: ignore[attr-defined]

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("room", [100, 1500])
@pytest.mark.parametrize(
    "words",
    [
        ("reconstruct", "--particles", "p.star", "--out", "../out", "--threads", "1"),
        ("stack", "--particles", "p.star", "--out", "../out", "--threads", "1"),
        ("simulate", "--n", "8", "--box", "16", "--pixel", "10", "--out", "../out", "--threads", "1"),
        ("convert", "p.star", "--float16", "--out", "../out.star"),
        ("map", "--map", "map.mrc", "--flip-hand", "--out", "../out.mrc"),
        ("postprocess", "--half1", "half1.mrc", "--no-mask", "--out", "../out"),
    ],
    ids=lambda words: words[0],
)
def test_full_disk(
    data: DataSet, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], room: int
) -> None:
    monkeypatch.chdir(data.folder)

    def limited(path: object, mode: str = "r", *more: object, **named: object) -> object:
        file = open(path, mode, *more, **named)  # type: ignore[call-overload]  # noqa: SIM115 (closed by the caller)
        return FullDisk(file, room) if mode == "wb" else file

    def pwrite(file: int, content: memoryview, place: int, real: Callable[..., int] = os.pwrite) -> int:
        if place + len(content) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, content, place)

    monkeypatch.setattr("verglas.io.mrc.open", limited, raising=False)
    monkeypatch.setattr("verglas.io.mrc.os.pwrite", pwrite)
    assert "disk is full" in (message := refuse(*words)) and "/out" in message and ".partial" not in message
