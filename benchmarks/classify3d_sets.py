"""3-D classification of a simulated mixture with junk: `python -m benchmarks.classify3d_sets --model 5a1a_D2.npz --work DIR`.

Beta-galactosidase, whole and without residues 737 to 1023 of all four chains, 2:1, D2, and 20 % junk (threads of blobs, weak
to strong); 64 px of 3.54 Å, SNR 0.05. From the whole molecule at 40 Å, K = 3, for sets and seeds of the classification:

    accuracy    share of the particles in the class of their molecule; junk: share of it in neither of these two classes
    oracle      accuracy of one comparison with the true maps at the true poses (`--skip-align`, grey values kept)
    ARI         adjusted Rand index of two seeds of the classification on one set, over all images

`--relion` runs relion_refine with the same options on the same images and scores it the same way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.figures import publish
from benchmarks.relion_iteration import prepare
from benchmarks.simulated import AS_RELION, simulated
from verglas.particles.table import ParticleTable

ATOMS_OF_CHAIN, FIRST_CUT, LAST_CUT = 8230, 5898, 8205  # residues 737 to 1023 of a chain, in the order of the file
PIXEL, BOX, DIAMETER, JUNK = 3.54, 64, 200.0, 0.2
CLASSES, RESOLUTION = 3, 50.0


def without_domain(model: Path, folder: Path) -> Path:
    """The molecule without these residues, as a file in `folder`."""
    with np.load(model) as whole:
        xyz_N3, weight_N = whole["xyz"], whole["w"]
    at_N = np.arange(len(weight_N)) % ATOMS_OF_CHAIN
    kept_N = (at_N < FIRST_CUT) | (at_N > LAST_CUT)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cut.npz", xyz=xyz_N3[kept_N], w=weight_N[kept_N])
    return folder / "cut.npz"


def made(options: argparse.Namespace, number: int) -> Path:
    """The set of this seed, simulated unless it is there."""
    cut = without_domain(options.model, options.work)
    mixture = ("--model", str(cut), "--weights", "2", "1", "--junk", f"{JUNK:g}", "--no-recentre")
    words = (*mixture, "--seed", str(number), *AS_RELION)
    return simulated(options.work / f"set{number}_{options.n}", str(options.model), options.n, BOX, PIXEL, words)


def classified(out: Path, words: list[str]) -> float:
    """Run `verglas classify3d`; seconds of the whole process. SystemExit with its last words if it fails."""
    fixed = ["--diameter", f"{DIAMETER:g}", "--sym", "D2", "--overwrite", "--out", str(out)]
    begin = time.perf_counter()
    command = [sys.executable, "-m", "verglas", "classify3d", *fixed, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"verglas classify3d failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begin


def relion_classified(data: Path, out: Path, options: argparse.Namespace, seed: int) -> float:
    """The same by relion_refine."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    prepare(ParticleTable.read(data / "particles.star"), out, keep_poses=False, scales=False)
    command = [
        "relion_refine", "--i", "particles.star", "--ref", str((data / "start.mrc").resolve()), "--K", str(CLASSES),
        "--firstiter_cc", "--ini_high", f"{RESOLUTION:g}", "--ctf", "--ctf_corrected_ref", "--zero_mask", "--flatten_solvent",
        "--norm", "--scale", "--particle_diameter", f"{DIAMETER:g}", "--sym", "D2", "--healpix_order", "2", "--offset_range", "5",
        "--offset_step", "2", "--oversampling", "1", "--pad", "2", "--tau2_fudge", "4", "--iter", str(options.iterations),
        "--pool", "10", "--dont_combine_weights_via_disc", "--preread_images", "--j", "1", "--random_seed", str(seed),
        "--o", "./run",  # relion_refine wants a folder in it
    ]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"relion_refine failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begin


def classes_in(path: Path) -> np.ndarray:
    """rlnClassNumber of every image, in the order of the set (programs may sort their particles)."""
    frame = ParticleTable.read(path).frame
    number_B = frame["rlnImageName"].astype(str).str.partition("@")[0].astype(int).to_numpy()
    class_B = np.empty(len(frame), int)
    class_B[number_B - 1] = frame["rlnClassNumber"].to_numpy()
    return class_B


def confusion(found_B: np.ndarray, truth_B: np.ndarray) -> np.ndarray:
    """Images of each true class (junk first) in each found one, [3, K]."""
    classes = max(CLASSES, int(found_B.max()))
    return np.array([[((truth_B == i) & (found_B == k)).sum() for k in range(1, classes + 1)] for i in range(3)])


def scored(table: np.ndarray) -> tuple[float, float]:
    """(accuracy, share of the junk outside the two true classes), the found classes named to fit best."""
    pairs = itertools.permutations(range(table.shape[1]), 2)
    whole, cut = max(pairs, key=lambda pair: table[1, pair[0]] + table[2, pair[1]])
    accuracy = (table[1, whole] + table[2, cut]) / table[1:].sum()
    return float(accuracy), float(1 - (table[0, whole] + table[0, cut]) / max(1, table[0].sum()))


def adjusted_rand(a_B: np.ndarray, b_B: np.ndarray) -> float:
    """Agreement of two divisions: 1 the same, 0 as by chance (Hubert and Arabie 1985)."""
    table = np.zeros((a_B.max() + 1, b_B.max() + 1))
    np.add.at(table, (a_B, b_B), 1)

    def pairs(count: np.ndarray) -> float:
        return float((count * (count - 1) / 2).sum())

    together, first, second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    by_chance = first * second / pairs(np.array([len(a_B)]))
    return (together - by_chance) / max(1e-12, (first + second) / 2 - by_chance)


def oracle(data: Path, out: Path, truth_B: np.ndarray, device: str) -> float:
    """Accuracy of the likelihood with everything but the class known."""
    references = [str(data / f"truth_class{k:03d}.mrc") for k in (1, 2)]
    words = ["--particles", str(data / "truth.star"), "--reference", *references, "--skip-align", "--absolute-greyscale",
             "--initial-resolution", f"{2.2 * PIXEL:g}", "--iterations", "1", "--device", device]  # fmt: skip
    classified(out, words)
    found_B = classes_in(out / "run_it001_data.star")
    return float((found_B == truth_B)[truth_B > 0].mean())


def one_run(
    data: Path, name: str, seed: int, truth_B: np.ndarray, options: argparse.Namespace
) -> tuple[dict[str, float], np.ndarray]:
    """Figures of one classification, and the classes found."""
    out = data / f"{name}_{seed}"
    if name == "verglas":
        words = ["--particles", str(data / "particles.star"), "--reference", str(data / "start.mrc"), "--classes", str(CLASSES),
                 "--initial-resolution", f"{RESOLUTION:g}", "--iterations", str(options.iterations), "--seed", str(seed),
                 "--device", options.device, *options.words]  # fmt: skip
        seconds = classified(out, words)
    else:
        seconds = relion_classified(data, out, options, seed)
    found_B = classes_in(out / f"run_it{options.iterations:03d}_data.star")
    table = confusion(found_B, truth_B)
    accuracy, junk = scored(table)
    print(f"{data.name} {name} seed {seed}: accuracy {accuracy:.4f}, junk outside {junk:.3f}, {seconds:.1f} s, {table.tolist()}",
          flush=True)  # fmt: skip
    return {"s": seconds, "accuracy": accuracy, "junk outside": junk}, found_B


def main() -> None:
    """Make the sets, run, score, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="atoms of the whole molecule, 5a1a_D2.npz")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--sets", type=int, nargs="*", default=[1, 2, 3], help="seeds of the simulation")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the classification, all on every set")
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--relion", action="store_true")
    parser.add_argument("--words", type=json.loads, default=[], help="further words of classify3d, a JSON list")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for number in options.sets:
        data = made(options, number)
        truth_B = ParticleTable.read(data / "truth.star").frame["rlnClassNumber"].to_numpy()
        figures[f"set {number} oracle accuracy"] = oracle(data, data / "oracle", truth_B, options.device)
        for name in ("verglas", *(["relion"] if options.relion else [])):
            found: list[np.ndarray] = []
            for seed in options.seeds:
                one, classes_B = one_run(data, name, seed, truth_B, options)
                figures |= {f"set {number} seed {seed} {name} {key}": value for key, value in one.items()}
                found.append(classes_B)
            for (i, a_B), (j, b_B) in itertools.combinations(zip(options.seeds, found), 2):
                figures[f"set {number} seeds {i} {j} {name} ARI"] = adjusted_rand(a_B, b_B)
    publish(figures, options.out)


if __name__ == "__main__":
    main()
