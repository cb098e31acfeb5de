"""From sums that ranks share to the map on all of them: seconds against the least that rates of copying and sending allow.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.solve_bound --boxes 256 512 800 [--device cuda]
    python -m benchmarks.solve_bound --boxes 256 512 800        (one process: seconds by which efficiency is absolute)

--check: how far the map is from that of one GPU alone that has all sums.

The bound counts what a rank has to read and write if every array is read once and written once, at the rate of a copy, and what
it has to send, at the measured rate of an exchange: the voxels and their weights (twice: floors of the weights come first), lines
of each of the three transforms in and out as far as they hold something or are kept, the map in and out of its correction, and
the parts of all other ranks. Nothing of it is hidden behind the rest.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.communication import median_ms
from benchmarks.gridding import copy_rate
from verglas.cli.common import ranks_here
from verglas.core.rows import packed_sphere
from verglas.distributed.ranks import Ranks
from verglas.distributed.ways import FORMS
from verglas.maximization.slabs import Slabs
from verglas.maximization.solve import SolvedSums
from verglas.maximization.transform_costs import Shape
from verglas.maximization.transform_probes import form_for

PADDING = 2.0
LINK_BYTES = {"cuda": 2**29, "cpu": 2**24}  # that are exchanged to measure the link


def link_rate(ranks: Ranks, device: torch.device) -> float:
    """Bytes that a rank sends to others in a second while all exchange parts of one size."""
    each = LINK_BYTES[device.type] // ranks.size
    out = torch.ones(each * ranks.size, dtype=torch.uint8, device=device)
    found = torch.empty_like(out)
    return each * (ranks.size - 1) / (median_ms(lambda: dist.all_to_all_single(found, out), device) / 1000)


def moved_bytes(shape: Shape, element: int = 4) -> dict[str, float]:
    """Bytes that a rank reads and writes at least, by stage; of the exchanging form."""
    number, ranks, box = 2 * element, shape.ranks, shape.box
    lines = shape.lines(False)
    half = box * box * shape.columns
    return {
        "weights": element * shape.voxels / ranks,
        "along y": (3 * element * shape.voxels + number * lines * box) / ranks,
        "exchange": 2 * number * lines * box / ranks * (ranks > 1),
        "along z": number * (lines * box + half) / ranks,
        "along x": (number * half + element * box**3) / ranks,
        "correction": 2 * element * box**3 / ranks,
        "whole map": 4 * box**3 * (ranks > 1),
    }


def made_up(count: int, device: torch.device) -> Tensor:
    """Sums of noise [count, 4], as accumulators hold them: the same ones each time."""
    sums_V4 = torch.empty(count, 4, device=device).normal_(generator=torch.Generator(device).manual_seed(1))
    sums_V4[:, 2].abs_().add_(0.1)
    return sums_V4


def solved(box: int, ranks: Ranks, device: torch.device, rates: tuple[float, float], check: bool) -> None:
    """Print one line for a box. check: and another one for how far the map is from one GPU's."""
    whole = packed_sphere(float(box // 2 * PADDING), device)
    slabs = Slabs.of(whole, PADDING, box, ranks) if ranks.size > 1 else None
    rows = whole if slabs is None else slabs.rows
    sums_V4 = slabs.cut(made_up(whole.count, device)) if check and slabs is not None else made_up(rows.count, device)
    sums = SolvedSums(sums_V4[:, :2], sums_V4[:, 2], rows, box, box // 2, PADDING, slabs)
    prior_S = torch.full((sums.radius + 1,), 0.1, dtype=torch.float64, device=device)
    shape = Shape(box, int(box * PADDING), int(whole.radius), box, ranks.size, whole.count)
    form, sent = "alone", 0.0
    if slabs is not None:
        form = form_for(slabs, box, shape.size, box)
        sent = shape.sent_bytes(FORMS[FORMS.index(form)], 4)["to map"] + shape.collected_bytes(FORMS[FORMS.index(form)])
    took = median_ms(lambda: sums.map(prior_S), device) / 1000
    moved = moved_bytes(shape)
    copying, sending = sum(moved.values()) / rates[0], sent / rates[1] if sent else 0.0
    if ranks.is_lead:
        bound, parts = copying + sending, ", ".join(f"{name} {value / 1e9:.2f}" for name, value in moved.items())
        print(f"{box} px, {ranks.size} ranks, {form}: {took:.4f} s; bound {bound:.4f} s (copying {copying:.4f}, "
              f"sending {sending:.4f}): {bound / took:.2f} of it; GB moved: {parts}; sent {sent / 1e9:.2f}")
    if check and slabs is not None:
        found = sums.map(prior_S)
        sums_V4 = made_up(whole.count, device)
        alone = SolvedSums(sums_V4[:, :2], sums_V4[:, 2], whole, box, box // 2, PADDING).map(prior_S)
        worst = float((found - alone).abs().max() / alone.abs().max())
        if ranks.is_lead:
            print(f"{box} px, {ranks.size} ranks: {worst:.1e} of the largest voxel from the map of one", flush=True)


def main() -> None:
    """Of every rank."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--boxes", type=int, nargs="+", default=[256, 512, 800])
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--check", action="store_true")
    chosen = options.parse_args()
    with ranks_here(chosen.device) as (ranks, device, _):
        rates = copy_rate(device.type), link_rate(ranks, device) if ranks.size > 1 else 0.0
        if ranks.is_lead:
            print(f"copy {rates[0] / 1e9:.0f} GB/s, exchange {rates[1] / 1e9:.0f} GB/s, sent by each", flush=True)
        for box in chosen.boxes:
            solved(box, ranks, device, rates, chosen.check)


if __name__ == "__main__":
    main()
