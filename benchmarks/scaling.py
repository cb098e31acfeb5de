"""How refinements scale with the number of processes (ranks), one per GPU: `python -m benchmarks.scaling --model 6wg6_C1.npz`.

    python -m benchmarks.scaling [iterations] [alike] [whole] --model MODEL [--ranks 1 2 4 8] [--work DIR] [--out FIGURES.json]

iterations  one iteration of every sampling, from the same states with every number of ranks, in the order of --ranks: whether
            sums and poses are the same, strong and weak scaling (--particles on the most ranks), shares of the time, bytes
alike       whole runs of --small particles side by side, 1 rank --again times, the most ranks twice: how far apart they end
whole       whole refinements of --whole particles as users start them, with every number of ranks

256 px of 1.3 Å (alike: 128 px of 2.6 Å), SNR 0.05, float16, C1, diameter 240 Å, from 40 Å. Numbers of ranks for which there are
no GPUs are left out. `--device cpu` takes processes on the CPU that talk through gloo: a test of the program, not of a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures import publish
from benchmarks.process_tree import TRACED
from benchmarks.refinement_run import Run, mean_fsc, opening, refined
from benchmarks.scaling_tables import figures_of, stage_tables, texts, whole_figures
from benchmarks.simulated import AS_RELION, simulated
from verglas.cli.launch import visible_names
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig

STEPS = ("iterations", "alike", "whole")
FIELD = 332.8  # Å, edge of the images
LEAST_PART = 6000  # images that are worth a process of their own that simulates them


def data_of(options: argparse.Namespace, n: int, box: int) -> Path:
    """A set of n images of the field of view; of many, each GPU makes a share."""
    words = [*AS_RELION, "--method", "slices", "--float16", "--seed", "1", "--device", options.device]
    parts = max(1, min(n // LEAST_PART, torch.cuda.device_count()))
    return simulated(options.work / f"{n}x{box}", options.model, n, box, FIELD / box, words, parts)


def several(ranks: int) -> list[str]:
    """Python's words that start so many processes of the module that follows."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return torchrun if ranks > 1 else ["-m"]


def environment(ranks: int) -> dict[str, str]:
    """Cores are shared among the ranks."""
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks)))}


def iterations(options: argparse.Namespace) -> dict[str, float]:
    """Figures of single iterations; all that was measured goes to iterations.json below --work, pass by pass."""
    data, most = data_of(options, options.particles, options.box), max(options.ranks)
    found: list[dict[str, Any]] = []
    for ranks in options.ranks:
        out = options.work / f"ranks_{ranks}.json"
        thinner = max(1, options.particles // (ranks * (options.each or options.particles // most)))
        passes = "1" if thinner == 1 else f"1,{thinner}"
        words = ["--data", data, "--states", options.work / "states", "--diameter", options.diameter, "--passes", passes,
                 "--trace", ",".join(map(str, options.trace)), "--most", options.most, "--device", options.device,
                 "--numbers", ",".join(map(str, options.numbers)), "--compare", ",".join(map(str, options.compare)),
                 "--times", options.times, "--stages", ",".join(map(str, options.stages)),
                 "--begun", time.time(), "--out", out]  # fmt: skip
        command = [sys.executable, *several(ranks), "benchmarks.scaling_rank", *map(str, words)]
        log = options.work / f"ranks_{ranks}.txt"  # there also if this is ended before they are
        with log.open("wb") as said:
            done = subprocess.run(command, stderr=said, env=os.environ | environment(ranks) | TRACED)
        if done.returncode:
            raise SystemExit(f"{ranks} ranks failed:\n{log.read_text(errors='replace')[-6000:]}")
        found += json.loads(out.read_text())
    (options.work / "iterations.json").write_text(json.dumps(found) + "\n")
    print(*stage_tables(found), sep="\n", flush=True)
    about = {"particles": options.particles, "box px": options.box, "pixel Å": FIELD / options.box}
    return about | {"diameter Å": options.diameter} | figures_of(found)


def run(options: argparse.Namespace, data: Path, ranks: int, name: str, more: dict[str, str] | None = None) -> Run:
    """A whole refinement as a user starts it: --gpus, or torchrun where there are none. more: of the environment."""
    words = ["--diameter", f"{options.diameter:g}", "--initial-resolution", "40", "--device", options.device]
    words += ["--max-iterations", str(options.max_iterations)]
    program = [*several(ranks), "verglas"]
    if options.device == "cuda" and ranks > 1:
        words, program = [*words, "--gpus", str(ranks)], ["-m", "verglas"]
    here = environment(ranks) | (more or {})
    return refined(options.work / name, data / "particles.star", data / "start.mrc", words, program, here)


def parts(one: Run) -> dict[str, float]:
    """Seconds of the parts of a run. Process start: until the folder is open, the ranks having met."""
    start, (begin, end) = opening(one.folder) - one.begun, one.computing_span()
    stages = one.stages()
    found = {"whole s": one.seconds, "start s": start, "without start s": one.seconds - start, "preparing s": begin - start,
             "iterations s": end - begin, "ending s": one.seconds - end, "iterations": len(one.iterations),
             "an iteration s": (end - begin) / len(one.iterations)}  # fmt: skip
    return found | {f"{name} s": stages[f"stage {name} s"] for name in ("accuracy", "expectation", "maximization")}


def whole(options: argparse.Namespace) -> dict[str, float]:
    """Whole refinements with every number of ranks, most ranks first: these compile kernels in less time than one alone."""
    data = data_of(options, options.whole, options.box)
    warm = data_of(options, options.warm, options.box) if options.warm else None
    if warm is not None:
        run(options, warm, max(options.ranks), "warm")
    found: dict[int, dict[str, float]] = {}
    for ranks in sorted(options.ranks, reverse=True):
        one = run(options, data, ranks, f"whole_{ranks}")
        found[ranks] = parts(one)
        found[ranks]["mean FSC"] = mean_fsc(one.folder / "run_class001.mrc", data / "truth.mrc")
        print(f"{ranks} ranks: {texts(found[ranks])}", flush=True)
        for it in one.iterations:
            sent = it.get("communication")
            text = f", sent {max(sent['bytes_of_ranks']) / 1e6:.0f} MB" if sent else ""
            print(f"  {it['iteration']:3d} order {it['healpix_order']} size {it['current_size']:4d} px {it['resolution']:.2f} Å: "
                  f"{it['took']}{text}", flush=True)  # fmt: skip
    return whole_figures(dict(sorted(found.items())))


def alike(options: argparse.Namespace) -> dict[str, float]:
    """How far apart whole runs of one seed are: on one rank, several times, and on the most ranks, twice. All side by side, as
    they are not timed; what is found is printed as they end."""
    data, most = data_of(options, options.small, options.box // 2), max(options.ranks)
    wanted = [(1, number) for number in range(options.again)] + [(most, number) for number in range(2 if most > 1 else 0)]
    threads = max(1, len(os.sched_getaffinity(0)) // sum(ranks for ranks, _ in wanted))

    def one(ranks: int, number: int) -> Run:
        here = {"OMP_NUM_THREADS": str(threads)}
        if ranks == 1 and options.device == "cuda":
            here["CUDA_VISIBLE_DEVICES"] = visible_names([str(number % most)])[0]
        return run(options, data, ranks, f"alike_{ranks}_{number}", here)

    done, found = dict[tuple[int, int], Run](), dict[tuple[str, str], list[float]]()
    with ThreadPoolExecutor(len(wanted)) as pool:
        begun = {pool.submit(one, *which): which for which in wanted}
        for future in as_completed(begun):
            which, ended = begun[future], future.result()
            print(f"{which[0]} ranks, run {which[1]}: {len(ended.iterations)} iterations, {ended.seconds:.1f} s", flush=True)
            for other, before in done.items():
                pair = f"runs of {min(which[0], other[0])} and {max(which[0], other[0])} ranks"
                values = apart(before, ended, data)
                print(f"  {pair}, {other[1]} and {which[1]}: {texts(values)}", flush=True)
                for name, value in values.items():
                    found.setdefault((pair, name), []).append(value)
            done[which] = ended
    return {f"{pair}, {name}, {which}": of(values) for (pair, name), values in found.items()
            for which, of in (("least", min), ("most", max))}  # fmt: skip


def apart(one: Run, other: Run, data: Path) -> dict[str, float]:
    """Differences of two finished runs of the same particles."""
    curves = [np.array(run.iterations[-1]["fsc"]) for run in (one, other)]
    tables = [ParticleTable.read(run.folder / "run_data.star") for run in (one, other)]
    trace_B = torch.einsum("bij,bij->b", tables[0].rotations(), tables[1].rotations())
    angle_B = torch.rad2deg(((trace_B - 1) / 2).clamp(-1, 1).arccos())
    qualities = [mean_fsc(run.folder / "run_class001.mrc", data / "truth.mrc") for run in (one, other)]
    return {
        "difference of the iterations": abs(len(other.iterations) - len(one.iterations)),
        "mean FSC with the truth": qualities[1], "difference of it": abs(qualities[1] - qualities[0]),
        "1 - FSC of the two maps": 1 - mean_fsc(one.folder / "run_class001.mrc", other.folder / "run_class001.mrc"),
        "largest difference of the half maps' FSC": float(np.abs(curves[0] - curves[1]).max()),
        "median angle between poses, degrees": float(angle_B.median()),
        "share of poses within 1 degree": float((angle_B < 1).double().mean()),
    }  # fmt: skip


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; ranks without a GPU of their own are left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="step", help="(default: all)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--particles", type=int, default=100_000, help="of single iterations, on the most ranks")
    parser.add_argument("--each", type=int, help="of a rank in weak scaling (default: what the most ranks have of --particles)")
    parser.add_argument("--whole", type=int, default=100_000, help="of whole refinements")
    parser.add_argument("--small", type=int, default=5_000, help="of whole refinements that are compared")
    parser.add_argument("--again", type=int, default=3, help="of these on one rank")
    parser.add_argument("--warm", type=int, default=0, help="of a refinement before the timed ones, that compiles kernels")
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--diameter", type=float, default=240.0)
    parser.add_argument("--most", type=int, default=99, help="samplings, at most")
    parser.add_argument("--max-iterations", type=int, default=RefineConfig.max_iterations, help="of whole refinements")
    parser.add_argument("--numbers", type=int, nargs="*", default=list(range(99)),
                        help="of iterations that are measured")  # fmt: skip
    parser.add_argument("--times", type=int, default=3, help="repetitions of an iteration, of which the middle one counts")
    parser.add_argument("--compare", type=int, nargs="*", default=[2, 4, 6], help="numbers of iterations whose sums are compared")
    parser.add_argument("--trace", type=int, nargs="*", default=[2, 5], help="numbers of iterations done once more under CUPTI")
    parser.add_argument("--stages", type=int, nargs="*", default=[], help="numbers of iterations whose stages are timed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if options.device == "cuda":
        options.ranks = [ranks for ranks in options.ranks if ranks <= torch.cuda.device_count()]
    else:
        options.trace = []  # CUPTI sees GPUs only
    return options


def main(words: Sequence[str] | None = None) -> None:
    options = parsed(words)
    found: dict[str, float] = {"most ranks": max(options.ranks)}
    with tempfile.TemporaryDirectory() as scratch:
        options.work = options.work or Path(scratch)
        options.work.mkdir(parents=True, exist_ok=True)
        for step in options.steps or STEPS:
            found |= {"iterations": iterations, "alike": alike, "whole": whole}[step](options)
            publish(found, options.out)  # what is measured is kept, should a later step fail


if __name__ == "__main__":
    main()
