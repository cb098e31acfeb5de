"""From images to a map at large boxes: backprojection of 1,000 images, then plain and exact gridding; seconds and peak memory.

python -m benchmarks.gridding --boxes 200 400 [--device cuda] [--images 1000]
Images are noise: times depend on none of it. The floor of exact gridding is what its transforms alone must move.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.gridding import ITERATIONS
from verglas.maximization.solve import gather_sums
from verglas.nufft.fine import smooth_size


def seconds(work: Callable[[], object], device: str, repeats: int = 2) -> float:
    """The quickest of some; on a CPU, processor time."""
    best = math.inf
    for _ in range(repeats):
        wait(device)
        start = now(device)
        work()
        wait(device)
        best = min(best, now(device) - start)
    return best


def now(device: str) -> float:
    return time.perf_counter() if device == "cuda" else time.process_time()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 3)


def add(sums: Accumulator, images: int) -> None:
    """Backproject images of noise, in batches."""
    device = sums.running_V4.device
    pixels = half_plane_pixels(sums.box)
    coordinates_K3 = pixels.coordinates_K3(torch.float32).to(device)
    batch = max(1, min(images, 2**27 // pixels.count))
    data_B2K = torch.randn(batch, 2, pixels.count, device=device)
    weight_BK = torch.rand(batch, pixels.count, device=device)
    rotation_B33 = random_rotations(images, torch.Generator().manual_seed(0))
    for first in range(0, images, batch):
        some_B33 = rotation_B33[first : first + batch]
        sums.add(data_B2K[: len(some_B33)], weight_BK[: len(some_B33)], some_B33, coordinates_K3)


def measure(box: int, images: int, device: str, rate: float) -> None:
    """Print one line."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sums = Accumulator(box, device=device)
    adding = seconds(lambda: add(sums, images), device, 1)
    solved = gather_sums([sums], consume=True)
    plain = seconds(solved.map, device)
    exact = seconds(replace(solved, exact=True).map, device)
    size = smooth_size(2 * int(solved.rows.radius) + 3)
    moved = ITERATIONS * (2 * 3 + 1) * 2 * 4 * size**3  # two transforms of three passes, one product: each reads and writes all
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else math.nan
    print(
        f"{box} px: {images} images added {adding:.3f} s, map plain {plain:.4f} s, exact {exact:.4f} s (floor of its "
        f"convolutions {moved / rate:.4f} s); peak {peak:.2f} GB, {100 * peak * 1e9 / (11 * (2 * box) ** 3):.0f} % of RELION's",
        flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, nargs="+", default=[200, 300, 400])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    rate = copy_rate(options.device)
    print(f"copies move {rate / 1e12:.2f} TB/s")
    for box in options.boxes:
        try:
            measure(box, options.images, options.device, rate)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"{box} px: {str(error)[:300]}", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
