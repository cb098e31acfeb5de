"""benchmarks/: promises, records, what stops figures from being taken, and the page made from them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import record as records
from benchmarks import registry, runner, tables, verifier
from benchmarks.figures import publish
from benchmarks.floors import Ceilings, Work, floors
from benchmarks.gpu_busy import Trace, kernel_owners, kind_of, union
from benchmarks.process_tree import TRACED, end_all
from benchmarks.record import Record, Source
from benchmarks.refinement_run import permuted
from benchmarks.registry import Bar, Benchmark

from verglas.core.rotations import rotation_about_axis
from verglas.core.symmetry import symmetry_matrices

ROOT = Path(__file__).resolve().parent.parent
BAR = Bar("a", "an iteration", "order * s", "<=", 0.8, "s")


def a_record(**changes: object) -> Record:
    made = Record("gpu_iteration", Source("0123456789abcdef", False, "feed"), "2026-11-21T10:00:00Z",
                  {"device": "NVIDIA H100 80GB HBM3", "cpu": "EPYC", "cores": 16}, {"torch": "2.11"}, "green", "python -m x",
                  {"K=1 order 2 s": 0.7, "K=1 order 3 s": 1.4})  # fmt: skip
    return replace(made, **changes)


# Promises


def test_the_worst_figure_counts() -> None:
    figures = {"order 2 s": 0.5, "order 3 s": 0.9, "order 3 significant": 7.0}
    assert BAR.measured(figures) == 0.9 and not BAR.kept(0.9) and BAR.kept(0.8)
    rate = replace(BAR, comparison=">=")
    assert rate.measured(figures) == 0.5 and not rate.kept(0.5) and rate.kept(0.8)


def test_no_figure_is_none_and_nan_keeps_no_promise() -> None:
    assert BAR.measured({"whole s": 1.0}) is None
    value = BAR.measured({"order 2 s": 0.1, "order 3 s": math.nan})
    assert value is not None and math.isnan(value) and not BAR.kept(value) and not replace(BAR, comparison=">=").kept(value)


def test_every_benchmark_can_be_run_and_every_row_is_known() -> None:
    names = [one.name for one in registry.BENCHMARKS]
    assert len(set(names)) == len(names)
    for one in registry.BENCHMARKS:
        source = (ROOT / "benchmarks" / f"{one.module}.py").read_text()
        assert '"--out"' in source, f"{one.module} takes no --out"
        assert all(bar.row in registry.ROWS for bar in one.bars)
    with pytest.raises(KeyError, match="gpu_iteration"):
        registry.find("nonsense")


def test_make_bench_is_planned_to_end_within_five_minutes() -> None:
    assert sum(one.seconds * one.repeat for one in command.of_group("cpu")) + 30 <= 300  # 30 s for the tests before


# Records


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = a_record().write(tmp_path)
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "0123456789ab" / "gpu_iteration.json"
    assert records.read(path) == a_record() and records.all_records(tmp_path) == [a_record()]
    assert a_record(source=Source("0123456789abcdef", True, "feed")).folder.name == "0123456789ab-dirty"
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="not a record"):
        records.read(path)


def test_figures_of_nested_json_have_names_that_tell() -> None:
    found = [{"box": 64, "kind": "random", "rate G/s": 9.5}, {"box": 64, "kind": "clusters", "rate G/s": 8.0}]
    alike = {"table": [{"K": 7, "ms": 0.5}, {"K": 7, "ms": 0.25}, {"K": 8, "ms": 1.5}]}
    assert dict(records.flat(alike)) == {"table / 7 (1) / ms": 0.5, "table / 7 (2) / ms": 0.25, "table / 8 / ms": 1.5}
    content = {"device": "x", "rates": found, "times": [0.5, 2.0], "n": 3}
    assert dict(records.flat(content)) == {
        "rates / 64 random / rate G/s": 9.5, "rates / 64 clusters / rate G/s": 8.0, "times / 1": 0.5, "times / 2": 2.0, "n": 3.0,
    }  # fmt: skip


def test_change_between_two_records_in_per_cent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = a_record(), a_record(figures={"K=1 order 2 s": 0.35, "new": 1.0})
    assert records.compare(first, second) == [("K=1 order 2 s", 0.7, 0.35, pytest.approx(-50))]
    a, b = first.write(tmp_path / "a"), second.write(tmp_path / "b")
    assert command.main(["compare", str(a), str(b)]) == 0 and "-50.0 %" in capsys.readouterr().out
    assert command.main(["compare", str(a.parent), str(b.parent)]) == 0 and "-50.0 %" in capsys.readouterr().out
    none = a_record(figures={"other": 1.0}).write(tmp_path / "c")
    assert command.main(["compare", str(a), str(none)]) == 2


def a_tree(folder: Path, test: str) -> Path:
    """A checkout in small: one module, one test."""
    files = {"src/verglas/x.py": "X = 1\n", "tests/test_core.py": test, "benchmarks/y.py": "", "pyproject.toml": ""}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERGLAS_COMMIT", raising=False)
    root = a_tree(tmp_path / "checkout", "")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert records.source(root).commit == "unknown" and records.source(root).dirty
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    clean = records.source(root)
    assert len(clean.commit) == 40 and not clean.dirty
    a_record().write(root / "benchmarks" / "records")  # a record is no change of what it measured
    assert records.source(root) == clean
    (root / "src/verglas/x.py").write_text("X = 2\n")
    assert records.source(root).dirty and records.source(root).tree != clean.tree
    monkeypatch.setenv("VERGLAS_COMMIT", "abc-dirty")
    assert records.source(root).commit == "abc" and records.source(root).dirty


# What stops figures


def test_red_tests_refuse_and_green_ones_leave_a_stamp(tmp_path: Path) -> None:
    root = a_tree(tmp_path, "def test_it():\n    assert 1 == 2\n")
    with pytest.raises(verifier.Refused, match="red"):
        verifier.require_green("cpu", root)
    assert verifier.stamped(root) is None
    (root / "tests/test_core.py").write_text("def test_it():\n    assert 1 == 1\n")
    assert "1 passed" in verifier.require_green("cpu", root)
    assert verifier.stamped(root)
    (root / "tests/test_core.py").write_text("def test_it():\n    assert 1 == 3\n")  # the stamp is of other files
    assert verifier.stamped(root) is None
    with pytest.raises(verifier.Refused, match="red"):
        verifier.require_green("cpu", root)


def test_a_stamp_of_a_processor_does_not_vouch_for_a_gpu(tmp_path: Path) -> None:
    root = a_tree(tmp_path, "def test_it():\n    assert 1 == 2\n")
    verifier.write_stamp("make test", root)
    assert verifier.require_green("cpu", root) == "make test"
    with pytest.raises(verifier.Refused, match="red"):
        verifier.require_green("gpu", root)


def test_nothing_runs_on_red_tests(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def red(device: str) -> str:
        raise verifier.Refused("the tests are red")

    monkeypatch.setattr(verifier, "require_green", red)
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("measured all the same"))
    assert command.main(["run", "startup", "--no-record"]) == 2
    assert "nothing measured" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`run startup` as if it had measured 0.4 s; the folder for its records."""
    monkeypatch.setattr(verifier, "require_green", lambda device: "green")
    monkeypatch.setattr(runner, "missing", lambda one: None)
    monkeypatch.setattr(runner, "run", lambda one, source, tests, *_: a_record(
        name=one.name, source=source, tests=tests, figures={"refine --help s": 0.4}))  # fmt: skip
    return tmp_path


def test_changed_files_are_recorded_only_if_allowed(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "source", lambda: Source("abc", True, records.tree_hash()))
    words = ["run", "startup", "--records", str(measured)]
    assert command.main(words) == 0 and not records.all_records(measured)
    assert command.main([*words, "--untested", "--allow-dirty"]) == 0 and not records.all_records(measured)
    assert command.main([*words, "--allow-dirty"]) == 0
    (made,) = records.all_records(measured)
    assert made.source.dirty and made.folder.name == "abc-dirty" and made.tests == "green"


def test_files_that_change_while_it_runs_are_not_recorded(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "source", lambda: Source("abc", False, "another tree"))
    assert command.main(["run", "startup", "--records", str(measured)]) == 0
    assert not records.all_records(measured)


def test_a_missed_promise_is_the_exit_code(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run", lambda one, *_: a_record(name=one.name, figures={"refine --help s": 0.6}))
    assert command.main(["run", "startup", "--no-record"]) == 1
    assert command.main(["run", "nonsense"]) == 2


# Running


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text("import json, sys, time, subprocess\nout = sys.argv[sys.argv.index('--out') + 1]\n" + text)
    return [sys.executable, str(path)]


def test_figures_come_from_the_file_that_a_module_writes(tmp_path: Path) -> None:
    words = script(tmp_path, "json.dump({'a s': 1.5}, open(out, 'w'))\nsys.exit(1)\n")  # it missed a bar of its own
    assert runner.figures_of(words, tmp_path / "figures.json", 60) == {"a s": 1.5}
    with pytest.raises(runner.Failed, match="exit code 3"):
        runner.figures_of(script(tmp_path, "sys.exit(3)\n"), tmp_path / "figures.json", 60)
    publish({"b s": 2.0}, tmp_path / "published.json")
    assert json.loads((tmp_path / "published.json").read_text()) == {"b s": 2.0}


def test_what_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True:\n    pathlib.Path({str(alive)!r}).touch()\n    time.sleep(0.05)\n"
    in_its_own_session = f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\ntime.sleep(60)\n"
    words = script(tmp_path, in_its_own_session)
    with pytest.raises(runner.Failed, match="stopped after"):
        runner.figures_of(words, tmp_path / "figures.json", 1.5)
    assert alive.exists()
    time.sleep(0.2)
    last = alive.stat().st_mtime_ns
    time.sleep(0.5)
    assert alive.stat().st_mtime_ns == last


def test_what_is_stopped_says_where_it_stands(tmp_path: Path) -> None:
    stuck = "import time\ndef stands_still():\n    print('here', flush=True)\n    time.sleep(60)\nstands_still()\n"
    with (tmp_path / "log").open("wb") as log:
        words = script(tmp_path, f"subprocess.call([sys.executable, '-c', {stuck!r}], start_new_session=True)\n")
        running = subprocess.Popen([*words, "--out", ""], stdout=log, stderr=log, env=os.environ | TRACED)
    until = time.monotonic() + 30
    while "here" not in (tmp_path / "log").read_text() and time.monotonic() < until:
        time.sleep(0.02)
    end_all(running, traced=True)
    assert "in stands_still" in (tmp_path / "log").read_text()


def test_medians_and_reasons_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner.medians([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}
    one = Benchmark("x", "", "cpu", "cpu", 100, "startup")
    assert runner.missing(one) is None
    assert "no-such-program" in str(runner.missing(replace(one, programs=("no-such-program",))))
    assert "no_such_package" in str(runner.missing(replace(one, packages=("no_such_package",))))
    monkeypatch.setenv("VERGLAS_SHARED", str(ROOT))
    assert "VERGLAS_SHARED" in str(runner.missing(replace(one, files=("models/none.npz",))))
    assert command.too_long(one, 99) and command.too_long(one, 100) is None and command.too_long(one, None) is None


# The page


def test_the_page_shows_what_the_records_say() -> None:
    _, part, _ = tables.split_page(tables.PAGE.read_text(encoding="utf-8"))
    assert part == tables.generated(records.all_records()), "run `python -m benchmarks page`"


def test_records_are_of_benchmarks_that_exist() -> None:
    known = {one.name for one in registry.BENCHMARKS}
    assert {one.name for one in records.all_records()} <= known


def test_a_table_is_filled_from_the_youngest_clean_record() -> None:
    old, new = a_record(figures={"K=1 order 2 s": 0.9}), a_record(date="2026-11-22T10:00:00Z")
    dirty = a_record(date="2026-11-23T10:00:00Z", source=Source("fff", True, "x"), figures={"K=1 order 2 s": 0.1})
    lines = tables.promised([old, new, dirty])
    kept = "0.7 s | kept | NVIDIA H100 80GB HBM3 | 0123456789ab, 2026-11-22"
    assert any(line.startswith("| a |") and kept in line for line in lines)
    assert any(line.startswith("| a |") and "1.4 s | **missed**" in line for line in lines)
    assert any(line.startswith("| b |") and "not measured yet" in line for line in lines)
    floored = a_record(figures={"K=1 order 2 s": 0.5, "K=1 order 2 floor s": 0.2})
    assert "| gpu_iteration: K=1 order 2 | 200 ms | 500 ms | 40 % | NVIDIA H100 80GB HBM3 |" in tables.floors([floored])
    with pytest.raises(ValueError, match="no '<!--"):
        tables.split_page("a page without marks")


# Floors, and what the GPU did


def test_floors_by_hand() -> None:
    work = Work(particles=10, box=4, coarse=3, full=5, orientations=7, offsets=2, significant=4.0, children=8,
                children_of_offset=4, volume=100, references=2)  # fmt: skip
    found = floors(work, Ceilings(products=1.0, memory=1.0, cache=1.0))
    assert found["coarse products"] == 10 * 3 * 7 * (4 * 2 + 2)  # two real products of 2 K terms, one of K
    assert found["fine products"] == 10 * (4 * 8 * 4) * 4 * 5
    slices = 10 * (4 / 2 * 8)  # the significant samples spread over all offsets
    assert found["slicing"] == (2 * 7 * 3 + slices * 5) * 64 and found["backprojection"] == slices * 5 * 8 * 16
    thin = floors(work, Ceilings(products=1e9, memory=1.0, cache=1.0))
    assert thin["coarse products"] == 4 * (10 * 2 * 3 + 2 * 7 * 3)  # one read of the operands, 4 bytes a coefficient


def test_time_in_which_any_kernel_ran() -> None:
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    trace = Trace([("_compare_kernel", 0, 2), ("nvjet_sm90_hss", 1, 3), ("_compare_kernel", 5, 6)], 10.0)
    assert trace.busy == 4 and trace.by_kind({"_compare_kernel": "compare"}) == {"compare": 3, "products": 2}
    assert trace.longest(1) == [("_compare_kernel", 2, 3)]
    assert kind_of("Memcpy DtoH (Device -> Pageable)", {}) == "copies"
    assert kind_of("vector_add", {}) == "elementwise and other"


def test_kernels_are_told_by_who_defines_them(tmp_path: Path) -> None:
    cuda = 'extern "C" __global__ void one(int n) {}\nextern "C" __global__ void __launch_bounds__(32) two(int n) {}\n'
    for name, text in {"a/triton.py": "def _list_kernel(x):\n", "b/triton.py": "def _list_kernel(x):\n", "b/c.cu": cuda}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kernel_owners(tmp_path) == {"_list_kernel": "a, b", "one": "b", "two": "b"}


def test_turning_axes_moves_density_as_the_matrix_says() -> None:
    n, generator = 8, torch.Generator().manual_seed(0)
    map_ZYX = torch.rand(n, n, n, generator=generator)
    for matrix_33 in [*symmetry_matrices("O")[:8], rotation_about_axis((0, 0, 1), 90)]:
        turned_ZYX = permuted(map_ZYX, matrix_33)
        for v in ([1, 2, -3], [0, -2, 1], [3, 0, 0]):
            x, y, z = (matrix_33 @ torch.tensor(v, dtype=torch.float64)).round().long().tolist()
            assert turned_ZYX[z + n // 2, y + n // 2, x + n // 2] == map_ZYX[v[2] + n // 2, v[1] + n // 2, v[0] + n // 2]
