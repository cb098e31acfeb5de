"""Which form of the shared transform of a map is quickest, and whether the model of a dozen probes chooses it.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.volume_transforms --device cpu --boxes 20 36 56 72
    torchrun --standalone --nproc-per-node 4 -m benchmarks.volume_transforms --device cuda --boxes 128 224 360 512 --largest 800

A line for each box, padding and radius that no probe had: seconds of the three forms, the one that is chosen, and how much longer
it takes than the quickest. At the end: how many choices are within 10 % of the best.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from verglas.core.rows import packed_sphere
from verglas.distributed.ranks import Ranks
from verglas.maximization.slabs import Slabs
from verglas.maximization.transform_costs import FORMS, WAYS, Costs, Form, Shape, fitted
from verglas.maximization.transform_probes import both_ways, measured, name_of, seconds
from verglas.maximization.transforms import SharedTransform

NEAR = 1.1  # times the seconds of the quickest form
VARIANTS = [(2.0, 1.0), (2.0, 0.7), (1.5, 1.0)]  # padding, share of the shells


def one_shape(costs: Costs, ranks: Ranks, device: torch.device, box: int, padding: float, share: float) -> list[float]:
    """Print what the forms take; the choice's seconds over the best's, for both ways."""
    size = 2 * int(box * padding / 2)
    slabs = Slabs.of(packed_sphere(float(int(share * size / 2)), device), size / box, box, ranks)
    if slabs is None:
        return []
    shape, took = Shape.of(slabs, box, size, box), dict[tuple[str, Form], float]()
    for form in FORMS:
        for way, work in zip(WAYS, both_ways(SharedTransform(slabs, box, size, form)), strict=True):
            took[way, form] = seconds(work, ranks, device, 5)
    ratios = []
    for way in WAYS:
        chosen = costs.choice(shape, way)
        ratios.append(took[way, chosen] / min(took[way, form] for form in FORMS))
        if ranks.is_lead:
            cells = [f"{1000 * took[way, form]:9.2f} ({1000 * costs.seconds(shape, way, form):9.2f})" for form in FORMS]
            print(f"{way:8s} {box:5d} {padding:4.1f} {share:4.1f} {'  '.join(cells)}  {chosen:10s} {ratios[-1]:5.2f}", flush=True)
    return ratios


def main() -> None:
    """Of every rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--boxes", type=int, nargs="+", default=[20, 36, 56, 72])
    parser.add_argument("--largest", type=int, help="one more box, at padding 2 and all shells")
    given = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    cuda = given.device == "cuda"
    device = torch.device("cuda", rank % local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    ranks = Ranks(rank, size, local)
    if ranks.is_lead:
        print(name_of(ranks, device))
        names = "  ".join(f"{form:>10s} ms (model)" for form in FORMS)
        print(f"{'':8s} {'box':>5s} {'pad':>4s} {'rad':>4s} {names}  chosen, ratio")
    costs = ranks.agreed(fitted(measured(ranks, device)))
    shapes = [(box, padding, share) for box in given.boxes for padding, share in VARIANTS]
    shapes += [(given.largest, 2.0, 1.0)] if given.largest else []
    ratios = [ratio for shape in shapes for ratio in one_shape(costs, ranks, device, *shape)]
    if ranks.is_lead:
        near = sum(ratio <= NEAR for ratio in ratios)
        print(f"{near} of {len(ratios)} choices within {NEAR - 1:.0%} of the best; worst {max(ratios):.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
