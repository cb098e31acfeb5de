"""A whole refinement that takes seconds on two cores: `python -m benchmarks.refine_small [--work DIR] [--out FIGURES.json]`.

300 images of 32 px of the built-in molecule: says from commit to commit whether the CPU path became faster,
and whether the map is still as good (mean FSC with the truth, unmasked).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.figures import publish
from benchmarks.refinement_run import mean_fsc, refined
from benchmarks.simulated import simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        data = simulated(work / "small", "demo", 300, 32, 6.0, ("--snr", "0.3"))
        run = refined(work / "refined", data / "particles.star", data / "start.mrc",
                      ["--diameter", "150", "--initial-resolution", "40", "--device", "cpu"])  # fmt: skip
        quality = mean_fsc(work / "refined" / "run_class001.mrc", data / "truth.mrc")
        publish({"whole s": run.seconds, **run.stages(), "iterations": len(run.iterations), "mean FSC": quality}, options.out)


if __name__ == "__main__":
    main()
