"""2-D classification: the real beta-galactosidase set against the list that a published refinement kept, and speed on a GPU.

    python -m benchmarks.class2d real --data DIR [--seed 0] [--iterations 25] [--work DIR]
    python -m benchmarks.class2d gpu --model 6wg6_C1.npz --work DIR [--seconds 30]

real: DIR holds particles_2374_ctf_fixed.star, particles_1391_no_poses.star (read by the last print only) and Class2D/job010,
another program's classification of the same particles, which is judged by the same print: its classes taken in the order that is
best for it. gpu: 100,000 x 128 px (5,000 simulated ones, each twenty times), K=200; iterations until the seconds are over, and
what 25 would take.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.simulated import AS_RELION, simulated
from verglas.cli.classify2d_run import Classification2d, Classify2dJob
from verglas.particles.table import ParticleTable
from verglas.refinement import classify2d
from verglas.refinement.config import Classify2dConfig

SIMULATED = 5_000  # images, used again and again
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


def real(options: argparse.Namespace) -> None:
    """Classify the real particles at the defaults and print recall and precision of the selection."""
    source = options.data / "particles_2374_ctf_fixed.star"
    config = Classify2dConfig(diameter=200, max_iterations=options.iterations, seed=options.seed)
    job = Classify2dJob(particles=source, config=config, out=options.work, overwrite=True, device=options.device)
    begin, run = time.perf_counter(), Classification2d(job)
    run.finish()
    seconds = time.perf_counter() - begin
    table, chosen = ParticleTable.read(source), run.selected()
    state = run.last_state
    chosen_B = np.zeros(len(table), bool)
    chosen_B[run.selected_rows(state)] = True
    kept_B = kept_by_others(table, options.data)
    print(f"verglas, K={config.classes}, seed {options.seed}, {seconds:.0f} s: {len(chosen)} particles")
    print(f"    own selection       {figures(chosen_B, kept_B)}")
    print(f"    best of its classes {figures(best_of_classes(state.poses.class_B.numpy(), kept_B), kept_B)}")
    other = ParticleTable.read(options.data / "Class2D/job010/run_it025_data.star", options.data)
    other_kept_B = kept_by_others(other, options.data)
    other_class_B = other.frame["rlnClassNumber"].to_numpy(int)
    print(f"job010, best of its classes {figures(best_of_classes(other_class_B, other_kept_B), other_kept_B)}")


def gpu(options: argparse.Namespace) -> None:
    """Time iterations of 100,000 particles against 200 classes."""
    folder = simulated(options.work / "set128", str(options.model), SIMULATED, 128, 2.6, (*AS_RELION, "--method", "slices"))
    table = ParticleTable.read(folder / "particles.star")
    table = table.select(np.tile(np.arange(len(table)), options.particles // len(table)))
    config = Classify2dConfig(diameter=240, classes=options.classes, seed=options.seed)
    begin = time.perf_counter()
    session = classify2d.prepare(table, config, "cuda" if options.device == "auto" else options.device)
    print(f"prepared {len(table)} in {time.perf_counter() - begin:.1f} s", flush=True)
    begin, taken = time.perf_counter(), []
    for done in classify2d.iterations(session):
        taken.append(sum(done.seconds.values()))
        poses = done.state.poses
        stages = ", ".join(f"{name} {value:.2f}" for name, value in done.seconds.items())
        print(f"{done.state.iteration:2d}: {stages} s; size {done.state.current_size} px, {done.state.current_resolution:.1f} Å, "
              f"{poses.significant_B.double().mean():.0f} significant, Pmax {poses.pmax_B.mean():.2f}, "
              f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)  # fmt: skip
        if time.perf_counter() - begin > options.seconds:
            break
    left = config.max_iterations - len(taken)
    print(f"25 iterations: {sum(taken) + left * taken[-1]:.0f} s ({left} of them taken to be like the last)")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "gpu"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("class2d"))
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    {"real": real, "gpu": gpu}[options.what](options)


if __name__ == "__main__":
    main()
