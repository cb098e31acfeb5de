"""First models of sets with known truth: `python -m benchmarks.abinitio_sets --models DIR [--betagal STAR] [NAMES]`.

DIR of models: 6wg6_C1.npz, 5a1a_D2.npz, 1oel_C7.npz, 6z6u_O.npz. For each set and seed it simulates 1,000 x 64 px at SNR 0.05,
searches first models from a random start, lays the map on the truth in either hand, and prints the correlation at 20 Å, where
the FSC with the truth falls below 0.5, how much restarts agree (`--restarts`), and the seconds. STAR: all real
beta-galactosidase particles, junk included (particles_2374_ctf_fixed.star): the search gets those that `verglas classify2d`
keeps at its defaults; truth is 5A1A. The last lines count the runs that reach 0.9.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.simulated import simulated
from verglas.cli.abinitio_maps import consistency_of, place_on_axes
from verglas.core.shells import fsc
from verglas.io.mrc import read_map
from verglas.maximization.reference import low_pass
from verglas.particles.table import ParticleTable
from verglas.postprocess.align import align, turned
from verglas.postprocess.mapops import flip_hand
from verglas.refinement import abinitio
from verglas.refinement.abinitio_schedule import Stage, stage_of
from verglas.refinement.config import AbInitioConfig

JUDGED, GOOD = 20.0, 0.9  # Å, correlation
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
        truth = simulated(options.work / "5a1a", str(options.models / "5a1a_D2.npz"), 10, 64, 3.54, ())
        yield Case("betagal", selected(options), truth / "truth.mrc", "D2", 200.0)


def selected(options: argparse.Namespace) -> Path:
    """The real particles that 2-D classification keeps by itself."""
    out = options.work / "betagal_2d"
    if not (out / "particles_selected.star").exists():
        words = ["--particles", str(options.betagal), "--diameter", "200", "--device", options.device, "--out", str(out)]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "verglas", "classify2d", *words, "--overwrite"], check=True, capture_output=True)
        print(f"2-D classification: {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"{len(ParticleTable.read(out / 'particles_selected.star'))} real particles kept", flush=True)
    return out / "particles_selected.star"


def judged(map_ZYX: Tensor, truth_ZYX: Tensor, pixel_size: float, device: str = "cpu") -> tuple[float, bool, float]:
    """(correlation at 20 Å, whether mirrored, Å at which the FSC first falls below 0.5) of a map laid on the truth; device:
    where rotations are searched."""
    coarse = [low_pass(one, JUDGED, pixel_size).to(device) for one in (map_ZYX, truth_ZYX)]
    found = align(*coarse, either_hand=True)
    own_ZYX = flip_hand(map_ZYX) if found.mirrored else map_ZYX
    laid_ZYX = turned(own_ZYX, found.rotation_33[None], found.shift_3[None])[0]
    low = (fsc(laid_ZYX, truth_ZYX) < 0.5).nonzero()
    shell = int(low[0]) if len(low) else len(truth_ZYX) // 2
    return found.correlation, found.mirrored, len(truth_ZYX) * pixel_size / shell


def searched(case: Case, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """One search, judged."""
    table, truth = ParticleTable.read(case.particles), read_map(case.truth)
    config = AbInitioConfig(diameter=case.diameter, symmetry=case.symmetry, seed=seed, restarts=options.restarts)
    wall, agreement = time.perf_counter(), None
    session = abinitio.prepare(table, config, options.device, options.threads)
    for last in abinitio.iterations(session, place=place_on_axes):
        if stage_of(last.state.iteration, config) is Stage.COMPARE:
            agreement = round(consistency_of(last.state, config.classes), 3)
    wall = time.perf_counter() - wall
    map_ZYX = last.state.halves[0].map_ZYX.cpu()
    correlation, mirrored, below = judged(map_ZYX, torch.tensor(truth.data_ZYX), last.state.pixel_size, options.device)
    return {"set": case.name, "seed": seed, "correlation": round(correlation, 3), "mirrored": mirrored,
            "FSC 0.5 Å": round(below, 1), "restarts agree": agreement, "wall s": round(wall, 1)}  # fmt: skip


def main() -> None:
    """Run the chosen sets and print a line for each seed; records as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="C1, D2, C7, O, betagal (default: all)")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--betagal", type=Path, help="STAR file of all real particles")
    parser.add_argument("--restarts", type=int, default=AbInitioConfig.restarts)
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
    for name in dict.fromkeys(one["set"] for one in records):
        found = [float(str(one["correlation"])) for one in records if one["set"] == name]
        print(f"{name}: {sum(one >= GOOD for one in found)} of {len(found)} at {GOOD:g} or more, worst {min(found):.3f}")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
