"""What `verglas plan` says beside what a refinement takes: peak memory of host and device, seconds.

    python -m benchmarks.plan_vs_measured [--device cuda] [--sizes 300x48xD2 ...] [--iterations N] [--keep DIR]
    python -m benchmarks.plan_vs_measured --ranks FIGURES.json   (of benchmarks.scaling: seconds and efficiency by ranks)

Simulates particles of each size (the demo model: copied to a D2 particle, or alone), refines them in a process of their own,
prints plan, measured and their ratio, and ends with 1 if a ratio of memory is outside 0.85 to 1.15. Host: largest resident
memory of the process. Device: what nvidia-smi would show at its largest, that is memory that PyTorch had reserved and the
context; the largest sum of allocations is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from verglas.cli.plan import this_machine
from verglas.refinement.config import RefineConfig

SIZES = {"cpu": ["300x48xD2", "1000x64xD2", "400x128xD2"], "cuda": ["1000x64xC1", "2000x128xC1", "1000x256xD2"]}
LOWEST, HIGHEST = 0.85, 1.15
GB = 1e9
SNR = "0.2"  # so that the resolution follows the angular step, as planned; noisier data end sooner and take less


@dataclass
class Size:
    """Particles, box (px) and point group of one comparison; the field of view is 256 Å throughout."""

    n: int
    box: int
    symmetry: str

    @classmethod
    def read(cls, text: str) -> Size:
        """'300x48xD2'."""
        n, box, symmetry = text.split("x")
        return cls(int(n), int(box), symmetry)

    @property
    def name(self) -> str:
        return f"{self.n}x{self.box}x{self.symmetry}"

    def config(self, iterations: int) -> RefineConfig:
        """How it is refined."""
        return RefineConfig(diameter=200.0, symmetry=self.symmetry, initial_resolution=40.0, max_iterations=iterations)


def simulate(size: Size, folder: Path, device: str) -> None:
    """Particles with truth in `folder`, unless they are there."""
    if not (folder / "particles.star").exists():
        command = ["simulate", "--n", str(size.n), "--box", str(size.box), "--pixel", f"{256 / size.box:.4f}"]
        verglas(*command, "--sym", size.symmetry, "--seed", "1", "--snr", SNR, "--device", device, "--out", str(folder))


def verglas(*arguments: str) -> None:
    """Run a command; RuntimeError with its last lines if it fails."""
    done = subprocess.run([sys.executable, "-m", "verglas", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"verglas {arguments[0]} failed: {done.stderr[-500:]}")


def child(particles: str, device: str, size: str, iterations: int) -> None:
    """Refine, and print a line of JSON: the plan made beforehand, peaks of every iteration, bytes and seconds."""
    import torch

    from verglas.cli.refine_run import RefineJob, Refinement
    from verglas.io.provenance import peak_memory
    from verglas.refinement.plan import plan
    from verglas.refinement.plan_sizes import Problem

    start, size_of = time.perf_counter(), Size.read(size)
    cuda, config, folder = device == "cuda", size_of.config(iterations), Path(particles)
    planned = plan(Problem(size_of.n, size_of.box, 256 / size_of.box), config, this_machine(torch.device(device)))
    job = RefineJob(particles=folder / "particles.star", reference=folder / "start.mrc", config=config,
              device="cuda" if cuda else "cpu", out=folder / f"refined_{device}", overwrite=True)  # fmt: skip
    seen, largest = [], {"allocated": 0.0, "reserved": 0.0}
    for one in Refinement(job):
        schedule = one.state.schedule
        facts = {"iteration": one.state.iteration, "order": schedule.healpix_order, "local": schedule.local_sigma > 0,
                 "size": one.state.current_size, "seconds": sum(one.seconds.values()), "host": host_peak()}  # fmt: skip
        if cuda:
            facts |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            largest = {name: max(value, facts[name]) for name, value in largest.items()}
            torch.cuda.reset_peak_memory_stats()
        seen.append(facts)
    measured = {"host": 1e9 * peak_memory()["host"]["value"], "seconds": time.perf_counter() - start}
    if cuda:
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        measured |= {"device": largest["reserved"] + context, "allocated": largest["allocated"], "context": context}
    print(json.dumps({"plan": planned.as_dict(), "measured": measured, "iterations": seen}))


def host_peak() -> float:
    """Largest resident memory so far, bytes."""
    from verglas.io.provenance import peak_memory

    return 1e9 * peak_memory()["host"]["value"]


def compare(size: Size, folder: Path, device: str, iterations: int) -> tuple[dict, bool]:
    """Refine in a process of its own; print a row per figure. Returns what was found and whether memory is as planned."""
    call = [sys.executable, "-m", "benchmarks.plan_vs_measured", "--child", str(folder), "--device", device]
    done = subprocess.run([*call, "--sizes", size.name, "--iterations", str(iterations)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the refinement failed: {done.stderr[-1500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    plan, measured, good = found["plan"], found["measured"], True
    for where, planned in plan["peak_bytes"].items():
        ratio = planned / measured[where]
        good &= LOWEST <= ratio <= HIGHEST
        print(f"{size.name:>14s}  {where:8s} {planned / GB:8.2f} GB {measured[where] / GB:8.2f} GB {ratio:8.2f}")
    if "allocated" in measured:
        print(f"{'':14s}  allocated {'':10s} {measured['allocated'] / GB:8.2f} GB")
    ratio = plan["seconds"] / measured["seconds"]
    print(f"{'':14s}  time     {plan['seconds']:8.0f} s  {measured['seconds']:8.0f} s  {ratio:8.2f}", flush=True)
    return found, good


def details(found: dict) -> None:
    """The kinds of iteration as planned and the iterations as they were: what the constants are fitted to."""
    for one in found["plan"]["iterations"]:
        peaks = "  ".join(f"{where} {value / GB:.2f} GB" for where, value in one["peak_bytes"].items())
        seconds = sum(one["seconds"].values())
        batch = one["particles_at_once"]
        print(f"    plan {one['kind']:22s} {one['current_size_px']:4d} px  batch {batch:5d}  {peaks}  {seconds:.1f} s")
        items = sorted(one["memory"], key=lambda item: -item["bytes"])[:6]
        print("        " + ", ".join(f"{item['item']} {item['bytes'] / GB:.2f}" for item in items))
    for one in found["iterations"]:
        peaks = "  ".join(f"{name} {one[name] / GB:.2f} GB" for name in ("host", "allocated", "reserved") if name in one)
        kind = f"order {one['order']}{' local' if one['local'] else ''}"
        print(f"    run  {one['iteration']:3d} {kind:18s} {one['size']:4d} px  {peaks}  {one['seconds']:.1f} s", flush=True)


def compare_ranks(figures: dict[str, float], device: str) -> dict[int, tuple[float, float]]:
    """{ranks: seconds of all iterations as planned, as measured}, and a line of each with both efficiencies. figures: of
    `benchmarks.scaling iterations`."""
    from verglas.refinement.plan_ranks import plan_on
    from verglas.refinement.plan_sizes import Machine, Problem

    problem = Problem(int(figures["particles"]), int(figures["box px"]), figures["pixel Å"], image_bytes=2)
    config = RefineConfig(diameter=figures["diameter Å"], initial_resolution=40.0)
    machine = Machine("cuda" if device == "cuda" else "cpu", 1000 * GB, 141 * GB, 2)
    names = [name for name in figures if name.startswith("strong, ") and name.endswith(" ranks, iterations s")]
    found = {}
    for ranks, measured in sorted((int(name.split()[1]), figures[name]) for name in names):
        planned = sum(one.times * sum(one.seconds.values()) for one in plan_on(problem, config, machine, ranks).iterations)
        found[ranks] = (planned, measured)
        efficiencies = [found[min(found)][i] * min(found) / ranks / found[ranks][i] for i in range(2)]
        plan, seen = (f"{value:8.1f} s {efficiency:6.1%}" for value, efficiency in zip(found[ranks], efficiencies))
        print(f"{ranks:3d} ranks  plan {plan}  measured {seen}")
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", help="NxBOXxGROUP")
    parser.add_argument("--iterations", type=int, default=RefineConfig.max_iterations, help="at most, before the joint one")
    parser.add_argument("--keep", type=Path, help="folder for the particles, used again if they are there")
    parser.add_argument("--details", action="store_true", help="every iteration, planned and measured")
    parser.add_argument("--ranks", type=Path, help="compare with these figures instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks is not None:
        compare_ranks(json.loads(options.ranks.read_text()), options.device)
        return
    if options.child:
        child(options.child, options.device, options.sizes[0], options.iterations)
        return
    print(f"{'particles':>14s}  {'':8s} {'plan':>11s} {'measured':>11s} {'ratio':>8s}", flush=True)
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        for size in map(Size.read, options.sizes or SIZES[options.device]):
            folder = (options.keep or Path(temporary)) / size.name
            simulate(size, folder, options.device)
            found, as_planned = compare(size, folder, options.device, options.iterations)
            good &= as_planned
            if options.details:
                details(found)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
