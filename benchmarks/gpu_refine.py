"""A whole auto-refinement on a GPU: `python -m benchmarks.gpu_refine --model 6wg6_C1.npz [--work DIR] [--out FIGURES.json]`.

5,000 x 128 px of 2.6 Å, SNR 0.05, C1, diameter 240 Å, from 40 Å to convergence; whole processes of `verglas refine`: cold (no
compiled kernel kept from before), with kernels cached, and with the GPU's memory capped. Prints seconds by stage, and the share
of the time from the first batch to the last map in which the GPU computes: NVML's utilisation during the cached run, and the
union of all kernels (CUPTI) in one more run, inside this process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import verglas
from benchmarks.figures import publish
from benchmarks.gpu_busy import Trace, traced, utilisation
from benchmarks.refinement_run import Run, mean_fsc, refined
from benchmarks.simulated import simulated

CACHES = ("TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")  # where compiled kernels are kept


def words(diameter: float) -> list[str]:
    """Options of the refinement."""
    return ["--diameter", f"{diameter:g}", "--initial-resolution", "40", "--device", "cuda"]


def caches(folder: Path) -> dict[str, str]:
    """Environment that keeps compiled kernels below `folder`."""
    for name in CACHES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {name: str(folder / name) for name in CACHES}


def told(name: str, run: Run) -> None:
    """Print a run iteration by iteration."""
    print(f"{name}: {run.seconds:.1f} s, {len(run.iterations)} iterations", flush=True)
    for one in run.iterations:
        took = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in one["took"].items())
        print(f"  {one['iteration']:3d} order {one['healpix_order']} size {one['current_size']:4d} px significant "
              f"{one['significant']:8.1f} resolution {one['resolution']:.2f} Å: {took}")  # fmt: skip


def watched(folder: Path, data: Path, options: list[str], environment: dict[str, str]) -> tuple[Run, dict[str, float]]:
    """A run, and NVML's share of it in which the GPU computed; no such figure where NVML does not tell."""
    particles, start = data / "particles.star", data / "start.mrc"
    with utilisation() as sampler:
        run = refined(folder, particles, start, options, environment=environment)
    begin, end = run.computing_span()
    if sampler is None:
        return run, {"first batch to last map s": end - begin}
    return run, {"busy share": sampler.share(run.begun + begin, run.begun + end), "first batch to last map s": end - begin}


def traced_refinement(data: Path, diameter: float) -> tuple[Trace, float]:
    """Kernels of a refinement inside this process, and seconds from the first batch to the last map (nothing is written)."""
    span = [0.0, 0.0]

    def work() -> None:
        refinement = verglas.refine(
            data / "particles.star", data / "start.mrc", diameter=diameter, initial_resolution=40.0, device="cuda"
        )
        for iteration in refinement:
            now = time.perf_counter()
            span[0] = span[0] or now - sum(iteration.seconds.values())
            span[1] = now

    return traced(work), span[1] - span[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--particles", type=int, default=5_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--pixel", type=float, default=2.6)
    parser.add_argument("--diameter", type=float, default=240.0)
    parser.add_argument("--cap", type=float, default=11.0, help="GB of GPU memory in the capped run; 0: none")
    parser.add_argument("--no-trace", action="store_true", help="without the run under CUPTI")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        data = simulated(work / "refinement", options.model, options.particles, options.box, options.pixel)
        publish(measured(work, data, options), options.out)


def measured(work: Path, data: Path, options: argparse.Namespace) -> dict[str, float]:
    """All figures, cold run first."""
    particles, start, asked = data / "particles.star", data / "start.mrc", words(options.diameter)
    with tempfile.TemporaryDirectory() as compiled:
        environment = caches(Path(compiled))
        cold = refined(work / "cold", particles, start, asked, environment=environment)
        told("cold", cold)
        cached, busy = watched(work / "cached", data, asked, environment)
        told("cached", cached)
        found = {"cold s": cold.seconds, "cached s": cached.seconds, **cached.stages(), **busy}
        found |= {"iterations": len(cached.iterations), "cold first iteration s": sum(cold.iterations[0]["took"].values()),
                  "cached first iteration s": sum(cached.iterations[0]["took"].values()),
                  "mean FSC": mean_fsc(work / "cached" / "run_class001.mrc", data / "truth.mrc")}  # fmt: skip
        if options.cap:
            program = ("-m", "benchmarks.capped", f"{options.cap:g}")
            capped = refined(work / "capped", particles, start, asked, program, environment)
            told(f"with {options.cap:g} GB", capped)
            found |= {"capped s": capped.seconds, "capped ratio": capped.seconds / cached.seconds}
    if not options.no_trace:
        trace, span = traced_refinement(data, options.diameter)
        found["busy share traced"] = trace.busy / span
        for name, launches, seconds in trace.longest(20):
            print(f"    {1e3 * seconds:8.1f} ms {launches:6d} x {name[:90]}")
    return found


if __name__ == "__main__":
    main()
