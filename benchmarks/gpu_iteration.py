"""Steady iterations at fixed sampling: `python -m benchmarks.gpu_iteration --model 6wg6_C1.npz [--out FIGURES.json]`.

10,000 x 128 px of 2.6 Å, SNR 0.05, C1, diameter 240 Å, offsets 5 px in steps of 2 px, oversampling 1, start at 40 Å, first
iteration by correlation, tau2_fudge 4, images in memory: the shape of RELION's Class3D. Five iterations; the median of
the third to fifth counts. Prints the mean number of significant samples with each time, the floor of each stage, the kernels that
took most in one more iteration under CUPTI, and times with the GPU's memory capped. K=1 here are two half-sets with a model each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import verglas.kernels
from benchmarks.figures import publish
from benchmarks.floors import Ceilings, Work, ceilings, floors
from benchmarks.gpu_busy import traced
from benchmarks.simulated import simulated
from verglas.cli.plan import this_machine
from verglas.expectation.sampling import OrientationGrid
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import driver
from verglas.refinement import schedule as sampling
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Problem, half_plane_count
from verglas.refinement.state import State
from verglas.refinement.step import Iteration, iterate, plan_of

KERNELS = sorted(path.parent.name for path in Path(verglas.kernels.__file__).parent.glob("*/triton.py"))


@dataclass(frozen=True)
class Timed:
    """Iterations of one sampling. seconds, significant: of each; last: its outcome."""

    seconds: list[float]
    significant: list[float]
    last: Iteration

    @property
    def steady(self) -> float:
        """Median of the iterations from the third on."""
        return statistics.median(self.seconds[2:])


def configuration(order: int, diameter: float) -> RefineConfig:
    """RELION's Class3D options; order: HEALPix, of the coarse grid."""
    return RefineConfig(
        diameter=diameter, initial_resolution=40.0, healpix_order=order, offset_range=5.0, offset_step=2.0, oversampling=1,
        tau2_fudge=4.0, local_from_order=order + 1,
    )  # fmt: skip


def prepared(data: Path, config: RefineConfig, device: torch.device, cap: float | None = None) -> driver.Session:
    """Images read as `verglas refine` would, planned for the memory that is free. cap: bytes of the device, if it is capped."""
    table = ParticleTable.read(data / "particles.star")
    group, machine = table.groups[0], this_machine(device)
    if cap is not None:
        machine = replace(machine, device_memory=min(cap, machine.device_memory))
    planned = plan(Problem(len(table), group.box, group.pixel_size), config, machine)
    planned.check()
    return driver.prepare(table, read_map(data / "start.mrc"), config, device, planned=planned)


def with_order(session: driver.Session, order: int) -> driver.Session:
    """The session before its first iteration, on another grid."""
    config = replace(session.config, healpix_order=order, local_from_order=order + 1)
    schedule = sampling.initial_schedule(config, session.state.pixel_size)
    count = OrientationGrid.build(order, config.oversampling, config.symmetry, 0.0).n_directions
    flat_D = torch.full((count,), 1 / count, dtype=torch.float64)
    halves = [replace(half, direction_prior_D=flat_D) for half in session.state.halves]
    return replace(session, config=config, state=replace(session.state, schedule=schedule, halves=halves))


def held(state: State) -> State:
    """The state with its sampling kept: as if the resolution had just improved."""
    return replace(state, schedule=replace(state.schedule, iterations_without_gain=0, fine_enough=False))


def steps(session: driver.Session) -> Iterator[tuple[float, Iteration]]:
    """(seconds, iteration) on and on, the sampling fixed. An iteration ends with its maps on the host: nothing is left to run."""
    state = session.state
    while True:
        begin = time.perf_counter()
        done = iterate(state, session.data, session.config, session.on, session.mask_ZYX, driver.quiet)
        yield time.perf_counter() - begin, done
        state = held(done.state)


def timed(session: driver.Session, count: int, title: str) -> Timed:
    """Run `count` iterations, print each."""
    seconds, significant = [], []
    for took, done in steps(session):
        seconds.append(took)
        significant.append(float(done.state.poses.significant_B.double().mean()))
        parts = ", ".join(f"{name} {value:.3f}" for name, value in done.seconds.items())
        print(f"{title}, iteration {done.state.iteration}: {took:.3f} s ({parts}), significant {significant[-1]:.1f}, size "
              f"{done.state.current_size} px, Pmax {float(done.state.poses.pmax_B.mean()):.3f}", flush=True)  # fmt: skip
        if len(seconds) == count:
            return Timed(seconds, significant, done)
    raise AssertionError("iterations do not end by themselves")


def work_of(session: driver.Session, timed: Timed) -> Work:
    """Counts of the last iteration, for its floor."""
    state = timed.last.state
    plan = plan_of(state, session.config, False)
    grid, offsets, model = plan.grid, plan.offsets, plan.model_grid
    padded = round(session.config.padding * state.box)
    return Work(
        len(session.data), state.box, half_plane_count(model.coarse_radius), half_plane_count(model.radius), grid.count,
        len(offsets.coarse_T2), timed.significant[-1], grid.children_per_orientation, offsets.children_per_offset,
        padded**2 * (padded // 2 + 1), len(state.halves),
    )  # fmt: skip


def figures_of(title: str, session: driver.Session, timed: Timed, rates: Ceilings | None) -> dict[str, float]:
    """Time, significant samples; with rates (on a GPU) floors, and the kernels of one more iteration."""
    found = {f"{title} s": timed.steady, f"{title} significant": statistics.median(timed.significant[2:])}
    if rates is None:
        return found
    least = floors(work_of(session, timed), rates)
    found |= {f"{title} floor s": sum(least.values())}
    found |= {f"{title} {name} floor s": value for name, value in least.items()}
    again = replace(session, state=held(timed.last.state))
    trace = traced(lambda: next(steps(again)))
    found |= {f"{title} kernels, {name} s": value for name, value in trace.by_kind(KERNELS).items()}
    found[f"{title} busy share"] = trace.busy / trace.wall
    for name, launches, seconds in trace.longest():
        print(f"    {1e3 * seconds:8.2f} ms {launches:6d} x {name[:90]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--pixel", type=float, default=2.6)
    parser.add_argument("--diameter", type=float, default=240.0)
    parser.add_argument("--orders", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--cap", type=float, default=11.0, help="GB of GPU memory in the capped runs; 0: none")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu: times and samples only")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or Path(scratch)) / "iteration"
        data = simulated(folder, options.model, options.particles, options.box, options.pixel)
        found = measured(data, options)
        if options.cap and options.device.type == "cuda":
            torch.cuda.empty_cache()
            found |= capped(data, options, found)
        publish(found, options.out)


def measured(data: Path, options: argparse.Namespace) -> dict[str, float]:
    """Every order with all the memory there is."""
    rates, found = None, {}
    if options.device.type == "cuda":
        rates = ceilings()
        print(f"{torch.cuda.get_device_name()}: products {rates.products / 1e12:.0f} TFLOP/s, memory {rates.memory / 1e12:.2f} "
              f"TB/s, cache {rates.cache / 1e12:.2f} TB/s")  # fmt: skip
    session = prepared(data, configuration(options.orders[0], options.diameter), options.device)
    for order in options.orders:
        title, one = f"K=1 order {order}", with_order(session, order)
        found |= figures_of(title, one, timed(one, options.iterations, title), rates)
    return found


def capped(data: Path, options: argparse.Namespace, free: dict[str, float]) -> dict[str, float]:
    """Every order again in `options.cap` GB of the device, and how many times longer that takes than in `free`."""
    cap, found = options.cap * 1e9, {}
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    session = prepared(data, configuration(options.orders[0], options.diameter), options.device, cap)
    for order in options.orders:
        title = f"K=1 order {order}"
        seconds = timed(with_order(session, order), options.iterations, f"{title}, {options.cap:g} GB").steady
        found |= {f"{title} capped s": seconds, f"{title} capped ratio": seconds / free[f"{title} s"]}
    return found


if __name__ == "__main__":
    main()
