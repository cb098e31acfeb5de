"""First models of sets with known truth: `python -m benchmarks.abinitio_sets --models DIR [--betagal DIR] [NAMES]`.

DIR of models: 6wg6_C1.npz, 5a1a_D2.npz, 1oel_C7.npz, 6z6u_O.npz; of betagal: particles_1391_no_poses.star. For each
set and seed it simulates 1,000 x 64 px at SNR 0.05, searches first models from a random start,
lays the map on the truth in either hand, and prints the correlation at 20 Å, where the FSC with the truth falls below 0.5, and
the CPU's seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.simulated import simulated
from verglas.cli.abinitio_run import place_on_axes
from verglas.core.shells import fsc
from verglas.io.mrc import read_map
from verglas.maximization.reference import low_pass
from verglas.particles.table import ParticleTable
from verglas.postprocess.align import align, turned
from verglas.postprocess.mapops import flip_hand
from verglas.refinement import abinitio
from verglas.refinement.config import AbInitioConfig

JUDGED = 20.0  # Å
SETS = {"C1": ("6wg6_C1", 4.5, 240.0), "D2": ("5a1a_D2", 3.5, 210.0), "C7": ("1oel_C7", 3.0, 180.0), "O": ("6z6u_O", 2.6, 150.0)}


@dataclass(frozen=True)
class Case:
    """Particles, truth, point group, diameter in Å."""

    name: str
    particles: Path
    truth: Path
    symmetry: str
    diameter: float


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All that can be had, simulated where they are not there."""
    for symmetry, (model, pixel, diameter) in SETS.items():
        if not options.names or symmetry in options.names:
            file = str(options.models / f"{model}.npz")
            folder = simulated(options.work / symmetry, file, 1000, 64, pixel, ("--snr", "0.05"))
            yield Case(symmetry, folder / "particles.star", folder / "truth.mrc", symmetry, diameter)
    if options.betagal and (not options.names or "betagal" in options.names):
        star = options.betagal / "particles_1391_no_poses.star"
        yield Case("betagal", star, options.betagal_truth, "D2", 200.0)


def judged(map_ZYX: Tensor, truth_ZYX: Tensor, pixel_size: float) -> tuple[float, bool, float]:
    """(correlation at 20 Å, whether mirrored, Å at which the FSC first falls below 0.5) of a map laid on the truth."""
    coarse = [low_pass(one, JUDGED, pixel_size) for one in (map_ZYX, truth_ZYX)]
    found = align(*coarse, either_hand=True)
    own_ZYX = flip_hand(map_ZYX) if found.mirrored else map_ZYX
    laid_ZYX = turned(own_ZYX, found.rotation_33[None], found.shift_3[None])[0]
    low = (fsc(laid_ZYX, truth_ZYX) < 0.5).nonzero()
    shell = int(low[0]) if len(low) else len(truth_ZYX) // 2
    return found.correlation, found.mirrored, len(truth_ZYX) * pixel_size / shell


def searched(case: Case, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """One search, judged."""
    table, truth = ParticleTable.read(case.particles), read_map(case.truth)
    config = AbInitioConfig(diameter=case.diameter, symmetry=case.symmetry, seed=seed)
    wall, cpu = time.perf_counter(), time.process_time()
    session = abinitio.prepare(table, config, options.device, options.threads)
    *_, last = abinitio.iterations(session, place=place_on_axes)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    map_ZYX = last.state.halves[0].map_ZYX.cpu()
    correlation, mirrored, below = judged(map_ZYX, torch.tensor(truth.data_ZYX), last.state.pixel_size)
    return {"set": case.name, "seed": seed, "correlation": round(correlation, 3), "mirrored": mirrored,
            "FSC 0.5 Å": round(below, 1), "wall s": round(wall, 1), "CPU s": round(cpu, 1)}  # fmt: skip


def main() -> None:
    """Run the chosen sets and print a line for each seed; records as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="C1, D2, C7, O, betagal (default: all)")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--betagal", type=Path, help="folder of the real particles")
    parser.add_argument("--betagal-truth", type=Path, help="map of 5A1A on their grid")
    parser.add_argument("--work", type=Path, default=Path("abinitio_sets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records = []
    for case in cases(options):
        for seed in options.seeds:
            records.append(searched(case, seed, options))
            print("  ".join(f"{key} {value}" for key, value in records[-1].items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
