"""`verglas reconstruct` beside `relion_reconstruct --ctf --skip_gridding` (same algorithm), whole processes, one machine.

`python -m benchmarks.reconstruct_vs_relion [--particles truth.star] [--turns 3]`. Without --particles, simulates 20,000
images of 128 px first (1.3 GB). Both programs take turns on 2,000 and on all images; printed are medians: whole process,
time per particle (the slope between the two sizes), the rest (start-up and solve), and peak memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import publish

FEW = 2000


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """(seconds, peak memory in MB) of one process; output is thrown away unless it fails."""
    begin = time.perf_counter()
    wrapper = [sys.executable, "-c", MEASURE, json.dumps(command)]
    done = subprocess.run(wrapper, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begin - START_PYTHON, float(done.stdout.strip().splitlines()[-1])


# Runs the command as its only child, so that the children's peak memory is that command's.
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(json.loads(sys.argv[1]), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
sys.stderr.write(done.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(done.returncode)
"""
START_PYTHON = 0.03


def take(star: Path, n: int, out: Path) -> Path:
    """The first `n` particles of a STAR file."""
    from verglas.particles.table import ParticleTable

    ParticleTable.read(star).select(slice(0, n)).write(out, overwrite=True)
    return out


def bare_torch_memory() -> float:
    """Peak memory in MB of a process that only imports torch."""
    code = "import torch, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if shutil.which("relion_reconstruct") is None:
        raise SystemExit("relion_reconstruct is not installed: nothing to compare with")
    verglas = str(Path(sys.executable).with_name("verglas"))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        star = arguments.particles
        if star is None:
            simulate = [verglas, "simulate", "--n", "20000", "--box", "128", "--pixel", "2.6", "--method", "slices",
                        "--out", str(work / "data")]  # fmt: skip
            subprocess.run(simulate, check=True, capture_output=True)
            star = work / "data" / "truth.star"
        folder = star.resolve().parent
        few = take(star.resolve(), FEW, work / "few.star")
        publish(report({FEW: few, count(star): star.resolve()}, folder, work, verglas, arguments.turns), arguments.out)


def count(star: Path) -> int:
    from verglas.particles.table import ParticleTable

    return len(ParticleTable.read(star))


def report(stars: dict[int, Path], folder: Path, work: Path, verglas: str, turns: int) -> dict[str, float]:
    """Run both programs in turns on both sizes and print the comparison; seconds and their ratios."""
    seconds: dict[tuple[str, int], list[float]] = {}
    memory: dict[tuple[str, int], list[float]] = {}
    for _ in range(turns):
        for n, star in stars.items():
            commands = {
                "relion": ["relion_reconstruct", "--i", str(star), "--o", str(work / "r.mrc"), "--ctf", "--skip_gridding"],
                "verglas": [verglas, "reconstruct", "--particles", str(star), "--folder", str(folder), "--ctf",
                            "--out", str(work / "v"), "--overwrite"],
            }  # fmt: skip
            for name, command in commands.items():
                time_taken, peak = timed(command, folder)
                seconds.setdefault((name, n), []).append(time_taken)
                memory.setdefault((name, n), []).append(peak)
    few, many = sorted(stars)
    slopes, wholes = {}, {}
    for name in ("relion", "verglas"):
        low, high = (statistics.median(seconds[name, n]) for n in (few, many))
        slopes[name], wholes[name] = (high - low) / (many - few), high
        print(f"{name:8s} {few} particles {low:6.2f} s, {many} {high:6.2f} s; per particle {1e3 * slopes[name]:.3f} ms, "
              f"rest {low - few * slopes[name]:.2f} s; peak memory {max(memory[name, many]):.0f} MB")  # fmt: skip
    torch_memory = bare_torch_memory()
    slope, whole = slopes["relion"] / slopes["verglas"], wholes["relion"] / wholes["verglas"]
    print(f"ratios: per particle {slope:.1f}, whole process {whole:.1f}")
    beyond = max(memory["verglas", many]) - torch_memory
    print(f"memory beyond an interpreter with torch imported ({torch_memory:.0f} MB): {beyond:.0f} MB, "
          f"relion_reconstruct {max(memory['relion', many]):.0f} MB")  # fmt: skip
    return {**{f"{name} s": value for name, value in wholes.items()}, "ratio per particle": slope, "ratio": whole}


if __name__ == "__main__":
    main()
