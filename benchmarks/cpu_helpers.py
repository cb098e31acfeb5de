"""A GPU with and without a CPU process beside it: `python -m benchmarks.cpu_helpers [--n 20000] [--box 128] [--out FILE.json]`.

Refines a simulated set from one start several times in one process: once so that all is compiled, then by turns without a helper
and with one (as `--cpu-ranks 1`, but it is always started, and knows from the first run how quick it is). Prints seconds of every
iteration's expectation, of whole iterations, and the share of the particles that the CPU took.

--device cpu --rank-threads N: beside a slow rank. --lend N: the helper gets N particles every time and is waited for, to compare
results: how far apart the last half maps are with it and without, beside those of two runs without.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.figures import publish
from verglas.cli.common import resolve_device, set_threads
from verglas.distributed.lending import Lending
from verglas.distributed.ranks import ALONE
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import driver, helpers
from verglas.refinement.config import RefineConfig
from verglas.refinement.driver import Session
from verglas.refinement.helpers import Helpers, threads_beside

Row = tuple[float, float, float, str]


def run(session: Session, helper: Helpers | None) -> tuple[list[Row], torch.Tensor]:
    """(Seconds of the expectation, of all of it, share of the CPU, what is said of it) of every iteration; the last map."""
    if helper is not None:
        session = replace(session, on=replace(session.on, helpers=helper))
    found, begin = list[Row](), time.perf_counter()
    for done in driver.iterations(session):
        now = time.perf_counter()
        record = session.on.helpers.record() or {"share": 0.0, "said": ""}
        found.append((done.seconds["expectation"], now - begin, record["share"], record["said"]))
        begin = now
    return found, done.state.halves[0].map_ZYX.cpu()


def lend_always(count: int) -> None:
    """Have helpers get so many particles each time, and be waited for."""
    helpers.WAITED = 1e9
    Lending.rows = lambda self, total, most: count  # type: ignore[method-assign]
    Lending.wants_trial = lambda self, total: False  # type: ignore[method-assign]


def apart(first_ZYX: torch.Tensor, second_ZYX: torch.Tensor) -> float:
    """Deviation of two maps, relative to that of the first from its mean."""
    return float((first_ZYX - second_ZYX).std() / first_ZYX.std())


def session_of(folder: Path, options: argparse.Namespace) -> Session:
    """A refinement of the simulated set at its start."""
    config = RefineConfig(diameter=0.85 * options.box * options.pixel, initial_resolution=40, healpix_order=options.order,
                          max_iterations=options.iterations, symmetry=options.sym)  # fmt: skip
    table = ParticleTable.read(folder / "particles.star")
    threads = set_threads(options.rank_threads or None)
    device, _ = resolve_device(options.device)
    return driver.prepare(table, read_map(folder / "start.mrc"), config, device, threads)


def started(session: Session, threads: int) -> Helpers:
    """A helper that waits for work."""
    found = Helpers.beside(session.data, session.config, ALONE, 1, threads)
    found.start()
    while not found.helpers[0].ready:
        if found.helpers[0].reason:
            raise SystemExit(found.helpers[0].reason)
        time.sleep(0.1)
    return found


def main() -> None:
    """Simulate, refine by turns, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"n": 20000, "box": 128, "pixel": 2.6, "order": 2, "iterations": 8, "turns": 2, "model": "demo", "sym": "C1",
             "snr": 0.1, "threads": 0, "rank-threads": 0, "lend": 0, "device": "auto"}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--data", type=Path, help="set of `verglas simulate` of that box and pixel, in place of one made here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    threads = options.threads or threads_beside(len(os.sched_getaffinity(0)), 1, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = options.data or Path(name) / "set"
        words = ["simulate", "--n", str(options.n), "--box", str(options.box), "--pixel", str(options.pixel), "--snr",
                 str(options.snr), "--model", options.model, "--out", str(folder)]  # fmt: skip
        if options.data is None:
            subprocess.run([sys.executable, "-m", "verglas", *words], check=True, stdout=subprocess.DEVNULL)
        session = session_of(folder, options)
        if options.lend:
            lend_always(options.lend)
        runs: dict[bool, list[tuple[list[Row], torch.Tensor]]] = {False: [], True: []}
        with started(session, threads) as helper:
            print(f"the helper of {threads} threads is there", flush=True)
            told("compiling", run(session, helper)[0])  # there and here
            for turn in range(2 * options.turns):
                while not helper.helpers[0].free:
                    helper.hear()
                    time.sleep(0.1)
                runs[turn % 2 == 1].append(run(session, helper if turn % 2 else None))
                told("with the CPU" if turn % 2 else "GPU alone", runs[turn % 2 == 1][-1][0])
            print(f"{threads} threads help; found of them: {helper.helpers[0].lending.found}")
    report(runs, options.out)


def told(name: str, rows: list[Row]) -> None:
    """Say what a run took, should there be no time for the next one."""
    print(f"{name}: {sum(one[1] for one in rows):.2f} s; {', '.join(f'{one[1]:.2f} s {one[3]}' for one in rows)}", flush=True)


def report(runs: dict[bool, list[tuple[list[Row], torch.Tensor]]], out: Path | None) -> None:
    """Print and publish what was found. runs: without and with a helper."""
    (plain_rows, plain_maps), (beside_rows, beside_maps) = (zip(*runs[helped]) for helped in (False, True))
    figures = {}
    print("seconds of the expectation and of the whole iteration, of the fastest run")
    print("iteration   GPU alone      with the CPU   share")
    for number, (alone, beside) in enumerate(zip(zip(*plain_rows), zip(*beside_rows), strict=False), 1):
        (plain, whole), (lent, all_of_it) = ([min(one[i] for one in several) for i in (0, 1)] for several in (alone, beside))
        share, said = beside[-1][2:]
        print(f"{number:9d} {plain:6.2f} {whole:6.2f}  {lent:6.2f} {all_of_it:6.2f}   {100 * share:4.1f} %  {said}")
        figures[f"iteration {number}: with the CPU / without"] = all_of_it / whole
    totals = [min(sum(one[1] for one in each) for each in rows) for rows in (plain_rows, beside_rows)]
    print(f"all iterations: {totals[0]:.2f} s without, {totals[1]:.2f} s with")
    figures["all iterations: with the CPU / without"] = totals[1] / totals[0]
    figures["half maps apart, with and without"] = apart(plain_maps[0], beside_maps[0])
    if len(plain_maps) > 1:
        figures["half maps apart, both without"] = apart(plain_maps[0], plain_maps[1])
        figures["half maps apart, both with"] = apart(beside_maps[0], beside_maps[1])
    print({name: value for name, value in figures.items() if "apart" in name})
    publish(figures, out)


if __name__ == "__main__":
    main()
