"""Whole auto-refinements beside RELION's: `python -m benchmarks.refine_vs_relion --particles P.star --reference R.mrc --sym D2
--diameter 200 --initial-resolution 50 [--ranks 3] [--skip-relion]`.

Runs `verglas refine` and, after it, `relion_refine_mpi --auto_refine` on the same images (copied as float32, which RELION 3.1
wants) and the same reference, both from their command lines, and prints seconds, their ratio, and the mean correlation of
the unfiltered half maps of each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.relion_iteration import prepare
from verglas.core.shells import fsc
from verglas.io.mrc import Map, read_map, write_map
from verglas.maximization.reference import initial_reference
from verglas.particles.table import ParticleTable


def timed(words: list[str], folder: Path) -> float:
    """Seconds that a command takes; SystemExit with its last words if it fails."""
    begin = time.perf_counter()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begin


def half_fsc(root: Path) -> tuple[float, list[float]]:
    """Mean FSC of the unfiltered half maps over all shells but the first and last, and the curve."""
    halves = [torch.from_numpy(read_map(Path(f"{root}_half{i}_class001_unfil.mrc")).data_ZYX.copy()) for i in (1, 2)]
    curve = fsc(halves[0], halves[1])
    return float(curve[1:-1].mean()), curve.tolist()


def relion_words(options: argparse.Namespace) -> list[str]:
    """The auto-refine command with RELION's defaults."""
    return [
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(options.ranks), "relion_refine_mpi", "--auto_refine",
        "--split_random_halves", "--i", "particles.star", "--ref", "reference.mrc", "--firstiter_cc", "--ini_high",
        f"{options.initial_resolution:g}", "--ctf", "--ctf_corrected_ref", "--zero_mask", "--flatten_solvent", "--norm",
        "--scale",
        "--particle_diameter", f"{options.diameter:g}", "--sym", options.sym, "--healpix_order", "2",
        "--auto_local_healpix_order", "4", "--offset_range", "5", "--offset_step", "2", "--oversampling", "1",
        "--low_resol_join_halves", "40", "--pad", "2", "--pool", "10", "--dont_combine_weights_via_disc", "--preread_images",
        "--j", "1", "--random_seed", "1", "--o", "relion/run",
    ]  # fmt: skip


def main() -> None:
    """Prepare, run both, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--sym", default="C1")
    parser.add_argument("--diameter", type=float, required=True)
    parser.add_argument("--initial-resolution", type=float, default=50.0)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-relion", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [sys.executable, "-m", "verglas", "refine", "--particles", str(options.particles.resolve())]
        words += ["--reference", str(options.reference.resolve()), "--sym", options.sym, "--device", options.device]
        words += ["--diameter", f"{options.diameter:g}", "--initial-resolution", f"{options.initial_resolution:g}"]
        words += ["--out", "verglas"]
        ours = timed(words, folder)
        print(f"verglas refine:     {ours:7.1f} s, mean half FSC {half_fsc(folder / 'verglas/run')[0]:.4f}", flush=True)
        if options.skip_relion:
            return
        table = prepare(ParticleTable.read(options.particles), folder, keep_poses=False, scales=False)
        group = table.groups[0]
        map_ZYX, _ = initial_reference(read_map(options.reference), group.box, group.pixel_size, options.initial_resolution)
        write_map(folder / "reference.mrc", Map(map_ZYX.float().numpy(), group.pixel_size))
        (folder / "relion").mkdir()
        theirs = timed(relion_words(options), folder)
        print(f"relion_refine_mpi:  {theirs:7.1f} s, mean half FSC {half_fsc(folder / 'relion/run')[0]:.4f}")
        print(f"ratio:              {theirs / ours:7.1f}")


if __name__ == "__main__":
    main()
