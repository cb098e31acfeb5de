"""The least time that each stage of an iteration can take: operations over the rate of the unit that does them, bytes over the
bandwidth of the memory that they cross, whichever is longer. Rates are measured in the same run (`ceilings`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

HALF, SINGLE = 2, 4  # bytes
SECTOR = 32  # bytes that a cache hands out at once
SECTORS_PER_SAMPLE = 2.0  # of a slice, counted over random planes that are read from the copy whose rows lie in them
CORNERS, ADDED = 8, 16  # voxels that a sample is spread over, bytes added at each (data, weight, padding)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device. products: flop/s of a half-precision product; memory, cache: bytes/s read and written by
    a copy of much more, of less than the second-level cache."""

    products: float
    memory: float
    cache: float


@dataclass(frozen=True)
class Work:
    """What one iteration over all particles has to do. coarse, full: coefficients of the half plane in the two searches;
    orientations, offsets: of the coarse grid; significant: mean number of coarse samples kept for a particle; slices, samples:
    fine ones for each particle; volume: voxels of the padded transform; references: half-sets times classes."""

    particles: int
    box: int
    coarse: int
    full: int
    orientations: int
    offsets: int
    significant: float
    children: int
    children_of_offset: int
    volume: int
    references: int

    @property
    def samples(self) -> float:
        """Fine samples of a particle."""
        return self.significant * self.children * self.children_of_offset

    @property
    def slices(self) -> float:
        """Fine slices of a particle, at the fewest: as if the significant samples shared orientations among all offsets."""
        return max(1.0, self.significant / self.offsets) * self.children


def floors(work: Work, rates: Ceilings) -> dict[str, float]:
    """Seconds of each stage at the least; see docs/performance.md for the counts."""
    n, references = work.particles, work.references
    pixels = n * work.box**2
    images = pixels * SINGLE + 2 * pixels * SINGLE * 2 + n * (work.full + work.offsets * work.coarse) * 2 * HALF
    coarse_flops = 4.0 * n * work.offsets * work.coarse * work.orientations + 2.0 * n * work.coarse * work.orientations
    coarse_bytes = 2 * HALF * (n * work.offsets * work.coarse + references * work.orientations * work.coarse)
    taken = references * work.orientations * work.coarse + n * work.slices * work.full
    return {
        "preparing": images / rates.memory,
        "slicing": taken * SECTORS_PER_SAMPLE * SECTOR / rates.cache,
        "coarse products": max(coarse_flops / rates.products, coarse_bytes / rates.memory),
        "fine products": 4.0 * n * work.samples * work.full / rates.products,
        "backprojection": n * work.slices * work.full * CORNERS * ADDED / rates.cache,
        "solution": references * work.volume * (3 * 2 * 8 + 16) / rates.memory,
    }


def ceilings() -> Ceilings:
    """Measure the rates of the present GPU; random data (zeros run faster), medians of device events."""
    import torch

    def copy_rate(size: int) -> float:
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * size / device_seconds(lambda: target.copy_(source))

    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(left)
    products = 2 * n**3 / device_seconds(lambda: torch.mm(left, right, out=out))
    return Ceilings(products, copy_rate(2**31), copy_rate(2**24))


def device_seconds(work: Callable[[], object], repeats: int = 9, inner: int = 10) -> float:
    """Median time of `work` on the device; `inner` in a row between two events, so that launches do not count."""
    import torch

    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / inner)
    return sorted(times)[repeats // 2]
