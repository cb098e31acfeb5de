"""`verglas refine` and other runs as processes of their own, and what their folders say: seconds, stages, iterations, quality."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """A finished run. seconds: of the whole process; begun: time.time() at its start; iterations: events of that kind."""

    folder: Path
    seconds: float
    begun: float
    iterations: list[dict[str, Any]]

    def stages(self) -> dict[str, float]:
        """Seconds of every stage, all iterations together, as 'stage NAME s'; what is not in any of them as 'stage rest s'."""
        total: dict[str, float] = {}
        for one in self.iterations:
            for name, seconds in one["took"].items():
                total[f"stage {name} s"] = total.get(f"stage {name} s", 0.0) + seconds
        return total | {"stage rest s": self.seconds - sum(total.values())}

    def computing_span(self) -> tuple[float, float]:
        """Seconds after the start of the process at which the first iteration began and the last one's maps were made.

        Events carry the seconds since the program opened its folder; the folder's own start is in the first of them.
        """
        first, last = self.iterations[0], self.iterations[-1]
        opened = opening(self.folder) - self.begun
        return opened + first["seconds"] - sum(first["took"].values()), opened + last["seconds"]


def opening(folder: Path) -> float:
    """time.time() at which a run opened its folder, to a second (what the file says), or better by the log's time of making."""
    status = (folder / "config.json").stat()
    return status.st_mtime


def events(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of events.jsonl, oldest first."""
    text = (folder / "events.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def iterations_of(folder: Path) -> list[dict[str, Any]]:
    """The events of finished iterations; of one that was done twice (--continue), the last."""
    return list({one["iteration"]: one for one in events(folder) if one["event"] == "iteration"}.values())


def refined(
    folder: Path, particles: Path, reference: Path, words: Sequence[str], program: Sequence[str] = ("-m", "verglas"),
    environment: Mapping[str, str] | None = None,
) -> Run:  # fmt: skip
    """Run `verglas refine` to its end. program: Python's words that start verglas; environment: beside this process's own.

    SystemExit with its last words if it fails.
    """
    files = ("--particles", str(particles), "--reference", str(reference))
    return finished(folder, ("refine", *files, *words), program, environment)


def finished(
    folder: Path, words: Sequence[str], program: Sequence[str] = ("-m", "verglas"), environment: Mapping[str, str] | None = None
) -> Run:
    """Run a command of verglas that leaves a run folder to its end, as `refined` does. words: its name and options, but --out."""
    command = [sys.executable, *program, *words, "--out", str(folder), "--overwrite"]
    begun, begin = time.time(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(environment or {}))
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"verglas {words[0]} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return Run(folder, seconds, begun, iterations_of(folder))


def mean_fsc(found: Path, truth: Path, turned: bool = False) -> float:
    """Mean FSC of two maps of one grid over shells 1 .. N/2-1, unmasked. turned: the best of the 24 turns that permute the axes
    (a map of a point group may stand in another setting of them)."""
    import torch

    from verglas.core.shells import fsc
    from verglas.core.symmetry import symmetry_matrices
    from verglas.io.mrc import read_map

    found_ZYX, truth_ZYX = (torch.tensor(read_map(path).data_ZYX, dtype=torch.float32) for path in (found, truth))
    if turned:
        turns = [permuted(truth_ZYX, matrix) for matrix in symmetry_matrices("O")]
        truth_ZYX = max(turns, key=lambda one_ZYX: float((one_ZYX * found_ZYX).sum()))
    return float(fsc(found_ZYX, truth_ZYX)[1:-1].mean())


def permuted(map_ZYX: Any, matrix_33: Any) -> Any:
    """A map turned by a matrix of 0, 1 and -1 about its centre voxel N/2: axes permuted and reversed, nothing interpolated."""
    axes_3 = matrix_33.abs().argmax(1).tolist()  # row i of the matrix: which old axis the new axis i is
    signs_3 = matrix_33.sum(1).tolist()
    turned_XYZ = map_ZYX.permute(2, 1, 0).permute(*axes_3)
    for axis, sign in enumerate(signs_3):
        if sign < 0:  # x -> -x about voxel N/2 of an even grid
            turned_XYZ = turned_XYZ.flip(axis).roll(1, axis)
    return turned_XYZ.permute(2, 1, 0)
