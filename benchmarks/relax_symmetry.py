"""Broken symmetry: `python -m benchmarks.relax_symmetry --model 5a1a_D2.npz --work DIR [--relion]`.

Beta-galactosidase (D2) without residues 737 to 1023 of one of its four chains, 64 px of 3.54 Å. Particles come with poses as a
refinement in D2 gives them: one of the four mates of the right pose, by chance, 2 degrees off. `verglas refine` in C1 from two
maps at 30 Å, that of the truth and that of the whole, symmetric molecule: with --relax-sym D2, and with local searches alone.
Prints which share of the poses ends nearest to each mate of the truth, the right one first, and the FSC of map and truth.

`--relion` compares one iteration with `relion_refine --relax_sym` at the same grid, from the map of the truth.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.classify3d_sets import ATOMS_OF_CHAIN, BOX, DIAMETER, FIRST_CUT, LAST_CUT, PIXEL
from benchmarks.figures import publish
from benchmarks.refinement_run import mean_fsc
from benchmarks.relion_iteration import prepare
from benchmarks.simulated import simulated
from verglas.core.rotations import angular_distance, euler_from_matrix, matrix_from_euler
from verglas.core.symmetry import symmetry_matrices
from verglas.particles.table import ParticleTable

GROUP, ERROR = "D2", 2.0  # degrees


def without_one_domain(model: Path, folder: Path) -> Path:
    """The molecule without these residues of its first chain, as a file in `folder`."""
    with np.load(model) as whole:
        xyz_N3, weight_N = whole["xyz"], whole["w"]
    at_N = np.arange(len(weight_N))
    kept_N = (at_N < FIRST_CUT) | (at_N > LAST_CUT)
    assert at_N[~kept_N].max() < ATOMS_OF_CHAIN
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "broken.npz", xyz=xyz_N3[kept_N], w=weight_N[kept_N])
    return folder / "broken.npz"


def poses_but_for_a_mate(truth: ParticleTable, seed: int) -> ParticleTable:
    """The particles with poses as a refinement with the symmetry would give them."""
    draw, n = torch.Generator().manual_seed(seed), len(truth)
    drawn_B33 = symmetry_matrices(GROUP)[torch.randint(4, (n,), generator=draw)]
    off_B33 = matrix_from_euler(*(ERROR * torch.randn(3, n, generator=draw, dtype=torch.float64)))
    rot_B, tilt_B, psi_B = euler_from_matrix(off_B33 @ truth.rotations() @ drawn_B33).T.numpy()
    frame = truth.frame.assign(rlnAngleRot=rot_B, rlnAngleTilt=tilt_B, rlnAnglePsi=psi_B)
    return replace(truth, frame=frame.drop(columns=["rlnClassNumber"], errors="ignore"))


def nearest_mates(found: ParticleTable, truth: ParticleTable) -> Tensor:
    """Share of the poses that are nearest to each mate of the truth, the right one first, [4]. In a map from a symmetric start,
    any of the four may stand for the truth."""
    row_of = {name: row for row, name in enumerate(truth.frame["rlnImageName"].astype(str).str.partition("@")[0])}
    rows = [row_of[name] for name in found.frame["rlnImageName"].astype(str).str.partition("@")[0]]
    mates_BG33 = truth.rotations()[rows, None] @ symmetry_matrices(GROUP)
    nearest_B = angular_distance(found.rotations()[:, None], mates_BG33).argmin(1)
    return torch.bincount(nearest_B, minlength=4).double() / len(rows)


def refined(out: Path, data: Path, reference: Path, words: list[str]) -> float:
    """Run `verglas refine`; seconds. SystemExit with its last words if it fails."""
    command = [sys.executable, "-m", "verglas", "refine", "--particles", str(data / "symmetric_poses.star"), "--reference",
               str(reference), "--diameter", f"{DIAMETER:g}", "--initial-resolution", "30", "--overwrite", "--out", str(out),
               *words]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"verglas refine failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begin


def measured(data: Path, whole: Path, options: argparse.Namespace) -> dict[str, float]:
    """All refinements."""
    truth, found = ParticleTable.read(data / "truth.star"), {}
    for start, reference in (("truth", data / "start.mrc"), ("symmetric", whole / "start.mrc")):
        for name, words in (("relaxed", ["--relax-sym", GROUP]), ("local", ["--healpix-order", "4"])):
            out = data / f"{start}_{name}"
            seconds = refined(out, data, reference, [*words, "--max-iterations", str(options.iterations)])
            shares_G = nearest_mates(ParticleTable.read(out / "run_data.star"), truth)
            quality = mean_fsc(out / "run_class001.mrc", data / "truth.mrc", turned=True)
            print(f"{start} start, {name}: {seconds:.0f} s, poses near each mate {[round(x, 3) for x in shares_G.tolist()]}, "
                  f"mean FSC {quality:.3f}", flush=True)  # fmt: skip
            found |= {f"{start} start, {name}: right": float(shares_G.max()), f"{start} start, {name}: mean FSC": quality,
                      f"{start} start, {name}: s": seconds}  # fmt: skip
    return found


def beside_relion(data: Path, options: argparse.Namespace) -> dict[str, float]:
    """One iteration at order 3 of both programs from the truth at 30 Å."""
    folder, truth = data / "relion", ParticleTable.read(data / "truth.star")
    folder.mkdir(exist_ok=True)
    prepare(ParticleTable.read(data / "symmetric_poses.star"), folder, keep_poses=True, scales=False)
    command = ["relion_refine", "--i", "particles.star", "--ref", str((data / "start.mrc").resolve()), "--o", "./run", "--ctf",
               "--ctf_corrected_ref", "--zero_mask", "--flatten_solvent", "--ini_high", "30", "--iter", "1", "--tau2_fudge", "4",
               "--particle_diameter", f"{DIAMETER:g}", "--sym", "C1", "--relax_sym", GROUP, "--healpix_order", "3",
               "--sigma_ang", "7.5", "--offset_range", "5", "--offset_step", "2", "--oversampling", "1", "--pad", "2",
               "--firstiter_cc", "--norm", "--perturb", "0", "--j", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"relion_refine failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    words = ["classify3d", "--particles", str(folder / "particles.star"), "--reference", str(data / "start.mrc"), "--diameter",
             f"{DIAMETER:g}", "--initial-resolution", "30", "--iterations", "1", "--relax-sym", GROUP, "--healpix-order", "3",
             "--local-search", "7.5", "--overwrite", "--out", str(folder / "verglas")]  # fmt: skip
    subprocess.run([sys.executable, "-m", "verglas", *words], check=True, capture_output=True)
    found = {}
    for name, path in (("relion", folder / "run_it001_data.star"), ("verglas", folder / "verglas/run_it001_data.star")):
        shares_G = nearest_mates(ParticleTable.read(path), truth)
        print(f"one iteration, {name}: poses near each mate {[round(x, 3) for x in shares_G.tolist()]}")
        found[f"one iteration, {name}: right"] = float(shares_G[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--relion", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    common = ("--snr", f"{options.snr:g}", "--no-recentre")
    broken = without_one_domain(options.model, options.work)
    data = simulated(options.work / "broken", str(broken), options.n, BOX, PIXEL, common)
    whole = simulated(options.work / "whole", str(options.model), 50, BOX, PIXEL, common)
    poses_but_for_a_mate(ParticleTable.read(data / "truth.star"), 1).write(data / "symmetric_poses.star", overwrite=True)
    found = beside_relion(data, options) if options.relion else {}
    publish(found | measured(data, whole, options), options.out)


if __name__ == "__main__":
    main()
