"""How long the program takes to start: `python -m benchmarks.startup [--out FIGURES.json]`. Medians of whole processes."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.figures import publish

PROCESSES = {
    "python alone s": ["-c", "pass"],
    "import verglas s": ["-c", "import verglas"],
    "--help s": ["-m", "verglas", "--help"],
    "refine --help s": ["-m", "verglas", "refine", "--help"],
    "import torch s": ["-c", "import torch"],
    "import verglas.refinement.driver s": ["-c", "import verglas.refinement.driver"],
}


def seconds(words: list[str], turns: int) -> float:
    """Median seconds of a Python process; CalledProcessError if it fails."""
    times = []
    for _ in range(turns):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    publish({name: seconds(words, options.turns) for name, words in PROCESSES.items()}, options.out)


if __name__ == "__main__":
    main()
