"""A whole 3-D classification on a GPU: `python -m benchmarks.gpu_classes --model 6wg6_C1.npz [--work DIR] [--out FIGURES.json]`.

K = 4, 10,000 x 128 px of 2.6 Å, SNR 0.05, C1, diameter 240 Å, five iterations at HEALPix order 2 from one map at 40 Å; whole
processes of `verglas classify3d`: cold (no compiled kernel kept from before), then with kernels cached. Prints seconds until the
folder is open, until the first iteration begins, of each iteration, and from the last map to the end of the process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.figures import publish
from benchmarks.gpu_refine import caches
from benchmarks.refinement_run import Run, finished, opening
from benchmarks.simulated import simulated


def parts_of(run: Run) -> dict[str, float]:
    """Seconds of the parts of a process, in their order; they sum to all of it."""
    opened = opening(run.folder) - run.begun
    begin, end = run.computing_span()
    rest = end - begin - sum(sum(one["took"].values()) for one in run.iterations)
    iterations = {f"iteration {one['iteration']} s": sum(one["took"].values()) for one in run.iterations}
    return {"until the folder s": opened, "preparing s": begin - opened, **iterations, "between iterations s": rest,
            "after the last map s": run.seconds - end}  # fmt: skip


def measured(work: Path, data: Path, options: argparse.Namespace) -> dict[str, float]:
    """All figures, cold run first."""
    words = ["classify3d", "--particles", str(data / "particles.star"), "--reference", str(data / "start.mrc"),
             "--classes", "4", "--iterations", "5", "--initial-resolution", "40", "--diameter", f"{options.diameter:g}",
             "--device", options.device]  # fmt: skip
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as compiled:
        environment = caches(Path(compiled))
        for name in ("cold", "cached"):
            run = finished(work / name, words, environment=environment)
            parts = parts_of(run)
            print(f"{name}: {run.seconds:.2f} s")
            print(*(f"  {part} {value:.2f}" for part, value in parts.items()), sep="\n", flush=True)
            found |= {f"{name} s": run.seconds} | {f"{name}, {part}": value for part, value in parts.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--pixel", type=float, default=2.6)
    parser.add_argument("--diameter", type=float, default=240.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        data = simulated(work / "iteration", options.model, options.particles, options.box, options.pixel)
        publish(measured(work, data, options), options.out)


if __name__ == "__main__":
    main()
