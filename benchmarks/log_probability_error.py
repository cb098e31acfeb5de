"""Log-probabilities of the fast path against the float64 reference: `python -m benchmarks.log_probability_error`.

`[--device cuda] [--emulate-half] [--particles STAR --reference MRC --sym S --diameter D]`. Without particles it simulates
its own: a small protein and a hollow assembly of 4 MDa, at several strengths. Coarse and fine pass separately, on a
global grid and on one as fine as the expected accuracy asks for, over samples within 12 of each particle's best.
Bars: largest error 0.05 at total power SNR (sum |C P|^2 / sigma^2) up to 3,000, 0.1 up to 13,000; total variation of
the posterior weights 0.02 up to there; no overflow whatever the strength, or with a reference whose mean is not zero.
The reference must be on the data's grey scale. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from verglas.core.symmetry import order as order_of
from verglas.expectation.accuracy import THRESHOLD, expected_accuracy
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement.computing import Computing
from verglas.refinement.config import RefineConfig
from verglas.refinement.driver import computing, prepare
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.state import Schedule
from verglas.testing.log_probability import REFERENCE, Difference, difference, scores_of
from verglas.testing.made_up import Problem, plan_of, searched, shell_of_domains, simulate_particles

PARTICLES, AT_ONCE = 24, 6
SHARE_OF_ACCURACY = 0.3  # fine steps of the fine search; below what refinements use, so that many samples lie near the best
MOST_ORIENTATIONS = 8_000_000  # of a grid
ERROR_BARS, VARIATION_BAR = ((3300.0, 0.05), (14000.0, 0.1)), 0.02  # up to a total power SNR (a tenth more than its target)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    search: str
    step: str
    power_snr: float
    found: Difference

    def misses(self) -> bool:
        """Whether a bar is missed."""
        bar = next((bar for limit, bar in ERROR_BARS if self.power_snr <= limit), math.inf)
        variation = VARIATION_BAR if math.isfinite(bar) else math.inf
        worst, moved = float(self.found.largest_B.max()), float(self.found.variation_B.max())
        return not (self.found.finite and worst <= bar and moved <= variation)

    def __str__(self) -> str:
        worst, typical = float(self.found.largest_B.max()), float(self.found.largest_B.median())
        return (
            f"{self.name:<34} {self.search:<22} {self.step:<6} {self.power_snr:>9,.0f} {self.found.samples:>8.0f} "
            f"{worst:>8.4f} {typical:>8.4f} {float(self.found.variation_B.max()):>8.4f} "
            f"{'yes' if self.found.finite else 'NO':<6} {'MISSED' if self.misses() else ''}"
        )


HEADER = f"{'particles':<34} {'search':<22} {'pass':<6} {'power SNR':>9} {'samples':>8} {'largest':>8} {'median':>8} " + (
    f"{'TV':>8} finite"
)


def compare_paths(name: str, problem: Problem, on: Computing, rounded: bool) -> Iterator[Row]:
    """Rows of one problem, on a global grid and on a fine one."""
    n = min(PARTICLES, len(problem.data))
    for search, one in (("global", problem), ("fine", searched(problem, fine_schedule(problem)))):
        parts: list[tuple[Difference, Difference]] = []
        power = []
        for first in range(0, n, AT_ONCE):
            rows = torch.arange(first, min(first + AT_ONCE, n))
            expected = scores_of(one, REFERENCE, rows)
            got = scores_of(one, on, rows, expected.parents, rounded)
            power.append(expected.power_snr_B)
            parts.append((difference(got.coarse_N, expected.coarse_N, expected.coarse_ptr_B1),
                          difference(got.fine_N, expected.fine_N, expected.fine_ptr_B1)))  # fmt: skip
        schedule = one.plan.schedule
        text = f"{search}, {schedule.healpix_order}, {schedule.offset_step:.2f} Å"
        for step, found in zip(("coarse", "fine"), zip(*parts)):
            yield Row(name, text, step, float(torch.cat(power).mean()), joined(list(found)))


def joined(parts: list[Difference]) -> Difference:
    """The differences of several batches as one."""
    samples = sum(part.samples * len(part.largest_B) for part in parts) / sum(len(part.largest_B) for part in parts)
    return Difference(torch.cat([part.largest_B for part in parts]), torch.cat([part.variation_B for part in parts]),
                      all(part.finite for part in parts), samples)  # fmt: skip


def fine_schedule(problem: Problem) -> Schedule:
    """A local search with steps well below the expected accuracy."""
    half = HalfExpectation([problem.model], problem.data, problem.poses, problem.plan, problem.config, REFERENCE)
    rows = torch.arange(min(12, len(problem.data)))
    searcher, prepared = half.prepared(rows, 0)
    rotation_B33, pixels, group = problem.poses.rotation_B33[rows], searcher.preparer.pixels, problem.data.groups[0]
    angle = expected_accuracy(searcher.full, rotation_B33, prepared.weight_BK, pixels).angle
    finest = math.log(MOST_ORIENTATIONS * order_of(problem.config.symmetry) / 72, 8)
    order = min(int(finest), max(2, math.ceil(math.log2(60 / (2 * SHARE_OF_ACCURACY * angle)))))
    # A shift d along x lowers the logarithm by 1/2 sum W |P|^2 (2 pi x d / N)^2.
    power_BK = searcher.full(rotation_B33).square().sum(1) * prepared.weight_BK
    curvature = float((power_BK @ (2 * math.pi / group.box * pixels.x_K.double()).square()).mean())
    step = 2 * SHARE_OF_ACCURACY * math.sqrt(2 * THRESHOLD / curvature) * group.pixel_size
    schedule = Schedule(order, 1, 2.2 * step, step, perturbation=-0.2)
    return replace(schedule, local_sigma=2 * schedule.fine_angular_step)


def simulated() -> Iterator[tuple[str, Problem]]:
    """A small protein, and a capsid of 4 MDa, at several strengths; references whose mean is not zero."""
    small = shell_of_domains(1750, 0.0, 45.0).symmetrised("D2")
    large = shell_of_domains(4700, 100.0, 140.0).symmetrised("I1")
    for power in (800.0, 3000.0, 13_000.0, 1e5):
        yield f"100 kDa, D2, 64 x 3 Å, {power:,.0f}", simulate_particles(small, 64, 3.0, PARTICLES, power, "D2")
    for power in (3000.0, 13_000.0, 1e5):
        yield f"4 MDa, I1, 128 x 3 Å, {power:,.0f}", simulate_particles(large, 128, 3.0, PARTICLES, power, "I1")
    for share in (0.3, 10.0):
        problem = simulate_particles(small, 64, 3.0, PARTICLES, 3000.0, "D2")
        map_ZYX = problem.model.map_ZYX + share * float(problem.model.map_ZYX.max())
        yield f"mean off by {share:g} of the largest", replace(problem, model=replace(problem.model, map_ZYX=map_ZYX))


def real(particles: Path, reference: Path, symmetry: str, diameter: float) -> tuple[str, Problem]:
    """Particles of a file with the poses it holds, against a map on their grey scale."""
    table = ParticleTable.read(particles)
    table = table.subset(min(len(table), 500), 0)
    pixel_size = table.groups[0].pixel_size
    config = RefineConfig(diameter=diameter, symmetry=symmetry, initial_resolution=2 * pixel_size)
    session = prepare(table, read_map(reference), config)
    schedule = Schedule(2, 1, 5 * pixel_size, 2 * pixel_size, perturbation=0.3)
    plan = plan_of(schedule, session.config, session.data.groups[0], session.state.box // 2)
    problem = Problem(session.state.halves[0], session.data, session.state.poses, plan, session.config)
    return particles.name, searched(problem, schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--emulate-half", action="store_true", help="half-precision operands, emulated on the CPU")
    parser.add_argument("--particles", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--sym", default="C1")
    parser.add_argument("--diameter", type=float, default=200.0)
    options = parser.parse_args()
    on, chosen = computing(torch.device(options.device), RefineConfig(diameter=options.diameter))
    half = "; operands rounded to float16" if options.emulate_half else ""
    print(f"{chosen['device']}, {chosen['kernels']}, {chosen['precision']}{half}\n{HEADER}")
    if options.particles:
        problems = iter([real(options.particles, options.reference, options.sym, options.diameter)])
    else:
        problems = simulated()
    missed = 0
    for name, problem in problems:
        if options.only not in name:
            continue
        for row in compare_paths(name, problem, on, options.emulate_half):
            print(row, flush=True)
            missed += row.misses()
    print(f"{missed} bars missed" if missed else "all bars met")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
