"""Auto-refinement of simulated sets with known truth: `python -m benchmarks.refine_sets --tools DIR --models DIR [NAMES]`.

DIR of tools: simulate_particles.py and judge.py; models: 5a1a_D2.npz, 1oel_C7.npz, 6z6u_O.npz, 6wg6_C1.npz. For each set
(D2, C7, O; C1 plain, with 20 % junk, with preferred views; three seeds each) it simulates, refines from the truth
low-passed to 40 Å, and prints time, resolution, mean FSC with the truth, and pose errors as the judge sees them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import verglas


@dataclass(frozen=True)
class Set:
    """A simulated set: model file, words for the simulator, point group, diameter in Å."""

    name: str
    model: str
    words: str
    symmetry: str
    diameter: float


def sets() -> list[Set]:
    """All sets, three seeds each."""
    found = [Set(f"D2_{s}", "5a1a_D2", f"--box 64 --apix 3.5 --n 1000 --snr 0.05 --seed {s}", "D2", 210) for s in (105, 205, 305)]
    found += [
        Set(f"C7_{s}", "1oel_C7", f"--box 64 --apix 3.0 --n 1000 --snr 0.05 --seed {s}", "C7", 180) for s in (106, 206, 306)
    ]
    found += [Set(f"O_{s}", "6z6u_O", f"--box 64 --apix 2.6 --n 600 --snr 0.05 --seed {s}", "O", 150) for s in (107, 207, 307)]
    for kind, extra in (("plain", ""), ("junk", " --junk 0.2"), ("pref", " --pref 0.8")):
        words = "--box 64 --apix 4.5 --n 1000 --snr 0.1"
        found += [Set(f"C1{kind}_{s}", "6wg6_C1", f"{words} --seed {s}{extra}", "C1", 240) for s in (1, 2, 3)]
    return found


def refine(one: Set, options: argparse.Namespace) -> dict[str, object]:
    """Simulate, refine and judge one set."""
    folder = options.work / one.name
    if not (folder / "truth.mrc").exists():
        simulator = [sys.executable, options.tools / "simulate_particles.py", options.models / f"{one.model}.npz", folder]
        subprocess.run([*map(str, simulator), *one.words.split()], check=True, stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    run = verglas.refine(
        folder / "particles.star", folder / "start40.mrc", out=folder / "refine", device=options.device, overwrite=True,
        symmetry=one.symmetry, diameter=one.diameter, initial_resolution=40.0,
    )  # fmt: skip
    result = run.run()
    seconds = time.perf_counter() - start
    out = folder / "refine"
    words = ["--map", out / "run_class001.mrc", "--truth", folder / "truth.mrc", "--sym", one.symmetry]
    words += ["--data", out / "run_data.star", "--truthstar", folder / "truth.star"]
    text = subprocess.run(
        [sys.executable, str(options.tools / "judge.py"), *map(str, words)], capture_output=True, text=True
    ).stdout
    truth = re.search(r"map: FSC-truth 0.5 at ([\d.]+).*mean FSC ([\d.]+)", text)
    poses = re.search(r"median ([\d.]+) deg, p90 ([\d.]+).*shift median ([\d.]+)", text)
    if truth is None or poses is None:
        raise RuntimeError(f"the judge of {one.name} says: {text}")
    state = result.state
    return {
        "set": one.name, "seconds": round(seconds, 1), "iterations": state.iteration,
        "resolution": round(result.resolution, 2), "truth 0.5": float(truth[1]),
        "mean FSC": float(truth[2]), "pose median": float(poses[1]), "pose p90": float(poses[2]), "shift": float(poses[3]),
    }  # fmt: skip


def main() -> None:
    """Run the chosen sets and print a table; records as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="sets whose name begins so (default: all)")
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("refine_sets"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records = []
    for one in sets():
        if not options.names or any(one.name.startswith(name) for name in options.names):
            records.append(refine(one, options))
            print("  ".join(f"{key} {value}" for key, value in records[-1].items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
