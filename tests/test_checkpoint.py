"""Checkpoints: exact, deterministic, and never half a one under a good name."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refinement_states import small_config, small_state, small_table
from verglas.errors import InputError, OutputError
from verglas.refinement import checkpoint
from verglas.refinement.files import remove_leftovers


def assert_same(a: Any, b: Any, name: str = "") -> None:
    """Equal types, dtypes and bits, through dataclasses and lists."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes(), name
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name), f"{name}.{field.name}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for one, other in zip(a, b):
            assert_same(one, other, f"{name}[]")
    else:
        assert a == b or (a != a and b != b), name


@pytest.fixture
def table(tmp_path):
    return small_table(tmp_path)


def saved(folder: Path, table, iteration: int) -> Path:
    state = small_state(table)
    state.iteration = iteration
    path = checkpoint.path_of(folder, iteration)
    checkpoint.save(path, state, small_config(), checkpoint.fingerprint(table))
    return path


def test_all_comes_back_to_the_bit(tmp_path, table):
    state = small_state(table)
    state.schedule.best_resolution = float("inf")
    state.fsc_S[3], state.fsc_S[4] = float("nan"), -0.0
    state.poses.origin_B2[0, 0] = 0.1 + 0.2
    state.micrographs[1] = "mics/ä b.mrc"
    config = small_config(mask=Path("masks/mask.mrc"), memory_gb=3.7)
    checkpoint.save(tmp_path / "a", state, config, "the particles")
    loaded, loaded_config, text = checkpoint.load(tmp_path / "a")
    assert_same(loaded, state)
    assert loaded_config == config and text == "the particles"
    loaded.halves[0].map_ZYX += 1  # the tensors are ours to change


def test_equal_states_give_equal_bytes(tmp_path, table):
    checkpoint.save(tmp_path / "a", small_state(table), small_config(), "x")
    state = small_state(table)
    state.halves[0].map_ZYX = state.halves[0].map_ZYX.transpose(0, 2).contiguous().transpose(0, 2)  # same values, other strides
    checkpoint.save(tmp_path / "b", state, small_config(), "x")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    state.halves[1].map_ZYX[0, 0, 0] += 1e-6
    checkpoint.save(tmp_path / "b", state, small_config(), "x")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_every_cut_and_every_flip_is_found(tmp_path, table):
    path = saved(tmp_path, table, 1)
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for length in [0, 5, 18, 20, 27, 100, len(whole) - 32, len(whole) - 1, *draw.integers(0, len(whole), 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut short.*checkpoint before it"):
            checkpoint.load(path)
    for position in [0, 21, 28, 40, len(whole) - 1, *draw.integers(22, len(whole), 20)]:
        changed = bytearray(whole)
        changed[position] ^= 4
        path.write_bytes(changed)
        with pytest.raises(InputError, match="checkpoint before it"):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path)


def test_newest_passes_over_a_damaged_one_and_says_so(tmp_path, table):
    assert checkpoint.newest(tmp_path) is None
    older, newer = saved(tmp_path, table, 999), saved(tmp_path, table, 1000)
    (tmp_path / "run_itold.checkpoint").write_text("not ours")
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == newer and not said
    newer.write_bytes(newer.read_bytes()[:-7])
    assert checkpoint.newest(tmp_path, said.append) == older
    assert len(said) == 1 and newer.name in said[0]
    older.write_bytes(b"")
    assert checkpoint.newest(tmp_path, said.append) is None


def test_another_version_is_named_not_passed_over(tmp_path, table):
    saved(tmp_path, table, 1)
    path = saved(tmp_path, table, 2)
    path.write_bytes(path.read_bytes().replace(b"checkpoint 3\n", b"checkpoint 27\n", 1))
    for read in (checkpoint.load, lambda path: checkpoint.newest(path.parent)):
        with pytest.raises(InputError, match="version 27; expected version 3"):
            read(path)


def test_fields_of_another_version_are_named(tmp_path, table, monkeypatch):
    @dataclasses.dataclass
    class Schedule:
        temperature: float = 1.0

    state = small_state(table)
    state.schedule = Schedule()  # type: ignore[assignment]
    checkpoint.save(tmp_path / "a", state, small_config(), "x")
    with pytest.raises(InputError, match="temperature"):
        checkpoint.load(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(tmp_path / "missing")


def test_prune_keeps_the_two_newest(tmp_path, table):
    paths = [saved(tmp_path, table, iteration) for iteration in (2, 9, 10, 11)]
    checkpoint.prune(tmp_path)
    assert [path.exists() for path in paths] == [False, False, True, True]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_one(tmp_path, table, monkeypatch, broken):
    path = saved(tmp_path, table, 1)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    state = small_state(table, seed=6)
    with pytest.raises(OutputError, match="disk is full"):
        checkpoint.save(path, state, small_config(), "x")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["particles.mrcs", path.name]


def save_and_die(path: Path, state: Any, call: str, done: int) -> int:
    """Exit code of a child process that saves, and dies in the system call `call` after it went well `done` times."""
    child = os.fork()
    if child == 0:
        real, calls = getattr(os, call), itertools.count()
        setattr(os, call, lambda *arguments: os._exit(9) if next(calls) >= done else real(*arguments))
        checkpoint.save(path, state, small_config(), "x")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_in_the_middle_leaves_a_whole_one(tmp_path, table):
    path = saved(tmp_path, table, 1)
    before = path.read_bytes()
    for call, done, renamed in (("fsync", 0, False), ("replace", 0, False), ("fsync", 1, True)):
        assert save_and_die(path, small_state(table, seed=6), call, done) == 9
        assert (path.read_bytes() != before) == renamed
        checkpoint.load(path)
    assert len(remove_leftovers(tmp_path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["particles.mrcs", path.name]


def test_fingerprint_knows_the_particles(tmp_path, table):
    mine = checkpoint.fingerprint(table)
    moved = tmp_path / "moved"
    moved.mkdir()
    assert checkpoint.fingerprint(small_table(moved)) == mine
    assert checkpoint.fingerprint(table.with_columns(rlnAngleRot=1.0, rlnRandomSubset=2)) == mine
    others = [
        table.select(slice(1, None)),
        table.select(np.arange(len(table))[::-1]),
        table.with_columns(rlnDefocusU=table.frame["rlnDefocusU"] + 1e-9),
        table.with_columns(rlnPhaseShift=90.0),
        table.with_columns(rlnOpticsGroup=1),
        dataclasses.replace(table, optics_frame=table.optics_frame.assign(rlnVoltage=200.0)),
        dataclasses.replace(table, optics_frame=table.optics_frame.assign(rlnImagePixelSize=2.9)),
        small_table(moved, stack="others.mrcs"),
    ]
    assert len({mine, *(checkpoint.fingerprint(other) for other in others)}) == 1 + len(others)


def test_written_file_states_itself_again(tmp_path, table):
    """run_data.star of a run belongs to the same particles as the file it started from."""
    table.write(tmp_path / "p.star")
    read = type(table).read(tmp_path / "p.star")
    assert checkpoint.fingerprint(read) == checkpoint.fingerprint(table)


@pytest.mark.slow
def test_a_large_state_takes_seconds(tmp_path, table):
    state, n = small_state(table), 100_000
    for half in state.halves:
        half.map_ZYX = torch.randn(256, 256, 256)
    poses = state.poses
    for field in dataclasses.fields(poses):
        value = getattr(poses, field.name)
        setattr(poses, field.name, value[torch.arange(n) % len(value)])
    start = time.perf_counter()
    checkpoint.save(tmp_path / "a", state, small_config(), "x")
    checkpoint.load(tmp_path / "a")
    assert time.perf_counter() - start < 10
