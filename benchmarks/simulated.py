"""Simulated sets for benchmarks, made in place by `verglas simulate` and kept for the next run in the same folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The microscope and offsets of the sets on which RELION's times in docs/performance.md were taken.
AS_RELION = ("--snr", "0.05", "--offset-sigma", "2.5", "--per-micrograph", "60", "--bfactor", "60")


def simulated(
    folder: Path, model: str, n: int, box: int, pixel: float, words: Sequence[str] = AS_RELION, parts: int = 1
) -> Path:  # fmt: skip
    """The folder with particles.star, truth.mrc and start.mrc (40 Å); simulated unless it is there. pixel: Å. parts: so many
    processes make a share each, each on a GPU of its own where there are as many, with seeds 1, 2, ...

    SystemExit with the program's last words if it fails.
    """
    if (folder / "particles.star").exists():
        return folder
    begin = time.perf_counter()
    command = [sys.executable, "-m", "verglas", "simulate", "--model", model, "--box", str(box), "--pixel", f"{pixel:g}", *words]
    if parts == 1:
        ended(subprocess.Popen([*command, "--out", str(folder), "--n", str(n)], **PIPES))
    else:
        running, gpus = list[subprocess.Popen[str]](), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        command += ["--threads", str(max(1, len(os.sched_getaffinity(0)) // parts))]
        for part in range(parts):
            mine = ["--out", str(folder / f"part_{part}"), "--n", str((n * (part + 1)) // parts - (n * part) // parts)]
            env = os.environ | {"CUDA_VISIBLE_DEVICES": gpus[part] if len(gpus) == parts else str(part)}
            running.append(subprocess.Popen([*command, *mine, "--seed", str(part + 1)], env=env, **PIPES))
        for one in running:
            ended(one)
        merge(folder, [folder / f"part_{part}" for part in range(parts)])
    print(f"simulated {n} x {box} px in {time.perf_counter() - begin:.1f} s", flush=True)
    return folder


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def ended(process: subprocess.Popen[str]) -> None:
    """Wait for `verglas simulate`."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"verglas simulate failed:\n{said[-3000:]}")


def merge(folder: Path, parts: Sequence[Path]) -> None:
    """One set of several of one model: particles.star names the images of all, maps are those of the first."""
    from verglas.particles.merge import merge_tables
    from verglas.particles.table import ParticleTable

    tables = []
    for part in parts:
        table = ParticleTable.read(part / "particles.star")
        tables.append(table.with_columns(rlnMicrographName=f"{part.name}/" + table.frame["rlnMicrographName"]))
    for name in ("truth.mrc", "start.mrc"):
        shutil.copyfile(parts[0] / name, folder / name)
    merge_tables(tables)[0].write(folder / "particles.star")
