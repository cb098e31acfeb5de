"""Whether a particle's result depends on the others of its batch: `python -m benchmarks.batches --data DIR --diameter Å`.

Goes through the samplings of a refinement as `benchmarks.scaling` does (one process). Each iteration is done again from the same
state, once as it was and once with batches of a fraction of the size, and compared with the first time: the largest difference
of a shell of the sums, particles with another pose, with another number of significant samples, and of the probability of the
best pose (Pmax) the largest difference. DIR: of `verglas simulate`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.figures import publish
from benchmarks.iteration_kinds import kind_of, pushed
from benchmarks.scaling_rank import Found, compared, iteration, prepared, recorded
from verglas.cli.common import resolve_device, set_threads
from verglas.distributed.ranks import ALONE
from verglas.refinement.driver import Session
from verglas.refinement.state import State


def found_from(session: Session, state: State, divided: float) -> Found:
    """What the iteration after a state finds, with batches of so small a part of the usual size."""
    found: list[Found] = []
    memory = session.on.memory / divided
    with recorded(found):
        iteration(replace(session, on=replace(session.on, memory=memory)), state)
    return found[0]


def differences(one: Found, other: Found) -> dict[str, float]:
    """Of two finds of the same particles."""
    sums, a, b = compared(one, other, ALONE), one.poses, other.poses
    return {
        "sums": max(sums["data"], sums["weight"]), "other poses": round((1 - sums["same poses"]) * len(a.half_B)),
        "other counts": int((a.significant_B != b.significant_B).sum()), "Pmax": float((a.pmax_B - b.pmax_B).abs().max()),
        "Pmax, rms": float((a.pmax_B - b.pmax_B).square().mean().sqrt()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--diameter", type=float, required=True)
    parser.add_argument("--divided", type=float, default=3.0, help="the usual size of batches by this")
    parser.add_argument("--most", type=int, default=99, help="iterations")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    set_threads(None)
    device, _ = resolve_device(options.device, None)
    session, figures = prepared(options, device, ALONE, 1), dict[str, float]()
    state, number = session.state, 0
    while not state.solved and number < options.most:
        first = found_from(session, state, 1.0)
        for name, divided in (("again", 1.0), ("smaller batches", options.divided)):
            for what, value in differences(found_from(session, state, divided), first).items():
                figures[f"iteration {number}, {name}, {what}"] = value
        done = iteration(session, state)[1]
        shown = "  ".join(f"{value:9.2g}" for key, value in figures.items() if key.startswith(f"iteration {number},"))
        print(f"{number:3d} {kind_of(done)[0]:17s} {done.state.current_size:4d} px  {shown}", flush=True)
        state, number = pushed(done.state, done.state.iteration > 1), number + 1
    figures["particles"] = len(session.data)
    if device.type == "cuda":
        figures["GB at most"] = torch.cuda.max_memory_allocated() / 1e9
    publish(figures, options.out)


if __name__ == "__main__":
    main()
