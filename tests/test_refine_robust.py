"""Refinements that are killed, continued, repeated, or handed to RELION: the engine itself, through the command."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import verglas
from verglas.cli.main import main
from verglas.errors import OutputError
from verglas.io import provenance
from verglas.io.atomic import atomic_path
from verglas.io.runfolder import RunFolder
from verglas.refinement.files import remove_leftovers

ROOT = Path(__file__).resolve().parent.parent
N, BOX, PIXEL, DIAMETER = 60, 24, 6.0, 120.0
needs_benchmarks = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the benchmarks of the checkout")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, strong simulated set with start.mrc; D2, so that few orientations need to be searched."""
    out = tmp_path_factory.mktemp("simulated") / "set"
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--sym", "D2", "--snr", 1, "--seed", 1, "--device", "cpu"]
    assert main([str(word) for word in [*words, "--out", out]]) == 0
    return out


@pytest.fixture
def run_folders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What the benchmarks use to judge a folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    return pytest.importorskip("benchmarks.run_folders")


def short_run(data: Path, folder: Path) -> Path:
    """A refinement of two iterations and the final one, in a working folder of its own, because names in files start there."""
    folder.mkdir()
    options = ["--particles", data / "particles.star", "--reference", data / "start.mrc", "--diameter", DIAMETER, "--sym", "D2"]
    options += [
        "--healpix-order",
        1,
        "--offset-range",
        3,
        "--max-iterations",
        2,
        "--threads",
        1,
        "--device",
        "cpu",
        "--out",
        "out",
    ]
    with contextlib.chdir(folder):
        assert main(["refine", *map(str, options)]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed; not to be changed."""
    return short_run(data, tmp_path_factory.mktemp("runs") / "whole")


# One seed, one result


@needs_benchmarks
def test_one_seed_gives_the_same_files_but_for_dates(data, whole, tmp_path, run_folders):
    found = run_folders.differences(whole, short_run(data, tmp_path / "again"))
    assert set(found) <= {"events.jsonl", "report.html", "result.json", "run.log"}
    assert [line for lines in found.values() for line in lines] == []


@pytest.mark.slow
@needs_benchmarks
def test_a_process_that_compiles_computes_the_same(data, tmp_path, run_folders):
    """The first run on a machine compiles its kernels, later ones find them in Numba's cache: not a bit may depend on that."""
    words = ["--particles", data / "particles.star", "--reference", data / "start.mrc", "--diameter", DIAMETER, "--sym", "D2"]
    words += ["--offset-range", 3, "--max-iterations", 2, "--threads", 1, "--device", "cpu", "--out", "out"]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "NUMBA")}
    for name in ("compiling", "cached"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "verglas", "refine", *map(str, words)]
        environment = os.environ | threads | {"NUMBA_CACHE_DIR": str(tmp_path / "numba")}
        subprocess.run(command, cwd=tmp_path / name, env=environment, check=True, capture_output=True, timeout=900)
    found = run_folders.differences(tmp_path / "compiling/out", tmp_path / "cached/out")
    assert [line for lines in found.values() for line in lines] == []


@needs_benchmarks
def test_differences_are_seen(whole, tmp_path, run_folders):
    """One bit of a voxel, one digit of a table or a record; not the texts of a map's header."""
    copy = shutil.copytree(whole, tmp_path / "copy")

    def change(name: str, old: bytes, new: bytes) -> None:
        content = (copy / name).read_bytes()
        assert old in content and len(old) == len(new)
        (copy / name).write_bytes(content.replace(old, new, 1))

    change("run_data.star", b"000007@", b"000008@")
    change("result.json", b'"value": 60', b'"value": 61')
    change("run.log", b"Pmax 1.000", b"Pmax 1.001")
    voxels = bytearray((copy / "run_class001.mrc").read_bytes())
    voxels[-4] ^= 1
    (copy / "run_class001.mrc").write_bytes(voxels)
    change("run_half1_class001_unfil.mrc", b"Written", b"written")
    (copy / "run_sampling.star").unlink()
    found = run_folders.differences(whole, copy)
    assert set(found) == {"run_data.star", "result.json", "run.log", "run_class001.mrc", "run_half1_class001_unfil.mrc",
                          "run_sampling.star"}  # fmt: skip
    assert [name for name, lines in found.items() if not lines] == ["run_half1_class001_unfil.mrc"]
    assert found["run_class001.mrc"] == ["voxels"]


@needs_benchmarks
@pytest.mark.parametrize("done", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_left_after_some_iterations_ends_the_same(data, whole, tmp_path, monkeypatch, run_folders, done):
    monkeypatch.chdir(tmp_path)
    options = {"diameter": DIAMETER, "symmetry": "D2", "healpix_order": 1, "offset_range": 3.0, "max_iterations": 2}
    refinement = verglas.refine(data / "particles.star", data / "start.mrc", out="out", device="cpu", threads=1, **options)
    for _ in range(done):
        next(refinement)
    with pytest.raises(KeyboardInterrupt):
        refinement._events.throw(KeyboardInterrupt)
    assert run_folders.faults(tmp_path / "out") == [] and not (tmp_path / "out/run_class001.mrc").exists()
    assert main(["refine", "--continue", "out", "--device", "cpu", "--threads", "1"]) == 0
    changed = {name for name, lines in run_folders.differences(whole, tmp_path / "out").items() if lines}
    # The command line stands in each of these, and a continued run notes that it was.
    told = {"config.json", "result.json", "events.jsonl", "run.log"}
    assert {name for name in changed if not name.endswith("_optimiser.star")} <= told


# What a kill leaves


def test_a_resumable_run_appears_together_with_its_configuration(tmp_path, monkeypatch):
    """Killed before, there is no folder in the way of a new run; killed after, the run can go on."""
    out, seen = tmp_path / "out", []

    def write(path: Path, content: dict) -> None:
        seen.append(out.exists())
        path.write_text(json.dumps({"command": content["command"]}))

    with monkeypatch.context() as patch:
        patch.setattr(provenance, "write_json", write)
        with RunFolder.create(out, "test", None, overwrite=False, resumable=True):
            assert seen == [False] and (out / "config.json").exists()
    assert os.listdir(tmp_path) == ["out"]
    before = sorted(os.listdir(out))

    def fail(path: Path, content: dict) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provenance, "write_json", fail)
    with pytest.raises(OutputError, match="full"), RunFolder.create(out, "test", None, overwrite=True, resumable=True):
        pass
    assert os.listdir(tmp_path) == ["out"] and sorted(os.listdir(out)) == before


def test_a_line_that_a_kill_cut_off_is_ended(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), RunFolder.create(out, "test", None, overwrite=False, resumable=True):
        raise RuntimeError
    with (out / "events.jsonl").open("a") as file:
        file.write('{"event": "itera')
    with pytest.raises(RuntimeError), RunFolder.reopen(out, "test", None):
        raise RuntimeError
    lines = (out / "events.jsonl").read_text().splitlines()
    assert lines[2] == '{"event": "itera' and [json.loads(lines[i])["event"] for i in (0, 1, 3, 4)] == [
        "started", "stopped", "resumed", "stopped"
    ]  # fmt: skip


def test_temporary_files_of_every_writer_are_removed(tmp_path):
    """The names under which maps, tables, pages and JSON are written; nothing else goes."""
    kept = [".owner.json", ".hidden", "run_data.star", "config.json"]
    for name in kept:
        (tmp_path / name).write_text("kept")
    made = []
    for name in ("run_class001.mrc", "run_it001_data.star", "run_it002.checkpoint", "report.html"):
        with pytest.raises(RuntimeError), atomic_path(tmp_path / name) as part:
            made.append(part.name)
            raise RuntimeError
    made.append(f".result.json.partial-{os.getpid()}")  # as verglas.io.provenance.write_json names it
    for name in made:
        (tmp_path / name).write_text("half")
    assert {path.name for path in remove_leftovers(tmp_path)} == set(made)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


@needs_benchmarks
def test_half_written_files_are_found(whole, tmp_path, run_folders):
    """The judge of the benchmark: each file of a run, cut at several places, is called a fault."""
    out = shutil.copytree(whole, tmp_path / "copy")
    assert run_folders.faults(out) == [] and run_folders.leftovers(out) == []
    for name in ("run_class001.mrc", "run_it001.checkpoint", "run_data.star", "config.json", "report.html"):
        whole = (out / name).read_bytes()
        for share in (0.0, 0.9):
            (out / name).write_bytes(whole[: int(share * len(whole))])
            faults = run_folders.faults(out)
            assert len(faults) == 1 and faults[0].startswith(name), (name, share, faults)
        (out / name).write_bytes(whole)
    (out / "run_class001.mrc.tmp").write_bytes(b"")
    assert run_folders.faults(out) == ["run_class001.mrc.tmp: not a file of a run"]


# Whole benchmarks


def benchmark(*words: str) -> str:
    """What a benchmark printed; it must succeed."""
    command = [sys.executable, "-m", "benchmarks." + words[0], *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@needs_benchmarks
def test_killed_runs_end_the_same():
    printed = benchmark("kill_and_continue", "--kills", "4", "--seed", "1")
    assert "4 kills, " in printed and " 0 faults" in printed


@pytest.mark.slow
@pytest.mark.interop
@needs_benchmarks
@pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="RELION is not installed")
def test_relion_accepts_what_a_refinement_leaves():
    printed = benchmark("relion_accepts")
    assert "FAIL" not in printed and printed.count("pass") >= 8
