"""`verglas ptycho reconstruct` and `report`: files, stops, and what stands on the page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.cli.ptycho_run import read_history, read_positions
from verglas.errors import InputError
from verglas.ptychography import checkpoint
from verglas.ptychography.files import read_scan
from verglas.ptychography.files_result import read_result
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.read_options import ReadOptions
from verglas.ptychography.reconstruct import reconstruct

PASSES = 24
FIT = ["--passes", str(PASSES), "--checkpoint-every", "2", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ptycho") / "star"
    words = ["ptycho", "simulate", "--window", "32", "--positions", "60", "--photons", "1e6", "--spokes", "8", "--with-probe"]
    assert main([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def found(star: Path) -> Path:
    out = star.parent / "found"
    assert main(["ptycho", "reconstruct", "--scan", str(star / "scan.cxi"), "--out", str(out), *FIT, "--halves"]) == 0
    return out


def test_a_run_leaves_its_files(found: Path) -> None:
    names = {path.name for path in found.iterdir()}
    expected = {"result.cxi", "half1.cxi", "half2.cxi", "report.html", "amplitude.png", "phase.png", "probe.png", "error.csv"}
    assert expected | {"positions.csv", "result.json", "config.json", "events.jsonl", "run.log"} == names
    result, facts = read_result(found / "result.cxi")
    assert len(result.error_P) == PASSES and result.error_P[-1] < 0.3 * result.error_P[0]
    assert facts["command"] == "ptycho reconstruct" and facts["options"]["fit"]["passes"] == PASSES
    figures = json.loads((found / "result.json").read_text())["figures"]
    assert figures["error"]["value"] == pytest.approx(result.error_P[-1], rel=1e-3)
    assert figures["resolution_of_halves"]["unit"] == "nm" and figures["resolution_of_halves"]["value"] >= 20
    lines = (found / "error.csv").read_text().splitlines()
    assert lines[0].startswith("part,pass,error") and len(lines) == 1 + 3 * PASSES
    scan, _ = read_scan(found.parent / "star" / "scan.cxi")
    assert np.allclose(read_positions(found / "positions.csv"), scan.positions_B2.numpy(), atol=1e-6)


def test_the_page_shows_what_was_found(found: Path) -> None:
    page = (found / "report.html").read_text()
    for title in ("Amplitude", "Phase", "Probe", "Error", "Change from pass to pass", "Positions", "Fourier ring correlation"):
        assert f"{title}" in page
    assert "mode 1: 100.0 % of the light" in page


def test_report_compares_with_the_truth(star: Path, found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["ptycho", "report", str(found), "--truth", str(star / "truth.cxi"), "--unwrap", "--out", str(page)]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().err.split())
    error = float(said.split(" error: ")[1].split()[0])
    assert error < 0.15 and "SSIM of the phase: 0.9" in said
    assert "Against the truth" in page.read_text() and "Without jumps of 2 pi" in page.read_text()


def test_a_pause_changes_nothing(star: Path, tmp_path: Path) -> None:
    scan, _ = read_scan(star / "scan.cxi")
    for engine in ("cg", "rpie"):
        options = PtychoOptions(engine=engine, passes=6)  # type: ignore[arg-type]
        whole = list(reconstruct(scan, options))
        checkpoint.save(tmp_path, engine, whole[2], checkpoint.fingerprint(scan))
        last = checkpoint.newest(tmp_path, engine, checkpoint.fingerprint(scan), print)
        assert last is not None and last.number == 3
        rest = list(reconstruct(scan, options, after=last))
        assert [one.number for one in rest] == [4, 5, 6]
        assert torch.equal(rest[-1].found.object_OLYX, whole[-1].found.object_OLYX)
        assert rest[-1].found.error_P == whole[-1].found.error_P


def test_damaged_and_foreign_checkpoints(star: Path, tmp_path: Path) -> None:
    scan, _ = read_scan(star / "scan.cxi")
    mark = checkpoint.fingerprint(scan)
    for done in reconstruct(scan, PtychoOptions(passes=3)):
        checkpoint.save(tmp_path, "all", done, mark)
    kept = [path.name for path in checkpoint.numbered(tmp_path, "all")]
    assert kept == ["all_pass00003.checkpoint", "all_pass00002.checkpoint"]
    newest = checkpoint.numbered(tmp_path, "all")[0]
    newest.write_bytes(newest.read_bytes()[:3000])
    told: list[str] = []
    last = checkpoint.newest(tmp_path, "all", mark, told.append)
    assert last is not None and last.number == 2 and "all_pass00003" in told[0]
    with pytest.raises(InputError, match="other patterns or positions"):
        checkpoint.newest(tmp_path, "all", checkpoint.fingerprint(scan.subset(torch.arange(20))), told.append)


def test_a_killed_run_goes_on_to_the_same_result(star: Path, found: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    words = ["ptycho", "reconstruct", "--scan", str(star / "scan.cxi"), "--out", str(out), *FIT]
    process = subprocess.Popen([sys.executable, "-m", "verglas", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.numbered(out, "all") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.numbered(out, "all") and not (out / "result.json").exists()
    assert main(["ptycho", "report", str(out)]) == 0  # of what there is
    assert main(["ptycho", "reconstruct", "--continue", str(out), "--device", "cpu", "--threads", "1"]) == 0
    result, whole = read_result(out / "result.cxi")[0], read_result(found / "result.cxi")[0]
    assert torch.equal(result.object_OLYX, whole.object_OLYX) and result.error_P == whole.error_P
    assert [record["pass"] for record in read_history(out / "events.jsonl")["all"]] == list(range(1, PASSES + 1))
    assert not list(out.glob("*.checkpoint")) and not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--scan: not given"),
        (["--scan", "none.cxi", "--out", "new"], "none.cxi: there is no such file"),
        (["--scan", "none.cxi", "--out", "new", "--passes", "0"], "--passes: 0; expected 1 or more"),
        (["--scan", "none.cxi", "--out", "new", "--checkpoint-every", "-1"], "--checkpoint-every"),
        (["--continue", "nowhere"], "nowhere holds no run"),
        (["--continue", "nowhere", "--halves"], "given together with --halves"),
    ],
)
def test_wrong_calls_end_with_2(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ptycho", "reconstruct", *words]) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_folders_are_not_overwritten(star: Path, found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptycho", "reconstruct", "--scan", str(star / "scan.cxi"), "--out", str(found), *FIT]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["ptycho", "reconstruct", "--continue", str(found)]) == 2
    assert "finished" in capsys.readouterr().err
    assert main(["ptycho", "reconstruct", "--continue", str(star)]) == 2
    assert "ptycho simulate" in capsys.readouterr().err
    assert main(["ptycho", "report", str(star)]) == 2
    assert "no result.cxi" in capsys.readouterr().err


def test_the_real_near_field_set_fits_with_its_own_axes(shared: Path) -> None:
    path = shared / "data" / "ptycho" / "PETRAIII_P25_Near_Field_Ptycho.cxi"
    errors = {}
    for axes in ("", "-y-x", "xy"):
        scan, _ = read_scan(path, ReadOptions(near_field=True, focus=3.65e-3, first=60, position_axes=axes))
        *_, last = reconstruct(scan, PtychoOptions(engine="rpie", passes=4))
        errors[axes] = last.error
    assert errors[""] < 0.6 * min(errors["-y-x"], errors["xy"])
