"""Non-uniform transforms that GPUs share: time against one GPU's, the rates they could have at most, what travelled.

torchrun --standalone --nproc-per-node 4 -m benchmarks.nufft_ranks --modes 512 --points 1000000000 --accuracy 1e-3
Points are those of slices, --points in all, as many on each rank. Printed for each way of sharing: seconds of types 1 and 2; how
much longer one GPU takes with one rank's points (--whole: with all of them); bytes sent, and by the formula; the share of the
time that the slower of its parts needs alone (computing on this rank; sending at the rate of one large exchange).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.nufft import scattered
from verglas.distributed.ranks import ALONE, Ranks
from verglas.distributed.ways import Ways
from verglas.nufft import Plan

RUNS = 3
PROBE = 2**26  # bytes that go to each rank when the link is measured


def seconds_of(run: Callable[[], object], device: torch.device, ranks: Ranks) -> float:
    """Median over runs of the slowest rank's time, after one run that does not count."""
    taken = []
    for _ in range(RUNS + 1):
        settle(device, ranks)
        started = time.perf_counter()
        run()
        settle(device, ALONE)
        passed = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
        taken.append(float(ranks.greatest(passed, "seconds")))
    return median(taken[1:])


def settle(device: torch.device, ranks: Ranks) -> None:
    """Wait for the device, and for the other ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.meet("benchmark")


def link_rate(device: torch.device, ranks: Ranks) -> float:
    """Bytes a second that a rank sends in one large exchange."""
    parts = [torch.zeros(PROBE // 4, device=device) for _ in range(ranks.size)]
    shapes = [tuple(part.shape) for part in parts]
    seconds = seconds_of(lambda: ranks.exchanged(parts, shapes, "probe"), device, ranks)
    return (ranks.size - 1) * PROBE / seconds


def drawn(count: int, shape: tuple[int, ...], size: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, values and modes of this rank."""
    generator = torch.Generator(device).manual_seed(seed)
    # Slices of other orientations on each rank: the same ones, turned about z.
    points = scattered("slices", count, size, generator)
    angle = torch.tensor(float(seed))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0], [0.0, 0.0, 1.0]], device=device)
    values = torch.randn(count, generator=generator, dtype=torch.complex64, device=device)
    return points @ turn, values, torch.randn(*shape, generator=generator, dtype=torch.complex64, device=device)


def main() -> None:
    """Print a table on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", type=int, default=256)
    parser.add_argument("--points", type=int, default=10**8)
    parser.add_argument("--accuracy", type=float, default=1e-3)
    parser.add_argument("--ways", nargs="+", default=["values", "sums", "auto"])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--overlap", type=int, default=1)
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    ranks = Ranks(rank, size, size, behind=None if cuda else dist.new_group(), ways=Ways(overlap=bool(options.overlap)))
    try:
        measure(options, device, ranks)
    finally:
        dist.destroy_process_group()


def measure(options: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """One GPU with its share of the points (all of them if asked for), then all ranks, each way."""
    count, modes = options.points // ranks.size, (options.modes,) * 3
    rate = link_rate(device, ranks)
    alone = lone(count, modes, options, device, ranks)
    whole = lone(options.points, modes, options, device, ranks) if options.whole else None
    if ranks.is_lead:
        print(f"{ranks.size} ranks, {options.points:.3g} points of slices, {options.modes} modes, accuracy {options.accuracy:g}; "
              f"a rank sends {rate / 1e9:.0f} GB/s; one GPU with {count:.3g} points: {alone[0]:.4f}, {alone[1]:.4f} s"
              + (f", with all: {whole[0]:.4f}, {whole[1]:.4f} s" if whole else ""), flush=True)  # fmt: skip
    for way in options.ways:
        try:
            shared(way, count, rate, whole or alone, options, device, ranks)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{way}, rank {ranks.rank}: {str(error)[:150]}", flush=True)
            return  # other ranks wait for this one: they go with it


def lone(
    count: int, modes: tuple[int, ...], options: argparse.Namespace, device: torch.device, ranks: Ranks
) -> tuple[float, float]:
    """Seconds of both types on each rank by itself; the slowest."""
    points, values, field = drawn(count, modes, options.modes, device, ranks.rank)
    plan = Plan(points, modes, options.accuracy, implementation="triton" if device.type == "cuda" else "cpu")
    del points
    return tuple(seconds_of(run, device, ranks) for run in (lambda: plan.type1(values), lambda: plan.type2(field)))  # type: ignore[return-value]


def shared(
    way: str, count: int, rate: float, alone: tuple[float, float], options: argparse.Namespace, device: torch.device, ranks: Ranks
) -> None:
    """Print what one way of sharing takes."""
    size = options.modes
    settle(device, ranks)
    started = time.perf_counter()
    points, values, _ = drawn(count, (1,), size, device, ranks.rank)
    drawn_at = time.perf_counter()
    plan = Plan(points, (size,) * 3, options.accuracy, ranks=ranks, way=way)
    settle(device, ranks)
    planned = time.perf_counter() - drawn_at
    assert plan.shared is not None
    field = torch.randn(plan.modes_shape, dtype=torch.complex64, device=device)
    ranks.meter.read()
    for kind, run in ((1, lambda: plan.type1(values)), (2, lambda: plan.type2(field))):
        run()
        sent = sum(entry.bytes for entry in ranks.meter.read().values() if entry.kind == "all-to-all")
        told = plan.shared.traffic(kind)
        seconds = seconds_of(run, device, ranks)
        stood = sum(entry.seconds for entry in ranks.meter.read().values() if entry.kind == "all-to-all") / (RUNS + 1)
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
        if ranks.is_lead:
            computing, sending = max(seconds - stood, 0.0), sent / rate
            print(
                f"{way}, type {kind}: {seconds:.4f} s, one GPU / this {alone[kind - 1] / seconds:.2f}; stood {stood:.4f} s, "
                f"sent {sent / 1e6:.1f} MB (formula {told / 1e6:.1f}), {max(computing, sending) / seconds:.2f} of the bound "
                f"({computing:.4f} s computing, {sending:.4f} s sending); planned in {planned:.2f} s after "
                f"{drawn_at - started:.1f} s, peak {peak:.1f} GB; {plan.kernel}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
