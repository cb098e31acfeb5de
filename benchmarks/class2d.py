"""2-D classification: what its selection is worth on simulated picks and on real ones, and speed on a GPU.

    python -m benchmarks.class2d simulated --models DIR --work DIR [NAMES]
    python -m benchmarks.class2d real --data DIR [--seed 0] [--iterations 25] [--work DIR]
    python -m benchmarks.class2d gpu --model 6wg6_C1.npz --work DIR [--out FIGURES.json]

simulated: sets of `picked_sets`, whose truth is known; rules and limits of the selection are chosen on these.
real: the beta-galactosidase set against the list that a published refinement kept; DIR holds particles_2374_ctf_fixed.star,
particles_1391_no_poses.star (read by the last print only) and Class2D/job010, another program's classification of the same
particles, which is judged by the same print: its classes taken in the order that is best for it. gpu: 100,000 x 128 px, K=200,
25 iterations, whole process of `verglas classify2d`; with the true poses, how far the views of a class lie apart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import publish
from benchmarks.picked_sets import SETS, made
from benchmarks.refinement_run import finished
from benchmarks.simulated import AS_RELION, simulated
from verglas.cli.classify2d_run import Classification2d, Classify2dJob
from verglas.core.rotations import matrix_from_euler
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import read_map
from verglas.io.star import read_star
from verglas.particles.table import ParticleTable
from verglas.postprocess.find_symmetry import find_symmetry
from verglas.refinement.config import Classify2dConfig

MODES: dict[str, tuple[str, ...]] = {"EM": ("--em",), "gradient": ("--gradient",)}  # how they are asked for
RECALL = 0.85  # at which the classes of another program are judged


def figures(chosen_B: np.ndarray, kept_B: np.ndarray) -> str:
    """Recall and precision of a selection in words."""
    both = (chosen_B & kept_B).sum()
    return f"{chosen_B.sum()} selected, recall {both / kept_B.sum():.3f}, precision {both / max(chosen_B.sum(), 1):.3f}"


def kept_by_others(table: ParticleTable, data: Path, name: str = "particles_1391_no_poses.star") -> np.ndarray:
    """Which rows of `table` are in the published list, bool [B]."""
    return table.frame["rlnImageName"].isin(set(ParticleTable.read(data / name).frame["rlnImageName"])).to_numpy()


def best_of_classes(class_B: np.ndarray, kept_B: np.ndarray) -> np.ndarray:
    """The selection of whole classes with the best precision at `RECALL`: those with the largest share of the list first."""
    count, kept = np.bincount(class_B), np.bincount(class_B, kept_B)
    order = np.argsort(-kept / np.maximum(count, 1), kind="stable")
    needed = int(np.searchsorted(kept[order].cumsum(), RECALL * kept_B.sum())) + 1
    return np.isin(class_B, order[:needed])


def simulated_picks(options: argparse.Namespace) -> None:
    """Classify simulated picks at the defaults and print recall and precision of the selection."""
    for wanted in SETS:
        if options.names and wanted.name not in options.names:
            continue
        particles, kind_B = made(wanted, options.models, options.work)
        config = Classify2dConfig(diameter=wanted.diameter, classes=wanted.classes, seed=options.seed)
        out = particles.parent / "class2d"
        job = Classify2dJob(particles=particles, config=config, out=out, overwrite=True, device=options.device)
        begin, run = time.perf_counter(), Classification2d(job)
        run.finish()
        true_B = kind_B == 0
        print(f"{wanted.name}: {len(kind_B)} picks, {true_B.mean():.3f} particles, {time.perf_counter() - begin:.0f} s")
        show(run, true_B)


def show(run: Classification2d, true_B: np.ndarray) -> None:
    """Print what was selected, and what its classes would have allowed."""
    state = run.last_state
    chosen_B = np.zeros(len(true_B), bool)
    chosen_B[run.selected_rows(state)] = True
    print(f"    own selection       {figures(chosen_B, true_B)}")
    print(f"    best of its classes {figures(best_of_classes(state.poses.class_B.numpy(), true_B), true_B)}", flush=True)


def real(options: argparse.Namespace) -> None:
    """Classify the real particles at the defaults and print recall and precision of the selection."""
    source = options.data / "particles_2374_ctf_fixed.star"
    config = Classify2dConfig(diameter=200, max_iterations=options.iterations, seed=options.seed)
    job = Classify2dJob(particles=source, config=config, out=options.work, overwrite=True, device=options.device)
    begin, run = time.perf_counter(), Classification2d(job)
    run.finish()
    seconds = time.perf_counter() - begin
    print(f"verglas, K={config.classes}, seed {options.seed}, {seconds:.0f} s")
    show(run, kept_by_others(ParticleTable.read(source), options.data))
    other = ParticleTable.read(options.data / "Class2D/job010/run_it025_data.star", options.data)
    other_kept_B = kept_by_others(other, options.data)
    other_class_B = other.frame["rlnClassNumber"].to_numpy(int)
    print(f"job010, best of its classes {figures(best_of_classes(other_class_B, other_kept_B), other_kept_B)}")


def gpu(options: argparse.Namespace) -> None:
    """Time whole classifications of 100,000 particles into 200 classes, and judge them."""
    device = "cuda" if options.device == "auto" else options.device
    words = (*AS_RELION, "--method", "slices", "--float16", "--device", device)
    data = simulated(options.work / "set128", str(options.model), options.particles, 128, 2.6, words)
    figures, mates_G33 = {}, mates(data / "truth.mrc")
    for mode in options.modes:
        out = options.work / mode
        asked = ("--classes", str(options.classes), "--diameter", "240", "--seed", str(options.seed), "--device", device)
        run = finished(out, ("classify2d", "--particles", str(data / "particles.star"), *asked, *MODES[mode]))
        for one in run.iterations:
            took = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in one["took"].items())
            print(f"  {one['iteration']:2d}: {took} s; {one['seen']:,} particles, {len(one['averages'])} classes, "
                  f"{one['current_size']} px, {one['resolution']:.1f} Å, Pmax {one['pmax']:.2f}")  # fmt: skip
        last = len(run.iterations)
        found = {"whole s": run.seconds, "iterations": last, **run.stages(), **judged(out, last, data / "truth.star", mates_G33)}
        figures |= {f"{mode} {name}": value for name, value in found.items()}
    publish(figures, options.out)


def judged(out: Path, last: int, truth: Path, mates_G33: np.ndarray) -> dict[str, float]:
    """Figures of a classification's last iteration: how far views lie apart within classes, number of classes with particles, and
    the classes' resolutions (median over particles)."""
    found, true = (ParticleTable.read(path).frame for path in (out / f"run_it{last:03d}_data.star", truth))
    class_B = found["rlnClassNumber"].to_numpy(int) - 1
    angles = (torch.tensor(true[f"rlnAngle{name}"].to_numpy(float)) for name in ("Rot", "Tilt", "Psi"))
    view_B3 = matrix_from_euler(*angles)[:, 2].numpy()
    model = read_star(out / f"run_it{last:03d}_model.star")["model_classes"].frame
    resolution_C = model["rlnEstimatedResolution"].to_numpy(float)
    return {
        "view spread degrees": view_spread(class_B, view_B3, mates_G33), "classes": float(len(np.unique(class_B))),
        "resolution Å": float(np.median(resolution_C[class_B])),
    }  # fmt: skip


def view_spread(class_B: np.ndarray, view_B3: np.ndarray, mates_G33: np.ndarray) -> float:
    """Median angle (degrees) between the viewing directions of two particles of a class (each and the next one), the smallest
    over the mates that the model's symmetry gives a view."""
    order = np.lexsort((np.arange(len(class_B)), class_B))
    first, second = order[:-1], order[1:]
    both = class_B[first] == class_B[second]
    cosine_GP = np.einsum("pi,gij,pj->gp", view_B3[first[both]], mates_G33, view_B3[second[both]])
    return float(np.median(np.rad2deg(np.arccos(cosine_GP.max(0).clip(-1, 1)))))


def mates(truth: Path) -> np.ndarray:
    """Turns that leave a map as it is, as far as classes can tell (nearly symmetric counts) [G, 3, 3]."""
    read = read_map(truth)
    found = find_symmetry(torch.tensor(read.data_ZYX), read.pixel_size).best
    axes_33 = found.rotation_33
    print(f"point group of the model, as far as 15 Å can tell: {found.name}")
    return (axes_33.T @ symmetry_matrices(found.name) @ axes_33).numpy()


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulated", "real", "gpu"))
    parser.add_argument("names", nargs="*", help="of simulated sets (default: all)")
    parser.add_argument("--models", type=Path, help="folder of the simulated sets' molecules")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("class2d"))
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    {"simulated": simulated_picks, "real": real, "gpu": gpu}[options.what](options)


if __name__ == "__main__":
    main()
