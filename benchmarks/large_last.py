"""The last iteration of a refinement of large boxes: memory against the plan, seconds by stage; by several ranks, the same maps.

    python -m benchmarks.large_last --model 5a1a.npz --box 800 --particles 200 --pixel 0.4 --work DIR --keep one.npz
    torchrun --standalone --nproc-per-node 4 -m benchmarks.large_last ... --against one.npz

Particles are simulated with known poses (unless DIR holds them) and searched about these on a fine grid, all shells, as the last
iteration does: both half-sets, then the map of all. --keep: coefficients of the lowest shells for --against, which prints the
largest difference of a shell, relative to the power of that shell. One GPU cuts slices from references in half precision where
these fit, ranks with layers of them from single precision; with --single-slices one GPU does so, too. Device memory is what
PyTorch had allocated, and held, at most in each stage, with the plan's sums beside it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.device_peak import Peak, device_peak
from benchmarks.large_set import large_set
from benchmarks.simulated import simulated
from verglas.cli.plan import this_machine
from verglas.distributed.meeting import joined
from verglas.distributed.place import place_of
from verglas.distributed.ranks import Ranks
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import driver, step
from verglas.refinement.config import RefineConfig
from verglas.refinement.costs import CONTEXT_BYTES
from verglas.refinement.plan import RunPlan, plan, with_iterations
from verglas.refinement.plan_memory import batch_items, reference_items, resident, solution_phases
from verglas.refinement.plan_sizes import Problem

GB = 1e9
FIXED = ("context of CUDA", "held between arrays", "program and libraries")
MOST_SHELLS = 64  # that are compared


def low_coefficients(map_ZYX: torch.Tensor) -> np.ndarray:
    """Coefficients of the lowest shells of a map: what another run is compared with."""
    fourier = torch.fft.rfftn(map_ZYX.float())
    reach = min(MOST_SHELLS, len(map_ZYX) // 2)
    rows = torch.cat([torch.arange(reach), torch.arange(-reach, 0)]) % len(map_ZYX)
    return fourier[rows][:, rows, :reach].numpy()


def differences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative difference of two maps per shell, of their coefficients."""
    reach = found.shape[2]
    axis = np.concatenate([np.arange(reach), np.arange(-reach, 0)])
    shell = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + np.arange(reach) ** 2).round().astype(int)
    wrong, power = (np.bincount(shell.ravel(), np.abs(v).ravel() ** 2)[:reach] for v in (found - expected, expected))
    return np.sqrt(wrong / power.clip(1e-300))


def planned_run(table: ParticleTable, config: RefineConfig, device: torch.device, ranks: Ranks, cells: bool) -> RunPlan:
    """The plan of this rank; with volumes in layers, if the environment asks for these. cells: references may be in half
    precision, too."""
    machine = replace(this_machine(device, ranks.local_size), ranks=ranks.size)
    made = plan(Problem.of(table, ranks.size), config, machine)
    in_layers = driver.volumes_in_layers(config, made, ranks)
    if in_layers == made.in_layers and (cells or not made.cells):
        return made
    other = replace(made, in_layers=in_layers, cells=made.cells and cells and not in_layers)
    return with_iterations(other, [one.sizes for one in made.iterations])


def phases(made: RunPlan) -> dict[str, float]:
    """Bytes of arrays of the device that are planned for each part of the last iteration."""
    last = made.iterations[-1]
    parts = {"the reference": reference_items(made, last.sizes), "batches": batch_items(made, last.sizes, last.batch)}
    parts |= {f"solving ({number})": items for number, items in enumerate(solution_phases(made, last.sizes), 1)}
    always = [item for item in resident(made, last.sizes) if item.name not in FIXED]
    return {name: sum(one.bytes for one in [*always, *items] if one.where == "device") for name, items in parts.items()}


def watched_stages(by_line: bool) -> dict[str, Peak]:
    """Watch the device's memory in every stage of the iterations to come."""
    found: dict[str, Peak] = {}
    plain = step.Stopwatch.__call__

    @contextmanager
    def watched(watch: step.Stopwatch, stage: str) -> Iterator[None]:
        with plain(watch, stage), device_peak(by_line) as found[stage]:
            yield

    step.Stopwatch.__call__ = watched  # type: ignore[method-assign]
    return found


def last_iteration(given: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
    """Of one rank: go through it and print."""
    begin = time.perf_counter()
    table, truth = ParticleTable.read(given.work / "truth.star"), read_map(given.work / "truth.mrc")
    field = given.box * given.pixel
    config = RefineConfig(diameter=0.8 * field, symmetry=given.sym, initial_resolution=max(4 * given.pixel, field / 50),
                          absolute_greyscale=True, healpix_order=given.order, max_iterations=0,
                          memory_gb=given.memory)  # fmt: skip
    made = planned_run(table, config, device, ranks, not given.single_slices)
    session = driver.prepare(table, truth, config, device, planned=made, ranks=ranks)
    print(f"ready after {time.perf_counter() - begin:.1f} s", flush=True)
    stages = watched_stages(ranks.is_lead and given.lines) if device.type == "cuda" else {}
    (done,) = driver.iterations(session)
    assert done.final is not None
    if ranks.is_lead:
        chosen = f"{made.residency.reason}. {made.references}. {made.half_sets}"
        print(f"{given.box} px, {len(table)} particles, {ranks.size} ranks: {chosen}")
        print("seconds: " + ", ".join(f"{stage} {value:.2f}" for stage, value in done.seconds.items()))
        if done.communication:
            by_name = done.communication["by_name"].items()
            print("sent: " + ", ".join(f"{name} {one['bytes'] / GB:.3f} GB {one['seconds']:.3f} s" for name, one in by_name))
    if stages:
        for name, planned in phases(made).items():
            print(f"rank {ranks.rank}: planned for {name} {planned / GB:.2f} GB")
        for name, peak in stages.items():
            peak.show(f"rank {ranks.rank}: {name}")
        last = made.iterations[-1]
        arrays = sum(item.bytes for item in last.items if item.where == "device" and item.name not in FIXED) / GB
        taken, held = (max(getattr(one, name) for one in stages.values()) / GB for name in ("allocated", "reserved"))
        whole, context = last.peak("device") / GB, CONTEXT_BYTES / GB
        print(f"rank {ranks.rank}: allocated {taken:.2f} GB, plan {arrays:.2f} ({arrays / taken:.3f}); held with the context "
              f"{held + context:.2f} GB, plan {whole:.2f} ({whole / (held + context):.3f})")  # fmt: skip
    if ranks.is_lead and (given.keep or given.against):
        maps = {"joined": done.final.joined.map_ZYX, "half": done.final.unfil_halves[0]}
        found = {name: low_coefficients(one.cpu()) for name, one in maps.items()}
        if given.keep:
            np.savez(given.keep, **found)
        for path in given.against:
            expected = np.load(path)
            text = ", ".join(f"{name} {differences(value, expected[name])[1:].max():.2e}" for name, value in found.items())
            print(f"largest difference of a shell from {path.stem}: {text}")


def main() -> None:
    """Simulate, if need be, then the iteration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="by default points at random, of which a GPU makes a map (`benchmarks.large_set`)")
    parser.add_argument("--box", type=int, default=800)
    parser.add_argument("--particles", type=int, default=200)
    parser.add_argument("--pixel", type=float, default=0.4, help="Å")
    parser.add_argument("--sym", default="C1")
    parser.add_argument("--order", type=int, default=6)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--memory", type=float, help="GB of the device that may be used")
    parser.add_argument("--single-slices", action="store_true", help="cut from references in single precision alone")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--against", type=Path, nargs="*", default=[])
    parser.add_argument("--lines", action="store_true", help="by what lines of verglas the device's memory is taken")
    given = parser.parse_args()
    place = place_of(os.environ)
    if place is None or place.rank == 0:
        words = ["--snr", "0.2", "--seed", "1", "--method", "slices", "--device", given.device, "--float16"]
        if given.model:
            simulated(given.work, given.model, given.particles, given.box, given.pixel, words)
        else:
            large_set(given.work, given.particles, given.box, given.pixel, given.device)
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with joined(place, device) as ranks:
        last_iteration(given, ranks, device)


if __name__ == "__main__":
    main()
