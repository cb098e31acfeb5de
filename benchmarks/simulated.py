"""Simulated sets for benchmarks, made in place by `verglas simulate` and kept for the next run in the same folder."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The microscope and offsets of the sets on which RELION's times in docs/performance.md were taken.
AS_RELION = ("--snr", "0.05", "--offset-sigma", "2.5", "--per-micrograph", "60", "--bfactor", "60")


def simulated(folder: Path, model: str, n: int, box: int, pixel: float, words: Sequence[str] = AS_RELION) -> Path:
    """The folder with particles.star, truth.star, truth.mrc and start.mrc (40 Å); simulated unless it is there. pixel: Å.

    SystemExit with the program's last words if it fails.
    """
    if (folder / "particles.star").exists():
        return folder
    command = [sys.executable, "-m", "verglas", "simulate", "--model", model, "--out", str(folder), "--n", str(n),
               "--box", str(box), "--pixel", f"{pixel:g}", *words]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"verglas simulate failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    print(f"simulated {n} x {box} px in {time.perf_counter() - begin:.1f} s", flush=True)
    return folder
