"""The run folder is whole or not there at all, and tells how it was made."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from verglas.errors import OutputError
from verglas.io import progress, staging
from verglas.io.provenance import plain
from verglas.io.runfolder import RunFolder, write_result_json

DEAD = {"host": staging.socket.gethostname(), "pid": 2**22 + 1, "process_start": "1"}  # beyond Linux's largest process number


@dataclass(kw_only=True)
class Inner:
    model: Path
    seed: int = 7


@dataclass(kw_only=True)
class Options:
    out: Path
    inner: Inner
    maps: tuple[Path, ...] = ()
    max_resolution: float | None = None
    ratios: list[float] = field(default_factory=lambda: [0.5, float("nan")])


@pytest.fixture
def options(tmp_path: Path) -> Options:
    model = tmp_path / "model.mrc"
    model.write_bytes(b"x" * 123)
    return Options(out=tmp_path / "runs" / "one", inner=Inner(model=model), maps=(tmp_path / "absent.mrc",))


def make_run(options: Options, overwrite: bool = False, text: str = "new", **kwargs: bool) -> None:
    with RunFolder.create(options.out, "test", options, overwrite=overwrite, **kwargs) as run:
        run.path("map.txt").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_finished_run_holds_results_and_provenance(options: Options) -> None:
    with RunFolder.create(options.out, "test", options, overwrite=False) as run:
        assert not options.out.exists(), "nothing may stand at the final name before the end"
        run.provenance(device="cpu", kernels="numba", precision="float32", reason="no GPU")
        run.log("a [red]line")
        with run.progress("Counting", total=10, unit="particles") as bar:
            bar.advance(4)
            bar.advance(6)
        run.path("deep/er.txt").write_text("x")
        run.figure("resolution", 8.1, "Å")
    assert names(options.out) == {"config.json", "result.json", "events.jsonl", "run.log", "deep"}
    assert names(options.out.parent) == {"one"}
    result = json.loads((options.out / "result.json").read_text())
    assert result["figures"] == {"resolution": {"value": 8.1, "unit": "Å"}}
    assert result["kernels"] == "numba" and result["reason"] == "no GPU" and result["device"].startswith("cpu (")
    assert result["seed"] == 7
    assert {"verglas", "python", "platform", "torch", "numpy"} <= set(result["versions"])
    assert [(Path(one["path"]).name, one["bytes"]) for one in result["inputs"]] == [("model.mrc", 123)]
    assert 0 <= result["seconds"] < 60
    config = json.loads((options.out / "config.json").read_text())
    assert config["options"]["inner"]["seed"] == 7 and config["options"]["ratios"] == [0.5, None]
    events = [json.loads(line) for line in (options.out / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "provenance", "stage", "finished"]
    assert events[2]["done"] == 10 and events[2]["unit"] == "particles"
    assert "a [red]line" in (options.out / "run.log").read_text()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_leaves_nothing_behind(options: Options, error: BaseException) -> None:
    with pytest.raises(type(error)), RunFolder.create(options.out, "test", options, overwrite=False) as run:
        run.path("map.txt").write_text("half")
        raise error
    assert not options.out.parent.exists(), "the parent folders were made by the run and must go too"


def test_an_existing_folder_is_refused_and_kept(options: Options) -> None:
    make_run(options, text="old")
    with pytest.raises(OutputError, match="--overwrite"):
        make_run(options)
    assert (options.out / "map.txt").read_text() == "old"


def test_overwrite_replaces_whole_folders(options: Options) -> None:
    make_run(options, text="old")
    (options.out / "extra").write_text("of the old run")
    make_run(options, overwrite=True)
    assert (options.out / "map.txt").read_text() == "new"
    assert "extra" not in names(options.out) and names(options.out.parent) == {"one"}


def test_a_failing_overwrite_keeps_the_old_run(options: Options) -> None:
    make_run(options, text="old")
    with pytest.raises(ValueError), RunFolder.create(options.out, "test", options, overwrite=True):
        raise ValueError
    assert (options.out / "map.txt").read_text() == "old" and names(options.out.parent) == {"one"}


def test_old_or_new_exists_at_every_moment(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(options, text="old")
    real, seen = os.rename, []

    def watched(source: Path, target: Path) -> None:
        real(source, target)
        seen.append({path.read_text() for path in options.out.parent.glob("*/map.txt")} | {
            path.read_text() for path in options.out.parent.glob(".*replaced*/map.txt")})  # fmt: skip

    monkeypatch.setattr(os, "rename", watched)
    make_run(options, overwrite=True)
    assert len(seen) == 2 and all("old" in texts or "new" in texts for texts in seen)


def test_overwrite_deletes_only_runs(options: Options) -> None:
    options.out.mkdir(parents=True)
    (options.out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"config\.json"):
        make_run(options, overwrite=True)
    assert (options.out / "thesis.tex").exists()


def test_overwrite_does_not_delete_an_input(options: Options) -> None:
    make_run(options)
    inside = Options(out=options.out, inner=Inner(model=options.out / "map.txt"))
    with pytest.raises(OutputError, match="input"):
        make_run(inside, overwrite=True)
    assert (options.out / "map.txt").exists()


def test_full_disk_is_an_output_error(options: Options) -> None:
    with pytest.raises(OutputError, match="disk is full"), RunFolder.create(options.out, "test", options, overwrite=False):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="disk is full"), RunFolder.create(options.out, "test", options, overwrite=False):
        raise OSError("262144 requested and 1024 written")  # numpy's tofile
    assert not options.out.parent.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_for_the_log_itself(options: Options) -> None:
    with pytest.raises(OutputError, match="disk is full"), RunFolder.create(options.out, "test", options, overwrite=False) as run:
        run._streams["events.jsonl"] = open("/dev/full", "a")  # noqa: SIM115
        run.event("a fact")
    assert not options.out.parent.exists()


def test_a_file_in_the_way_of_the_folder(options: Options) -> None:
    options.out.parent.write_text("a file where a folder is needed")
    with pytest.raises(OutputError, match="cannot be written"):
        make_run(options)


def test_a_path_may_not_leave_the_folder(options: Options) -> None:
    with pytest.raises(ValueError, match="out of the run"), RunFolder.create(options.out, "t", options, overwrite=False) as run:
        run.path("../escaped.txt")


def leave_behind(folder: Path, owner: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / staging.OWNER).write_text(json.dumps(owner))
    (folder / "map.txt").write_text("left")


def test_folders_of_dead_runs_are_removed(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    leave_behind(options.out.parent / ".one.partial-4194305", DEAD)
    leave_behind(options.out.parent / ".one.partial-77", {**DEAD, "host": "another-machine"})
    leave_behind(options.out.parent / ".two.partial-4194305", DEAD)
    make_run(options)
    assert names(options.out.parent) == {"one", ".one.partial-77", ".two.partial-4194305"}
    assert ".one.partial-4194305" in capsys.readouterr().err


def test_a_replaced_run_comes_back_if_its_successor_died(options: Options) -> None:
    leave_behind(options.out.parent / ".one.replaced-4194305", DEAD)
    with pytest.raises(OutputError, match="exists"):
        make_run(options)
    assert names(options.out.parent) == {"one"} and (options.out / "map.txt").read_text() == "left"


def test_two_living_runs_do_not_share_an_output(options: Options) -> None:
    with (
        RunFolder.create(options.out, "test", options, overwrite=False),
        pytest.raises(OutputError, match="another run"),
        RunFolder.create(options.out, "test", options, overwrite=False),
    ):
        pass
    assert (options.out / "result.json").exists()


def test_a_reused_process_number_is_not_taken_for_the_old_run(options: Options) -> None:
    leave_behind(options.out.parent / f".one.partial-{os.getpid()}", {**DEAD, "pid": os.getpid()})
    make_run(options)
    assert names(options.out.parent) == {"one"}


def test_a_resumable_run_stays_and_goes_on(options: Options) -> None:
    with pytest.raises(RuntimeError), RunFolder.create(options.out, "test", options, overwrite=False, resumable=True) as run:
        run.path("checkpoint").write_text("3")
        raise RuntimeError("power cut")
    assert (options.out / "checkpoint").read_text() == "3" and not (options.out / "result.json").exists()
    with RunFolder.reopen(options.out, "test", options) as run:
        assert run.resumed and run.path("checkpoint").read_text() == "3"
    events = [json.loads(line)["event"] for line in (options.out / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "stopped", "resumed", "finished"]
    assert staging.OWNER not in names(options.out)
    with pytest.raises(OutputError, match="finished"):
        RunFolder.reopen(options.out, "test", options)


def test_overwriting_by_a_resumable_run_keeps_the_old_until_the_end(options: Options) -> None:
    make_run(options, text="old")
    with RunFolder.create(options.out, "test", options, overwrite=True, resumable=True) as run:
        kept = [path.read_text() for path in options.out.parent.glob(".*/map.txt")]
        run.path("map.txt").write_text("new")
    assert kept == ["old"]
    assert names(options.out.parent) == {"one"} and (options.out / "map.txt").read_text() == "new"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_behind(tmp_path: Path, number: int, code: int) -> None:
    script = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell inherit it ignored
from dataclasses import dataclass
from pathlib import Path
from verglas.cli import main as cli
from verglas.io.runfolder import RunFolder

@dataclass
class Sleep:
    def run(self):
        with RunFolder.create(Path({str(tmp_path / "out")!r}), "sleep", self, overwrite=False) as run:
            run.path("half.txt").write_text("x")
            print("ready", flush=True)
            time.sleep(60)

cli.COMMANDS = {{"T": {{"sleep": "sleep:Sleep"}}}}
cli.command_class = lambda name: Sleep
sys.exit(cli.main(["sleep"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert "left behind" in err and names(tmp_path) == set()


def test_result_beside_a_file(tmp_path: Path, options: Options) -> None:
    for name in ("map.mrc", "map.star"):
        (tmp_path / name).write_text("x")
    figures = {"volume": (12.5, "Å^3")}
    first = write_result_json(tmp_path / "map.mrc", "mask", options, figures, seconds=1.0)
    again = write_result_json(tmp_path / "map.mrc", "mask", options, figures, seconds=2.0)
    other = write_result_json(tmp_path / "map.star", "mask", options, figures, seconds=1.0)
    assert (first.name, again.name, other.name) == ("map.result.json", "map.result.json", "map.star.result.json")
    result = json.loads(first.read_text())
    assert result["figures"]["volume"] == {"value": 12.5, "unit": "Å^3"} and result["seconds"] == 2.0


def test_the_io_of_a_run_does_not_import_torch() -> None:
    code = "import sys, verglas.io.runfolder; sys.exit(bool({'torch', 'numpy', 'pandas', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_numbers_of_numpy_become_numbers() -> None:
    import numpy as np

    given = {"a": np.float32(0.5), "b": np.arange(3), "c": float("inf"), "d": {"e": (Path("x"), True, None)}}
    assert plain(given) == {"a": 0.5, "b": [0, 1, 2], "c": None, "d": {"e": ["x", True, None]}}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "0.8 s"), (42.4, "42 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration_text(seconds) == text


def test_plain_progress_is_sparse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress("Reading", total=3600, unit="images") as bar:
        for _ in range(3600):
            now += 1
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Reading: 10 of 3,600 images, 1.0 images/s, 59 min 50 s left")
    assert lines[-1] == "Reading: 3,600 images in 1 h 00 min (1.0 images/s)"
    assert 8 <= len(lines) <= 25


def test_a_terminal_gets_panels_and_bars(
    options: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with RunFolder.create(options.out, "test", options, overwrite=False) as run:
        run.provenance(device="cpu", kernels="numba")
        with run.progress("Counting", total=4, unit="particles") as bar:
            bar.describe("Counting slowly")
            bar.advance(4)
    err = capsys.readouterr().err
    assert "╭─" in err and "Counting slowly" in err and "100%" in err and "Counting: 4 particles in 0.0 s" in err
