"""`verglas reconstruct` as a whole keeps Fourier volumes packed: its peak has no room for a dense padded transform."""

from __future__ import annotations

from pathlib import Path

import pytest

from counted import peak_bytes
from verglas.cli.main import main
from verglas.core.rows import packed_sphere
from verglas.projection import pruned, volume

BOX = 96
HALF_CUBE = 8 * (2 * BOX) ** 2 * (BOX + 1)  # bytes of the padded half transform in single precision
SUMS = 16 * packed_sphere(float(BOX)).count


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "set"
    words = ["simulate", "--n", "12", "--box", str(BOX), "--pixel", "3", "--snr", "1", "--seed", "1", "--device", "cpu"]
    assert main([*words, "--out", str(out)]) == 0
    return out / "truth.star"


@pytest.mark.parametrize(("columns", "dense"), [(2**15, False), (2**23, True)])
def test_no_dense_cube_is_made(
    particles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, dense: bool
) -> None:
    """columns: numbers of a padded transform that are worked on at a time; beside a small box that must be few, as all at once
    are the dense cube, which the bound then finds."""
    monkeypatch.setitem(pruned.NUMBERS_AT_ONCE, "cpu", columns)
    monkeypatch.setitem(volume.VOXELS_AT_ONCE, "cpu", 2**14)
    words = ["reconstruct", "--particles", str(particles), "--no-half-maps", "--device", "cpu", "--out", str(tmp_path / "out")]
    taken = peak_bytes(lambda: main(words))
    assert taken > SUMS and (taken - SUMS > 0.75 * HALF_CUBE) == dense, (taken - SUMS) / HALF_CUBE
