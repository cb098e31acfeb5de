"""First models on a GPU: `python -m benchmarks.abinitio_gpu --models DIR [--work DIR] [--out FIGURES.json]`.

50,000 x 128 px of 2.6 Å at SNR 0.05, three structures in equal shares (6wg6, C1; beta-galactosidase, D2; a GroEL ring, C7), K = 3
and diameter 240 Å: `verglas abinitio` as a whole process, after a run on 1,000 x 64 px that leaves its kernels compiled. Prints
seconds by stage, the share of the particles in the class of their structure, and each map's correlation with its structure's
truth at 20 Å, in either hand. DIR of models: 6wg6_C1.npz, 5a1a_D2.npz, 1oel_C7.npz.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.abinitio_sets import judged
from benchmarks.figures import publish
from benchmarks.refinement_run import Run, iterations_of
from benchmarks.simulated import AS_RELION, simulated
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable

MODELS = ("6wg6_C1", "5a1a_D2", "1oel_C7")


def made(folder: Path, n: int, box: int, pixel: float, models: Path) -> Path:
    """The set, simulated unless it is there."""
    first, *others = (str(models / f"{name}.npz") for name in MODELS)
    more = [word for model in others for word in ("--model", model)]
    return simulated(folder, first, n, box, pixel, (*more, *AS_RELION, "--method", "slices", "--float16"))


def searched(data: Path, out: Path, options: argparse.Namespace) -> Run:
    """`verglas abinitio` as a process of its own; SystemExit with its last words if it fails."""
    command = [sys.executable, "-m", "verglas", "abinitio", "--particles", str(data / "particles.star"), "--diameter", "240",
               "--classes", str(len(MODELS)), "--device", options.device, "--seed", str(options.seed), "--out", str(out),
               "--overwrite", *options.words]  # fmt: skip
    begun, begin = time.time(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"verglas abinitio failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return Run(out, seconds, begun, iterations_of(out))


def told(name: str, run: Run) -> None:
    """Print a run iteration by iteration."""
    print(f"{name}: {run.seconds:.1f} s, of which {run.computing_span()[0]:.1f} s before the first iteration", flush=True)
    for one in run.iterations:
        took = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in one["took"].items())
        shares = " ".join(f"{100 * of['share']:.0f}" for of in one["classes"])
        print(f"  {one['iteration']:3d} {one['stage']}, {one['current_size']} px, {one['significant']:.0f} significant, "
              f"at {one['seconds']:.1f} s: {took}; {shares} %", flush=True)  # fmt: skip


def scored(data: Path, run: Run, device: str) -> dict[str, float]:
    """Share of the particles in the class of their structure, and how the maps agree with the truth."""
    ending = f"it{run.iterations[-1]['iteration']:03d}"
    truth_B = ParticleTable.read(data / "truth.star").frame["rlnClassNumber"].to_numpy()
    found_B = ParticleTable.read(run.folder / f"run_{ending}_data.star").frame["rlnClassNumber"].to_numpy()
    count = len(MODELS)
    table = np.array([[((truth_B == i + 1) & (found_B == k + 1)).sum() for k in range(count)] for i in range(count)])
    best = max(itertools.permutations(range(count)), key=lambda order: table[range(count), order].sum())
    figures = {"share in their own class": float(table[range(count), best].sum() / len(truth_B))}
    for i, k in enumerate(best):
        found, truth = (read_map(path) for path in (run.folder / f"run_{ending}_class{k + 1:03d}.mrc",
                                                    data / f"truth_class{i + 1:03d}.mrc"))  # fmt: skip
        maps = [torch.tensor(one.data_ZYX).float() for one in (found, truth)]
        correlation, _, below = judged(*maps, truth.pixel_size, device)
        figures |= {f"{MODELS[i]} correlation at 20 Å": correlation, f"{MODELS[i]} FSC 0.5 Å": below}
    return figures


def main() -> None:
    """Simulate, search, score, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=50_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("words", nargs="*", help="more options of verglas abinitio, after --")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        for name, n, box in (("small", 1000, 64), ("whole", options.particles, options.box)):
            data = made(work / f"{name}_{n}_{box}", n, box, 2.6 * 128 / box, options.models)
            run = searched(data, work / f"first_{name}", options)
            told(name, run)
            found = {"s": run.seconds, "before the first iteration s": run.computing_span()[0]}
            found |= run.stages() | scored(data, run, options.device)
            figures |= {f"{name} {key}": value for key, value in found.items()}
            publish(figures, options.out)


if __name__ == "__main__":
    main()
