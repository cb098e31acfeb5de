"""Whole auto-refinements beside RELION's on this machine's processor, both in the same run, from their command lines:
`python -m benchmarks.refine_vs_relion --data DIR [--jobs D2 C1] [--repeat 1] [--ranks 3] [--skip-relion] [--out FIGURES.json]`.

D2: beta-galactosidase of RELION's tutorial, 1,391 x 64 px, real; C1: 1,000 x 64 px, simulated. `verglas refine` and
`relion_refine_mpi --auto_refine` get the same images (copied as float32 for RELION 3.1) and the same reference, take turns, and
the median of the ratios of their seconds counts. Quality: mean FSC of the unfiltered half maps, and of the final map with the
truth. Exits with 1 if verglas is less than 20 times as fast.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.figures import publish
from benchmarks.refinement_run import mean_fsc, refined
from benchmarks.relion_iteration import prepare
from benchmarks.simulated import simulated
from verglas.core.shells import fsc
from verglas.io.mrc import Map, read_map, write_map
from verglas.maximization.reference import initial_reference
from verglas.particles.table import ParticleTable

TIMES_FASTER = 20.0


@dataclass(frozen=True)
class Job:
    """One refinement. diameter, initial_resolution: Å; truth: map of the reference's grid; turned: its axes may be permuted."""

    name: str
    particles: Path
    reference: Path
    sym: str
    diameter: float
    initial_resolution: float
    truth: Path
    turned: bool


def real_d2(data: Path, _: Path) -> Job:
    """Beta-galactosidase."""
    tutorial, maps = data / "betagal_tutorial", data / "maps"
    return Job("D2", tutorial / "particles_1391_no_poses.star", maps / "relion_tests_ref_model_betagal_10017.mrc", "D2", 200.0,
               50.0, maps / "5a1a_64px_3.54A.mrc", True)  # fmt: skip


def simulated_c1(data: Path, work: Path) -> Job:
    """A pseudo-symmetric complex."""
    words = ("--snr", "0.15", "--offset-sigma", "2.5", "--per-micrograph", "60", "--bfactor", "60")
    made = simulated(work / "c1", str(data / "models" / "6wg6_C1.npz"), 1000, 64, 4.5, words)
    return Job("C1", made / "particles.star", made / "start.mrc", "C1", 240.0, 40.0, made / "truth.mrc", False)


JOBS = {"D2": real_d2, "C1": simulated_c1}


def timed(words: list[str], folder: Path) -> float:
    """Seconds that a command takes; SystemExit with its last words if it fails."""
    begin = time.perf_counter()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begin


def half_fsc(root: Path) -> float:
    """Mean FSC of the unfiltered half maps over all shells but the first and last."""
    halves = [torch.from_numpy(read_map(Path(f"{root}_half{i}_class001_unfil.mrc")).data_ZYX.copy()) for i in (1, 2)]
    return float(fsc(halves[0], halves[1])[1:-1].mean())


def relion_words(job: Job, ranks: int) -> list[str]:
    """The auto-refine command with RELION's defaults."""
    return [
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), "relion_refine_mpi", "--auto_refine",
        "--split_random_halves", "--i", "particles.star", "--ref", "reference.mrc", "--firstiter_cc", "--ini_high",
        f"{job.initial_resolution:g}", "--ctf", "--ctf_corrected_ref", "--zero_mask", "--flatten_solvent", "--norm",
        "--scale",
        "--particle_diameter", f"{job.diameter:g}", "--sym", job.sym, "--healpix_order", "2",
        "--auto_local_healpix_order", "4", "--offset_range", "5", "--offset_step", "2", "--oversampling", "1",
        "--low_resol_join_halves", "40", "--pad", "2", "--pool", "10", "--dont_combine_weights_via_disc", "--preread_images",
        "--j", "1", "--random_seed", "1", "--o", "relion/run",
    ]  # fmt: skip


def run_verglas(job: Job, folder: Path) -> dict[str, float]:
    """Seconds and quality of `verglas refine`."""
    words = ["--sym", job.sym, "--diameter", f"{job.diameter:g}", "--initial-resolution", f"{job.initial_resolution:g}",
             "--device", "cpu"]  # fmt: skip
    run = refined(folder / "verglas", job.particles.resolve(), job.reference.resolve(), words)
    return {"verglas s": run.seconds, **quality("verglas", folder / "verglas", job)}


def run_relion(job: Job, folder: Path, ranks: int) -> dict[str, float]:
    """Seconds and quality of RELION."""
    table = prepare(ParticleTable.read(job.particles), folder, keep_poses=False, scales=False)
    group = table.groups[0]
    map_ZYX, _ = initial_reference(read_map(job.reference), group.box, group.pixel_size, job.initial_resolution)
    write_map(folder / "reference.mrc", Map(map_ZYX.float().numpy(), group.pixel_size))
    shutil.rmtree(folder / "relion", ignore_errors=True)
    (folder / "relion").mkdir()
    seconds = timed(relion_words(job, ranks), folder)
    return {"relion s": seconds, **quality("relion", folder / "relion", job)}


def quality(who: str, folder: Path, job: Job) -> dict[str, float]:
    """Mean FSC of the halves, and of the final map with the truth."""
    final = mean_fsc(folder / "run_class001.mrc", job.truth, job.turned)
    return {f"{who} half FSC": half_fsc(folder / "run"), f"{who} FSC with the truth": final}


def turns(job: Job, options: argparse.Namespace) -> dict[str, float]:
    """Figures of one job: medians over `--repeat` turns."""
    found: list[dict[str, float]] = []
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as scratch:
            one = run_verglas(job, Path(scratch))
            if not options.skip_relion:
                one |= run_relion(job, Path(scratch), options.ranks)
                one["ratio"] = one["relion s"] / one["verglas s"]
        print(f"{job.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in one.items()), flush=True)
        found.append(one)
    return {f"{job.name} {name}": statistics.median(one[name] for one in found) for name in found[0]}


def main() -> int:
    """Run the jobs; 1 if a ratio is below TIMES_FASTER."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of real inputs")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--skip-relion", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.jobs:
            found |= turns(JOBS[name](options.data, options.work or Path(scratch)), options)
    publish(found, options.out)
    return int(any(name.endswith("ratio") and value < TIMES_FASTER for name, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
