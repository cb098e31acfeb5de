"""How long the sums of slices travel between GPUs, and how long maps are solved from them, at several boxes.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.communication [--boxes 128 256 360] [--device cuda]

Prints one table per box: megabytes, milliseconds (median of 5, after one to warm up) of each collective and stage of solving.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist

from verglas.cli.common import ranks_here
from verglas.core.masks import soft_sphere
from verglas.core.rows import packed_sphere
from verglas.distributed.ranks import Ranks
from verglas.distributed.ways import Ways
from verglas.maximization import halves as solving
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.reference import flatten
from verglas.projection.volume import FourierVolume

REPEATS = 5
T = TypeVar("T")


def median_ms(work: Callable[[], object], device: torch.device) -> float:
    """Median of the milliseconds that `work` takes, each time begun by all ranks together."""
    return median_ms_of(lambda _: work(), lambda: None, device)


def median_ms_of(work: Callable[[T], object], made: Callable[[], T], device: torch.device) -> float:
    """The same of work on something that it uses up, and that is made before each time."""
    took = []
    for _ in range(REPEATS + 1):
        something = made()
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1))
        wait(device)
        started = time.perf_counter()
        work(something)
        wait(device)
        took.append(1000 * (time.perf_counter() - started))
    return statistics.median(took[1:])


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def made_up(box: int, device: torch.device) -> Accumulator:
    """Sums of noise that cover all voxels."""
    sums = Accumulator(box, None, 2.0, device)
    sums.running_V4.normal_(generator=torch.Generator(device).manual_seed(1))
    sums.running_V4[:, 2] = sums.running_V4[:, 2].abs() + 0.1
    sums.slices = 1  # else there is nothing to send
    return sums


def collectives(sums: Accumulator, device: torch.device, size: int) -> dict[str, float]:
    """Milliseconds of each way of adding up one half-set's sums, and of giving out one map."""
    whole = sums.running_V4[:, :3].contiguous()
    part = -(-len(whole) // size)
    padded = whole.new_zeros(size * part, 3)
    padded[: len(whole)] = whole
    mine, map_ZYX = whole.new_empty(part, 3), torch.zeros((sums.box,) * 3, device=device)
    halves = padded.half()
    mine_half = halves[:part].clone()
    ways: dict[str, Callable[[], object]] = {
        "copy of columns": lambda: sums.running_V4[:, :3].contiguous(),
        "all-reduce": lambda: dist.all_reduce(whole),
        "reduce": lambda: dist.reduce(whole, 0),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(mine, padded),
        "reduce-scatter, float16": lambda: dist.reduce_scatter_tensor(mine_half, halves),
        "broadcast of a map": lambda: dist.broadcast(map_ZYX, 0),
    }
    if device.type == "cpu":  # gloo has none
        ways = {name: way for name, way in ways.items() if "scatter" not in name}
    return {name: median_ms(way, device) for name, way in ways.items()}


def sharing(box: int, device: torch.device, ranks: Ranks) -> dict[str, float]:
    """Milliseconds from the sums of all ranks to both new references on all, with shared solving and without, megabytes that each
    rank sends meanwhile, the least that it could, and by how much the maps differ (share of the largest value)."""
    support = soft_sphere(box, 0.35 * box, 5, device) > 0
    found, maps = {}, []
    for name, ways in {"shared": Ways(), "shared, coded": Ways(compress=True), "not shared": Ways(share_solving=False)}.items():
        way = replace(ranks, ways=ways)
        adding, solving_ms = [], []
        for _ in range(REPEATS + 1):
            pair = made_up(box, device), made_up(box, device)
            way.communication()
            wait(device)
            started = time.perf_counter()
            for one in pair:
                one.add_up(way, share=True)
            wait(device)
            between = time.perf_counter()
            solutions, _ = solving.solve_halves(pair, "C1", box // 8, support_ZYX=support)
            wait(device)
            adding.append(1000 * (between - started))
            solving_ms.append(1000 * (time.perf_counter() - between))
        sent = way.communication()
        assert sent is not None
        found |= {f"{name}: adding up": statistics.median(adding[1:]), f"{name}: solving": statistics.median(solving_ms[1:]),
                  f"{name}: MB sent": sent["bytes_of_ranks"][0] / 1e6}  # fmt: skip
        maps.append(solutions[0].map_ZYX * support)
    least = 2 * (12 * packed_sphere(float(box)).count + 4 * int(support.sum())) * (ranks.size - 1) / ranks.size
    plain, by_codes = (float((one - maps[2]).abs().max() / maps[2].abs().max()) for one in maps[:2])
    return {**found, "least MB": least / 1e6, "difference of the maps": plain, "difference of the maps, coded": by_codes}


def stages(box: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the stages of solving both half maps."""

    def pair() -> tuple[Accumulator, Accumulator]:
        return made_up(box, device), made_up(box, device)

    halves = solving.gathered_halves(pair(), "C1")
    one = halves[0]
    prior_S = torch.full((one.radius + 1,), 0.1, dtype=torch.float64, device=device)
    map_ZYX = one.map(prior_S)
    return {
        "both half-sets": median_ms_of(lambda sums: solving.solve_halves(sums, "C1", box // 8), pair, device),
        "Friedel partners": median_ms_of(lambda sums: solving.gathered_halves(sums, "C1"), pair, device),
        "join": median_ms(lambda: solving.join_low_shells(halves, box // 8), device),
        "FSC": median_ms(lambda: solving.fsc_of_sums(halves), device),
        "power of the noise": median_ms(one.shell_weight, device),
        "coverage": median_ms(lambda: one.coverage(prior_S), device),
        "map": median_ms(lambda: one.map(prior_S), device),
        "mask": median_ms(lambda: flatten(map_ZYX, 0.35 * box, 5), device),
        "map to CPU": median_ms(map_ZYX.cpu, device),
        "transform of the reference": median_ms(lambda: FourierVolume.from_map(map_ZYX, None, 2.0, device), device),
    }


def main() -> None:
    """One table per box, printed by the first rank."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--boxes", type=int, nargs="+", default=[128, 256, 360])
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    chosen = options.parse_args()
    with ranks_here(chosen.device) as (ranks, device, _):
        ranks.connected(device)
        for box in chosen.boxes:
            sums = made_up(box, device)
            found = {"sums, MB": sums.rows.count * 12 / 1e6}
            if ranks.size > 1:
                found |= collectives(sums, device, ranks.size) | sharing(box, device, ranks)
            del sums
            found |= stages(box, device)
            if ranks.is_lead:
                print(f"{box} px, {ranks.size} ranks, {device.type}", *(f"  {v:10.4g}  {k}" for k, v in found.items()), sep="\n")


if __name__ == "__main__":
    main()
