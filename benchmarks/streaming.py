"""An iteration whose images are read from disk all the while, beside reading alone and beside computing with all in memory.

    python -m benchmarks.streaming [--n 20000] [--box 128] [--order 2] [--image-memory 0.131] [--device cpu] [--keep DIR]

Simulates particles, then measures (1) reading their stack from a cold page cache, from front to back, (2) one iteration with
all images in memory, (3) the same iteration with at most --image-memory GB of images in memory, from a cold page cache.
Prints the ratio of (3) to the slower of (1) and (2), and ends with 1 if it is above 1.15, or if poses, noise or maps differ
(on a CPU: in any bit).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from verglas.cli.main import main as verglas
from verglas.cli.plan import this_machine
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import driver
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Problem
from verglas.refinement.state import State

HIGHEST = 1.15
SAME_ON_GPU = 1e-3  # of the largest value: sums there have no fixed order


@dataclass(frozen=True)
class Times:
    """Seconds: reading the files cold; the iteration with all images in memory; the same with images streamed."""

    reading: float
    resident: float
    streamed: float
    identical: bool

    @property
    def ratio(self) -> float:
        """Of the streamed iteration to the slower of what it overlaps."""
        return self.streamed / max(self.reading, self.resident)


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


def measure(folder: Path, config: RefineConfig, device: torch.device) -> Times:
    """All three; config.image_memory_gb is what streaming may take."""
    table, reference = ParticleTable.read(folder / "particles.star"), read_map(folder / "start.mrc")
    planned = plan(Problem.of(table), config, this_machine(device))
    planned.check()
    assert planned.residency.streams, "the images fit: give less --image-memory"
    print(f"{planned.residency.reason}; batches of {planned.iterations[0].batch}")
    in_memory = replace(planned, residency=replace(planned.residency, home="device"))  # in the same batches
    session = driver.prepare(table, reference, config, device, planned=in_memory)
    iteration(replace(session, config=replace(config, healpix_order=0)))  # kernels are compiled
    resident, expected = iteration(session)
    del session
    session = driver.prepare(table, reference, config, device, planned=planned)
    read = reading(folder / "particles.mrcs")
    drop_cache(folder / "particles.mrcs")
    streamed, found = iteration(session)
    return Times(read, resident, streamed, same(found, expected, 0 if device.type == "cpu" else SAME_ON_GPU))


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
    parser.add_argument("--keep", type=Path, help="folder for the particles, used again if they are there")
    options = parser.parse_args()
    config = RefineConfig(
        diameter=200.0, initial_resolution=40.0, healpix_order=options.order, image_memory_gb=options.image_memory
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)) / f"{options.n}x{options.box}"
        simulate(folder, options.n, options.box, options.device)
        times = measure(folder, config, torch.device(options.device))
        gigabytes = (folder / "particles.mrcs").stat().st_size / 1e9
    print(f"reading {gigabytes:.2f} GB cold   {times.reading:8.2f} s  ({gigabytes / times.reading:.2f} GB/s)")
    print(f"all images in memory  {times.resident:8.2f} s")
    print(f"streamed, cold        {times.streamed:8.2f} s   {times.ratio:.3f} of the slower (bar {HIGHEST})")
    print(f"poses, noise, maps    {'the same' if times.identical else 'DIFFERENT'}")
    sys.exit(0 if times.identical and times.ratio <= HIGHEST else 1)


if __name__ == "__main__":
    main()
