"""verglas solve with its real commands: simulated particles to a map with their point group; noise to no map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verglas.cli.main import main

pytestmark = pytest.mark.slow


def solved(folder: Path, snr: float, code: int) -> dict[str, dict[str, object]]:
    """Figures of the run, which ends with this code."""
    words = ["--n", "400", "--box", "32", "--pixel", "6", "--snr", str(snr), "--seed", "1", "--device", "cpu", "--model", "demo"]
    assert main(["simulate", *words, "--out", str(folder / "set")]) == 0
    given = ["--particles", str(folder / "set" / "particles.star"), "--diameter", "150", "--classes2d", "8"]
    assert main(["solve", *given, "--out", str(folder / "out"), "--device", "cpu"]) == code
    return json.loads((folder / "out" / "result.json").read_text())["figures"]


def test_particles_become_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    figures = solved(tmp_path, 0.5, 0)
    assert 12.0 <= float(str(figures["resolution"]["value"])) < 25.0  # Nyquist: 12 Å
    assert (tmp_path / "out" / "map.png").is_file()
    report = (tmp_path / "out" / "report.html").read_text()
    assert "What came out" in report and "verglas flip --maps" in report


def test_noise_becomes_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    figures = solved(tmp_path, 1e-6, 2)
    assert figures["outcome"]["value"] == "no map" and "resolution" not in figures
    assert "No map" in (tmp_path / "out" / "report.html").read_text()
