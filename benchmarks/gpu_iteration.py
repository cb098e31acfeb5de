"""Steady iterations at fixed sampling: `python -m benchmarks.gpu_iteration --model 6wg6_C1.npz [--out FIGURES.json]`.

10,000 x 128 px of 2.6 Å, SNR 0.05, C1, diameter 240 Å, offsets 5 px in steps of 2 px, oversampling 1, start at 40 Å, first
iteration by correlation, tau2_fudge 4, images in memory: a 3-D classification with K classes, as RELION's Class3D. Five
iterations, done twice so that all kernels are compiled; the median of the third to fifth counts. Prints the mean number of
significant samples with each time (the time is proportional to it), the floor of each stage, the kernels that took most in
one more iteration under CUPTI, and times with the GPU's memory capped.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import verglas.kernels
from benchmarks.figures import publish
from benchmarks.floors import Ceilings, Work, ceilings, floors
from benchmarks.gpu_busy import kernel_owners, traced
from benchmarks.simulated import simulated
from verglas.cli.plan import this_machine
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import classes, driver
from verglas.refinement.accuracy import plan_of
from verglas.refinement.config import ClassifyConfig, RefineConfig
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Problem, half_plane_count
from verglas.refinement.state import State
from verglas.refinement.step import Iteration

STAGES = {  # stage of floors.py -> kinds of kernels that do it
    "preparing": ("transforms", "shift"), "slicing": ("project",), "coarse products": ("products", "coarse"),
    "fine products": ("compare", "match"), "backprojection": ("backproject",),
}  # fmt: skip
CASES = ((1, 2), (1, 3), (4, 2))  # classes, HEALPix order of the coarse grid


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


def prepared(data: Path, case: tuple[int, int], options: argparse.Namespace) -> driver.Session:
    """Images read as a command of verglas would, planned for the memory that is free and allowed. case: classes, order."""
    config = ClassifyConfig(
        diameter=options.diameter, classes=case[0], healpix_order=case[1], initial_resolution=40.0, offset_range=5.0,
        offset_step=2.0, oversampling=1, tau2_fudge=4.0, max_iterations=options.iterations,
    )  # fmt: skip
    table = ParticleTable.read(data / "particles.star")
    alike = RefineConfig(diameter=options.diameter, healpix_order=case[1], local_from_order=case[1] + 1)  # as large as it gets
    planned = plan(Problem.of(table), alike, this_machine(options.device))
    planned.check()
    return classes.prepare(table, [read_map(data / "start.mrc")], config, options.device, planned=planned)


def next_iteration(session: driver.Session, state: State) -> Iteration:
    """One more. It ends with its maps on the host: nothing is left to run."""
    assert isinstance(session.config, ClassifyConfig)
    return classes.iterate(state, session.data, session.config, session.on, session.mask_ZYX, driver.quiet)


def timed(session: driver.Session, count: int, title: str) -> Timed:
    """Run `count` iterations, print each."""
    seconds, significant, state = [], [], session.state
    while True:
        begin = time.perf_counter()
        done = next_iteration(session, state)
        seconds.append(time.perf_counter() - begin)
        state = done.state
        significant.append(float(state.poses.significant_B.double().mean()))
        parts = ", ".join(f"{name} {value:.3f}" for name, value in done.seconds.items())
        print(f"{title}, iteration {state.iteration}: {seconds[-1]:.3f} s ({parts}), significant {significant[-1]:.1f}, size "
              f"{state.current_size} px, Pmax {float(state.poses.pmax_B.mean()):.3f}", flush=True)  # fmt: skip
        if len(seconds) == count:
            return Timed(seconds, significant, done)


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
    found = {f"{title} s": timed.steady, f"{title} significant": statistics.median(timed.significant[2:]),
             f"{title} size px": timed.last.state.current_size}  # fmt: skip
    if rates is None:
        return found
    least = floors(work_of(session, timed), rates)
    found |= {f"{title} floor s": sum(least.values())}
    found |= {f"{title} {name} floor s": value for name, value in least.items()}
    trace = traced(lambda: next_iteration(session, timed.last.state))
    kinds = trace.by_kind(kernel_owners(Path(verglas.kernels.__file__).parent))
    found |= {f"{title} kernels, {name} s": value for name, value in kinds.items()}
    found |= {f"{title} {stage} s": sum(kinds.get(kind, 0.0) for kind in parts) for stage, parts in STAGES.items()}
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
    """Every case with all the memory there is."""
    rates: Ceilings | None = None
    found: dict[str, float] = {}
    if options.device.type == "cuda":
        rates = ceilings()
        found = {f"rate of {name} G/s": value / 1e9 for name, value in vars(rates).items()}
        print(f"{torch.cuda.get_device_name()}: products {rates.products / 1e12:.0f} TFLOP/s, memory {rates.memory / 1e12:.2f} "
              f"TB/s, cache {rates.cache / 1e12:.2f} TB/s")  # fmt: skip
    for case in CASES:
        title, session = title_of(case), prepared(data, case, options)
        if rates is not None:
            timed(session, options.iterations, f"{title}, compiling")
        found |= figures_of(title, session, timed(session, options.iterations, title), rates)
    return found


def title_of(case: tuple[int, int]) -> str:
    """Beginning of the names of figures: 'K=4 order 2'."""
    return f"K={case[0]} order {case[1]}"


def capped(data: Path, options: argparse.Namespace, free: dict[str, float]) -> dict[str, float]:
    """The cases of one class again in `options.cap` GB of the device, and how many times longer that takes than in `free`."""
    found: dict[str, float] = {}
    torch.cuda.set_per_process_memory_fraction(options.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    for case in CASES:
        if case[0] == 1:
            title, session = title_of(case), prepared(data, case, options)
            seconds = timed(session, options.iterations, f"{title}, {options.cap:g} GB").steady
            found |= {f"{title} capped s": seconds, f"{title} capped ratio": seconds / free[f"{title} s"]}
    return found


if __name__ == "__main__":
    main()
