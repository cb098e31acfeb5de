"""No figures from code that is wrong: benchmarks start only after the tests of this very tree were green."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import ROOT, Source, tree_hash

STAMP = Path("build") / "tests.json"  # below the root; ignored by git
# Seconds long, and they would notice a fast wrong answer: kernels against their float64 references, searches, sums, maps.
FAST = (
    "test_kernels", "test_kernels_expectation", "test_kernels_keep", "test_weigh", "test_core", "test_projection",
    "test_sampling", "test_expectation", "test_maximization",
)  # fmt: skip


class Refused(Exception):
    """Why nothing is measured."""


def write_stamp(scope: str, root: Path = ROOT) -> None:
    """Note that tests (`scope`) were green on the tree as it is."""
    path = root / STAMP
    path.parent.mkdir(exist_ok=True)
    content = {"tree": tree_hash(root), "scope": scope, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def stamped(root: Path = ROOT) -> str | None:
    """Which tests were green on exactly this tree; None if none were, or something changed since."""
    try:
        content = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(content["scope"]) if content.get("tree") == tree_hash(root) else None


def fast_tests(device: str, root: Path = ROOT) -> list[str]:
    """The command of the tests that stand before benchmarks; on a GPU those that need one as well."""
    files = [f"tests/{name}.py" for name in FAST if (root / "tests" / f"{name}.py").exists()]
    marks = "not slow and not gpu" if device == "cpu" else "not slow"
    parallel = ["-n", "2"] if importlib.util.find_spec("xdist") and device == "cpu" else []
    return [sys.executable, "-m", "pytest", "-x", *parallel, "-p", "no:cacheprovider", "-m", marks, *files]


def require_green(device: str, root: Path = ROOT) -> str:
    """Text for the record: which tests were green. Runs the fast ones unless a stamp vouches for this tree.

    A machine without pytest takes the stamp of another (carry build/tests.json there). Raises Refused if a test fails, or if
    there is neither pytest nor a stamp.
    """
    known, runnable = stamped(root), importlib.util.find_spec("pytest") is not None
    if known and (device == "cpu" or "gpu" in known or not runnable):
        return known
    if not runnable:
        raise Refused(f"no pytest here, and no {STAMP} of this tree from another machine: --untested measures without recording")
    begin = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(fast_tests(device, root), cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"the tests are red:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    scope = f"fast {device} tests: {done.stdout.strip().splitlines()[-1].strip('= ')}"
    print(f"{scope} ({time.perf_counter() - begin:.0f} s)", flush=True)
    write_stamp(scope, root)
    return scope


def unrecorded(source: Source, allow_dirty: bool) -> str | None:
    """Why figures of this tree are only shown, not recorded: files differ from the commit, so that nobody could repeat them.
    None if they are recorded; with `allow_dirty` they always are, and the record says so."""
    if not source.dirty or allow_dirty:
        return None
    return f"files differ from commit {source.commit[:12]}, so nothing is recorded (--allow-dirty records it as a changed tree)"
