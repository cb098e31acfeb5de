"""`verglas ptycho info` and `simulate`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from verglas.cli.main import main
from verglas.ptychography.files import read_scan
from verglas.ptychography.files_result import read_result

SIMULATE = ["ptycho", "simulate", "--window", "32", "--positions", "30", "--photons", "1e4", "--out"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ptycho") / "star"
    assert main([*SIMULATE, str(out), "--position-error", "1.5", "--fluctuation", "0.1", "--modes", "2"]) == 0
    return out


def test_a_simulated_scan_and_its_truth(simulated: Path) -> None:
    scan, notices = read_scan(simulated / "scan.cxi")
    truth, facts = read_result(simulated / "truth.cxi")
    assert notices == [] and scan.probe_MYX is None and len(scan) == len(truth.positions_B2) == 30
    error_B2 = (truth.positions_B2 - scan.positions_B2).numpy()
    assert 0.8 < np.sqrt((error_B2**2).sum(1).mean()) < 2.2
    assert len(truth.probe_MYX) == 2 and 0.05 < truth.scale_B.std() < 0.2 and truth.pixel == pytest.approx((1e-8, 1e-8))
    assert facts["command"] == "ptycho simulate" and facts["options"]["detector"]["window"] == 32
    page = (simulated / "report.html").read_text()
    assert all(title in page for title in ("Amplitude", "Phase", "Probe", "Positions", "Mean pattern"))
    figures = json.loads((simulated / "result.json").read_text())["figures"]
    assert figures["positions"]["value"] == 30


def test_info_tells_what_files_hold(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptycho", "info", str(simulated / "scan.cxi"), str(simulated / "truth.cxi")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "30 of 32 x 32 px, uint16" in said and "far field" in said and "object pixel 10 x 10 nm" in said
    assert "66.7 %, 33.3 % of 1e+04 counts" in said
    assert main(["ptycho", "info", "--json", str(simulated / "scan.cxi")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts[0]["format"] == "CXI" and facts[0]["notices"] == []


def test_commands_of_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptycho"]) == 0
    said = capsys.readouterr().out
    assert "ptycho simulate" in said and "refine" not in said
    assert main(["ptycho", "simulat"]) == 2
    assert "Did you mean 'ptycho simulate'?" in capsys.readouterr().err
    assert main(["help", "ptycho", "info"]) == 0
    assert "--near-field" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--window", "33"], "--window: 33; expected an even number"),
        (["--positions", "1"], "--positions"),
        (["--photons", "0"], "--photons"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_bad_options_end_with_2(options: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptycho", "simulate", "--out", str(tmp_path / "out"), *options]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_info_of_what_is_no_scan(simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.h5").write_text("nothing")
    assert main(["ptycho", "info", str(tmp_path / "notes.h5")]) == 2
    assert "cannot be read as HDF5" in capsys.readouterr().err
    assert main(["ptycho", "info", str(simulated / "scan.cxi"), "--focus", "0.01"]) == 2
    assert "--near-field" in capsys.readouterr().err


def test_info_reads_the_real_sets_as_they_are(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "data" / "ptycho"
    assert main(["ptycho", "info", str(folder / "siemens-star-small.npz.bz2")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "516 of 128 x 128 px" in said and "in the corner" in said
    near = ["ptycho", "info", str(folder / "PETRAIII_P25_Near_Field_Ptycho.cxi"), "--near-field", "--focus", "3.65e-3"]
    assert main(near) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "200 of 100 x 100 px" in said and "178.66 x 178.66 nm" in said and "5 bad pixels" in said
