"""How particles are shared among ranks of different speeds, without computing anything:
`torchrun --standalone --nproc-per-node 8 -m benchmarks.shared_work [--speeds 1 1 1 1 1 1 1 0.5] [--before 4]`.

Each rank takes blocks as an expectation does (two half-sets an iteration, which ranks have apart, and what happens between
iterations), and sleeps for as long as a block would take: (fixed + rows x seconds) / speed; at first (--before iterations) all
have speed 1. So what is measured is the sharing: store, order, sizes of blocks, waiting; and as many ranks as one likes fit on a
few cores. Printed: seconds of each iteration relative to ranks that never wait and have blocks of the largest size.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.figures import publish
from verglas.cli.common import ranks_here
from verglas.distributed.handout import Handout
from verglas.distributed.ranks import Ranks
from verglas.distributed.shares import Shares


def iteration(shares: Shares, ranks: Ranks, speed: float, options: argparse.Namespace) -> float:
    """Seconds until all ranks are done with both half-sets."""
    begin, samples_B, turn = time.perf_counter(), torch.zeros(options.particles), next(ranks.sequence)
    shares.follow(samples_B)
    sets = [(shares.set_B == number).nonzero().squeeze(1) for number in (0, 1)]
    for number, helps in shares.turns(sets):
        handout = Handout(sets[number], shares, samples_B, name=f"{turn}.{number}", helps=helps)
        for block in handout.blocks(handout.best(options.size)):
            time.sleep((options.fixed + options.seconds * len(block)) / speed)
    ranks.meet("expectation")
    return time.perf_counter() - begin


def main() -> None:
    """Share, print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.5])
    sizes = {"particles": 16000, "size": 500, "iterations": 4, "seconds": 2e-3, "fixed": 5e-2, "before": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    whole = options.particles * (options.seconds + options.fixed / options.size)
    with ranks_here("cpu") as (ranks, _, _):
        assert ranks.size == len(options.speeds), "one speed for every rank"
        half_B = torch.arange(options.particles) % 2
        shares, found = Shares(torch.arange(options.particles), half_B, ranks, half_B), list[float]()
        for number in range(options.before + options.iterations):
            speeds = options.speeds if number >= options.before else [1.0] * ranks.size
            found.append(iteration(shares, ranks, speeds[ranks.rank], options) * sum(speeds) / whole)
        if ranks.is_lead:
            print(f"{ranks.size} ranks of speeds {options.speeds}, ideal {whole / sum(options.speeds):.2f} s")
            publish({f"iteration {number} relative to the ideal": one for number, one in enumerate(found, 1)}, options.out)


if __name__ == "__main__":
    main()
