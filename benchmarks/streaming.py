"""An iteration whose images are read from disk all the while, beside reading alone and beside computing with all in memory.

    python -m benchmarks.streaming [--n 20000] [--box 128] [--order 2] [--image-memory 0.131] [--device cpu] [--turns 3]
                                   [--keep DIR] [--out FIGURES.json]

Simulates particles, then measures (1) reading their stack from a cold page cache, from front to back, (2) one iteration with
all images in memory, (3) the same iteration with at most --image-memory GB of images in memory, from a cold page cache; in
turns, of which medians count. Publishes the ratio of (3) to the slower of (1) and (2); ends with 1 if poses, noise or maps
differ (on a CPU: in any bit).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.figures import publish
from verglas.cli.main import main as verglas
from verglas.cli.plan import this_machine
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import driver
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Problem
from verglas.refinement.state import State

SAME_ON_GPU = 1e-3  # of the largest value: sums there have no fixed order


def simulate(folder: Path, n: int, box: int, device: str) -> None:
    """Particles with a field of view of 256 Å, unless they are there."""
    if not (folder / "particles.star").exists():
        words = ["simulate", "--n", str(n), "--box", str(box), "--pixel", f"{256 / box:.4f}", "--snr", "0.05", "--seed", "1"]
        assert verglas([*words, "--device", device, "--out", str(folder)]) == 0


def drop_cache(path: Path) -> None:
    """Let the system forget the file's pages (it keeps those that are not yet on disk: these are written first)."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def reading(path: Path) -> float:
    """Seconds to read a file that is not in the page cache, front to back, in pieces of 8 MB."""
    drop_cache(path)
    buffer, start = bytearray(2**23), time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def iteration(session: driver.Session) -> tuple[float, State]:
    """(seconds, state) of the next iteration."""
    start = time.perf_counter()
    done = next(driver.iterations(session))
    if session.on.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, done.state


def measure(folder: Path, config: RefineConfig, device: torch.device, turns: int) -> dict[str, float]:
    """Figures by name; config.image_memory_gb is what streaming may take. SystemExit if the results are not the same."""
    table, reference = ParticleTable.read(folder / "particles.star"), read_map(folder / "start.mrc")
    planned = plan(Problem.of(table), config, this_machine(device))
    planned.check()
    assert planned.residency.streams, "the images fit: give less --image-memory"
    print(f"{planned.residency.reason}; batches of {planned.iterations[0].batch}")
    in_memory = replace(planned, residency=replace(planned.residency, home="device"))  # in the same batches
    stack = folder / "particles.mrcs"
    seconds: list[list[float]] = [[], [], []]
    for turn in range(turns + 1):
        resident, expected = iteration(driver.prepare(table, reference, config, device, planned=in_memory))
        session = driver.prepare(table, reference, config, device, planned=planned)
        read = reading(stack)
        drop_cache(stack)
        streamed, found = iteration(session)
        if not same(found, expected, 0 if device.type == "cpu" else SAME_ON_GPU):
            raise SystemExit("streamed images gave other poses, noise or maps than images in memory")
        if turn:  # the first one compiles kernels
            for values, value in zip(seconds, (read, resident, streamed)):
                values.append(value)
    read, resident, streamed = (median(values) for values in seconds)
    figures = {"reading cold GB/s": stack.stat().st_size / 1e9 / read, "reading cold s": read, "images in memory s": resident}
    return figures | {"streamed cold s": streamed, "streamed ratio": streamed / max(read, resident)}


def same(found: State, expected: State, tolerance: float) -> bool:
    """Whether maps, noise and poses agree; tolerance: share of the largest value."""
    pairs: list[tuple[Tensor, Tensor]] = [(found.poses.rotation_B33, expected.poses.rotation_B33)]
    for one, other in zip(found.halves, expected.halves, strict=True):
        pairs += [(one.map_ZYX, other.map_ZYX), (one.sigma2_noise_GS, other.sigma2_noise_GS)]
    if tolerance == 0:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(bool((a - b).abs().max() <= tolerance * b.abs().max()) for a, b in pairs[1:])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--order", type=int, default=2, help="HEALPix, coarse")
    parser.add_argument("--image-memory", type=float, default=0.131, help="GB")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    parser.add_argument("--keep", type=Path, help="folder for the particles, used again if they are there")
    options = parser.parse_args()
    config = RefineConfig(
        diameter=200.0, initial_resolution=40.0, healpix_order=options.order, image_memory_gb=options.image_memory
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)) / f"{options.n}x{options.box}"
        simulate(folder, options.n, options.box, options.device)
        publish(measure(folder, config, torch.device(options.device), options.turns), options.out)


if __name__ == "__main__":
    main()
