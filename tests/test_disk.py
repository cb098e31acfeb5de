"""What is said of a disk that will become full."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from verglas.cli.disk import disk_notice

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("free, said", [(9_000, False), (8_999, True)])
def test_a_disk_that_will_not_take_the_coming_iterations_is_told(
    free: int, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("class001.mrc", 200), ("data.star", 100), ("optimiser.checkpoint", 1500)):
        (tmp_path / f"run_it005_{name}").write_bytes(b"x" * size)
    (tmp_path / "run_it004_class001.mrc").write_bytes(b"x" * 7777)  # of another iteration: does not count
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**6, 0, free))
    notice = disk_notice(tmp_path, 5, 25)  # 20 more of 300 bytes, and two checkpoints
    assert (notice is not None) is said
    if notice is not None:
        assert "20 more" in notice and "--continue" in notice


def test_nothing_is_said_after_the_last_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run_it025_data.star").write_bytes(b"x" * 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1, 1, 0))
    assert disk_notice(tmp_path, 25, 25) is None
