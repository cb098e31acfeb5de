"""How ptychographic reconstruction scales with the number of GPUs: `python -m benchmarks.ptychography_scaling --ranks 1 2 4`.

The same scan is made on the devices, each rank its own patterns, and some passes of each engine are timed with every number of
ranks: seconds a pass, strong-scaling efficiency, memory of a GPU, what is waited for, with and without hiding what is sent behind
the inner positions, and how far error and object are from those of the first number of ranks. Positions of a square raster with
jitter, a beam of 0.4 windows, 75 % overlap; cg from its first pass on, rpie in its default mini-batches. Numbers of ranks for
which there are no GPUs are left out. --pattern-memory GB: patterns lie in host memory, and those beyond so many stay there and
travel in every pass. --device cpu: processes that talk through gloo, a test of the program.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import publish
from benchmarks.scaling import environment, several
from verglas.cli.common import resolve_device, set_threads
from verglas.distributed.meeting import joined
from verglas.distributed.place import place_of
from verglas.distributed.ranks import Ranks
from verglas.distributed.ways import Ways
from verglas.ptychography.collect import bytes_of, gathered
from verglas.ptychography.costs import measured as costs
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.problem import Problem
from verglas.ptychography.reconstruct import engine_of
from verglas.ptychography.scan import Scan
from verglas.ptychography.share import Share
from verglas.ptychography.simulation import beam
from verglas.ptychography.simulation_options import LightOptions
from verglas.ptychography.tiles import Box, shared_pixels
from verglas.ptychography.unknowns import Line, Unknowns

WIDTH, OVERLAP, PHOTONS = 0.4, 0.75, 1e6
THINNED = 16  # of the object's pixels along an edge one in so many is kept for comparison
ENGINES = {"cg": PtychoOptions(engine="cg", warm_up=0), "rpie": PtychoOptions(engine="rpie")}
WAYS = {"hidden": True, "not hidden": False}  # whether what is sent travels behind the inner positions


def positions_of(count: int, window: int, fractions: bool) -> tuple[Tensor, tuple[int, int]]:
    """(position_B2 in pixels of the object, its shape), the same on all ranks."""
    side = math.ceil(math.sqrt(count))
    step = WIDTH * (1 - OVERLAP) * window
    raster_B2 = torch.stack([torch.arange(count) // side, torch.arange(count) % side], 1).double() * step
    jitter_B2 = torch.rand(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.4 * step
    position_B2 = raster_B2 + jitter_B2 + 1
    position_B2 = position_B2 if fractions else position_B2.round()
    rows, columns = (int(edge) + window + 2 for edge in position_B2.max(0).values.ceil().tolist())
    return position_B2, (rows, columns)


def truth(share: Share, shape: tuple[int, int], device: torch.device) -> Tensor:
    """This rank's part of a made-up object with detail of a few pixels; a function of place, so that nobody needs the whole."""
    rows, columns = shape
    corner_2 = share.corner_2.tolist()
    y_Y1 = torch.arange(rows, device=device)[:, None] + corner_2[0]
    x_X = torch.arange(columns, device=device) + corner_2[1]
    phase_YX = 0.4 * torch.sin(0.31 * y_Y1 + 0.5 * torch.sin(0.017 * x_X)) * torch.sin(0.23 * x_X + torch.cos(0.011 * y_Y1))
    absorption_YX = 0.1 + 0.1 * torch.sin(0.0531 * y_Y1) * torch.cos(0.0471 * x_X)
    return torch.polar(torch.exp(-absorption_YX), phase_YX).to(torch.complex64)[None, None]


def box_shape(share: Share, whole: tuple[int, int]) -> tuple[int, int]:
    """Pixels that this rank keeps."""
    return whole if share.alone else share.tile.box.shape


def start_of(share: Share, probe_MYX: Tensor, position_B2: Tensor, shape: tuple[int, int]) -> Unknowns:
    """An object of 1 and the true probe, blurred; single precision on the probe's device."""
    device, count = probe_MYX.device, len(position_B2)
    return Unknowns(
        object_OLYX=torch.ones(1, 1, *box_shape(share, shape), dtype=torch.complex64, device=device),
        probe_MYX=probe_MYX, scale_B=torch.ones(count, device=device), positions_B2=position_B2.to(device),
        background_YX=torch.zeros(probe_MYX.shape[1:], device=device),
    )  # fmt: skip


def simulated(share: Share, position_B2: Tensor, probe_MYX: Tensor, shape: tuple[int, int]) -> Scan:
    """This rank's patterns as uint16, made on its device: expected counts plus a number from 0 to 1 for each pixel, rounded down,
    so that they do not depend on who makes them."""
    window, device = share.window, probe_MYX.device
    counts_BYX = torch.empty(len(position_B2), *window, dtype=torch.int16, device=device)
    scan = Scan(torch.ones(len(position_B2), 1, 1).expand(-1, *window), position_B2)
    problem = Problem(scan.subset(torch.arange(1)), ENGINES["cg"], device)
    x = start_of(share, probe_MYX, position_B2, shape).changed(object_OLYX=truth(share, box_shape(share, shape), device))
    dither_YX = torch.rand(window, generator=torch.Generator().manual_seed(2)).to(device)
    for rows_B in torch.arange(len(position_B2), device=device).split(problem.chunk):
        expected_BYX = torch.fft.fftshift(problem.model.waves(Line(x), rows_B).intensity[0], (1, 2))
        counts_BYX[rows_B] = (expected_BYX + dither_YX).clamp_max(2**15 - 1).to(torch.int16)
    return replace(scan, patterns_BYX=counts_BYX.view(torch.uint16))


def options_of(name: str, args: argparse.Namespace) -> PtychoOptions:
    """Of an engine."""
    return replace(ENGINES[name], pattern_memory=args.pattern_memory)


def measured(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Figures of one number of ranks, from the lead; of the others something else."""
    begun = time.perf_counter()
    position_B2, shape = positions_of(args.positions, args.window, args.fractions)
    window = (args.window, args.window)
    whole = Scan(torch.ones(len(position_B2), 1, 1).expand(-1, *window), position_B2)
    share = Share.of_one(whole) if ranks.size == 1 else Share.of(ranks, position_B2, window, shape, costs(ranks, device))
    own_B2 = position_B2 if ranks.size == 1 else position_B2[share.rows_B] - share.corner_2
    probe = torch.from_numpy(beam(LightOptions(width=WIDTH, photons=PHOTONS), args.window, False)).to(device, torch.complex64)
    scan = simulated(share, own_B2, probe, shape)
    if args.pattern_memory:
        scan = replace(scan, patterns_BYX=scan.patterns_BYX.cpu())
    found: dict[str, Any] = {"ranks": ranks.size, "reason": share.reason, "simulated s": time.perf_counter() - begun}
    for name in args.engines:
        problem = Problem(scan, options_of(name, args), device, share)
        found["reason"] = f"{share.reason}; {problem.kept.text}"
        for way, overlap in WAYS.items():
            if overlap or ranks.size > 1:
                problem.share = problem.regulariser.share = replace(share, ranks=replace(ranks, ways=Ways(overlap=overlap)))
                found |= {f"{name}, {way}, {key}": value for key, value in passes(args, problem, own_B2, probe, shape).items()}
        del problem
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found | (exchange_times(share, shape, device) if ranks.size > 1 else {})


def exchange_times(share: Share, shape: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Seconds of one exchange of a complex object: what tiles share, and a whole one through an all-reduce; bytes of both."""
    found = {}
    whole = replace(share, tiles=[replace(tile, box=Box(0, 0, *shape)) for tile in share.tiles])
    for name, one in (("tiles", share), ("whole", whole)):
        value = torch.zeros(1, 1, *one.tile.box.shape, dtype=torch.complex64, device=device)
        times = []
        for _ in range(6):
            share.ranks.meet("exchange")
            started = time.perf_counter()
            one.halo.sending(value, f"{name} timed")()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        found[f"exchange of {name} s"] = max(share.ranks.everyones(statistics.median(times[1:]), "times"))
    found["exchange of tiles bytes"] = 8 * max(shared_pixels(share.tiles, rank) for rank in range(share.ranks.size))
    return found | {"exchange of whole bytes": 8 * shape[0] * shape[1]}


def passes(
    args: argparse.Namespace, problem: Problem, position_B2: Tensor, probe: Tensor, shape: tuple[int, int]
) -> dict[str, Any]:
    """Seconds, waiting, memory of some passes from the start; their last error, and a thinned object."""
    device, ranks = problem.like.device, problem.share.ranks
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    x, engine = start_of(problem.share, probe, position_B2, shape), engine_of(problem, {})
    ranks.meter.read()
    seconds, errors = [], []
    for number in range(1, args.passes + 1):
        ranks.meet("pass")
        if number == 2:  # the first one compiles and plans
            ranks.meter.read()
        started = time.perf_counter()
        x, error = engine.run_pass(x, number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        errors.append(error)
    slowest = [max(one) for one in zip(*ranks.everyones(seconds, "seconds"), strict=True)]
    waited = {name: entry.seconds / (args.passes - 1) for name, entry in ranks.meter.read().items() if entry.kind != "wait"}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    kept = {"x": bytes_of(x), "memory": bytes_of(engine.memory), "counts": bytes_of(problem.counts), "peak": peak}
    most = {name: max(one[name] for one in ranks.everyones(kept, "bytes")) for name in kept}
    object_YX = gathered(problem.share, "object_OLYX", x["object_OLYX"])[0, 0, ::THINNED, ::THINNED]
    return {
        "first s": slowest[0], "s": statistics.median(slowest[1:]), "error": errors[-1], "waited s": waited, "bytes": most,
        "object": torch.view_as_real(object_YX.contiguous()).tolist() if ranks.is_lead else None,
    }  # fmt: skip


def as_rank(args: argparse.Namespace) -> None:
    """One process among those of a number of ranks; the lead writes what was measured."""
    place = place_of(os.environ)
    set_threads(1 if args.device == "cpu" else None)
    device, _ = resolve_device(args.device, place)
    with joined(place, device) as ranks:
        found = measured(args, ranks, device)
        if ranks.is_lead:
            args.as_rank.write_text(json.dumps(found))


def table(found: list[dict[str, Any]]) -> dict[str, float]:
    """Figures, and a line for each way of each number of ranks."""
    figures: dict[str, float] = {}
    one = found[0]
    print("ranks  engine, sending        s/pass  effic.  waited ms  GPU GB  kept GB  error     d error  d object")
    for this in found:
        for key in [name.removesuffix(", s") for name in this if name.endswith(", s")]:
            engine = key.partition(",")[0]
            first = f"{engine}, hidden"
            ideal = one[f"{first}, s"] * one["ranks"] / this["ranks"]
            kept = this[f"{key}, bytes"]
            waited, error = sum(this[f"{key}, waited s"].values()), this[f"{key}, error"]
            efficiency = ideal / this[f"{key}, s"]
            d_error = abs(error / one[f"{first}, error"] - 1)
            objects = [np.array(some[f"{name}, object"]) for some, name in ((this, key), (one, first))]
            d_object = float(np.abs(objects[0] - objects[1]).max() / np.abs(objects[1]).max())
            parts = (kept["x"] + kept["memory"] + kept["counts"]) / 1e9
            print(f"{this['ranks']:5d}  {key:22s} {this[f'{key}, s']:7.4f}  {efficiency:6.3f}  {1e3 * waited:9.2f}  "
                  f"{kept['peak'] / 1e9:6.2f}  {parts:7.3f}  {error:.6f}  {d_error:.1e}  {d_object:.1e}")  # fmt: skip
            name = f"{this['ranks']} ranks, {key}"
            figures |= {f"{name}, s": this[f"{key}, s"], f"{name}, efficiency": efficiency, f"{name}, waited s": waited,
                        f"{name}, peak GB": kept["peak"] / 1e9, f"{name}, kept GB": parts, f"{name}, error": error,
                        f"{name}, difference of errors": d_error, f"{name}, difference of objects": d_object}  # fmt: skip
    return figures


def main() -> None:
    """Run every number of ranks, print a table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--positions", type=int, default=16000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--fractions", action="store_true", help="positions between pixels")
    parser.add_argument("--pattern-memory", type=float, default=0.0)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank is not None:
        as_rank(args)
        return
    most = torch.cuda.device_count() if args.device == "cuda" else max(args.ranks)
    found = []
    with tempfile.TemporaryDirectory() as work:
        for count in [one for one in args.ranks if one <= most]:
            begun, out = time.perf_counter(), Path(work) / f"{count}.json"
            words = ["--positions", args.positions, "--window", args.window, "--passes", args.passes, "--device", args.device,
                     *(["--fractions"] if args.fractions else []), "--pattern-memory", args.pattern_memory,
                     "--engines", *args.engines, "--as-rank", out]  # fmt: skip
            command = [sys.executable, *several(count), "benchmarks.ptychography_scaling", *map(str, words)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment(count))
            if done.returncode:
                print(f"{count} ranks failed:\n{done.stderr[-4000:]}")
                continue
            found.append(json.loads(out.read_text()))
            print(f"{count} ranks: {found[-1]['reason'] or 'one process'}; scan made in {found[-1]['simulated s']:.1f} s; "
                  f"{time.perf_counter() - begun:.1f} s in all", flush=True)  # fmt: skip
            for name, value in found[-1].items():
                if name.endswith("waited s"):
                    print(f"  {name}: " + ", ".join(f"{key} {1e3 * one:.2f} ms" for key, one in value.items()), flush=True)
                if name.startswith("exchange"):
                    print(f"  {name}: {value:.5g}")
    if not found:
        raise SystemExit("no number of ranks could be measured")
    publish(table(found), args.out)


if __name__ == "__main__":
    main()
