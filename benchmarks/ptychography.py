"""Ptychography, simulated and real: `python -m benchmarks.ptychography PART ...`, parts:

star        a simulated Siemens star, 200 positions of 64 px at 1e6 photons, probe known: 32 passes of plain conjugate gradients
            in double precision beside the default engine in both; error and structural similarity against the truth
probe       the same with a first guess of the probe that is narrower by a fifth, all engines
positions   150 positions of 64 px, --photons, 3.5 px rms off, --seeds, the star or --spheres: what is left, px, after the affine
            map that no data tell
real        --scan FILE (the near field also --focus M): error of every engine after --passes
floor       seconds of a pass beside those of its bare Fourier transforms, in batches of the same size, --window px

On a CPU `OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1` gives figures that can be compared; --device cuda runs on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.figures import publish
from verglas.ptychography.files import read_scan
from verglas.ptychography.judge import Judgement, judge, position_error, seen_region
from verglas.ptychography.options import Engine, PtychoOptions
from verglas.ptychography.problem import Problem
from verglas.ptychography.read_options import ReadOptions
from verglas.ptychography.reconstruct import PassDone, engine_of, reconstruct
from verglas.ptychography.scan import Scan
from verglas.ptychography.simulation import Setting, Truth, beam, make_truth, patterns
from verglas.ptychography.simulation_options import DetectorOptions, LightOptions, PathOptions
from verglas.ptychography.start import as_unknowns, first_guess

Figures = dict[str, float]


def simulated(
    positions: int, window: int, error: float = 0.0, photons: float = 1e6, width: float = 0.5, seed: int = 0,
    spheres: bool = False,
) -> tuple[Scan, Truth]:  # fmt: skip
    """A scan with its true probe, and its truth; of a Siemens star, or of spheres."""
    setting = Setting(
        light=LightOptions(photons=photons, width=width),
        path=PathOptions(positions=positions, position_error=error, overlap=0.75),
        detector=DetectorOptions(window=window, bits=32),
        seed=seed,
    )
    truth = make_truth(setting)
    if spheres:
        truth = replace(truth, object_YX=many_spheres(truth.object_YX.shape, seed))
    counts = torch.from_numpy(np.concatenate(list(patterns(truth, setting))).astype(np.float32))
    return Scan(counts, torch.from_numpy(truth.recorded_B2), truth.geometry, probe_MYX=torch.from_numpy(truth.probe_MYX)), truth


def many_spheres(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Transmission of spheres of 3 to 12 px radius that lie at random, thin ones seen through thick ones, complex128 [Y, X]."""
    random = np.random.default_rng(seed)
    y_Y1, x_X = np.arange(shape[0])[:, None], np.arange(shape[1])
    thickness_YX = np.zeros(shape)
    for _ in range(shape[0] * shape[1] // 150):
        radius, (y, x) = random.uniform(3, 12), random.uniform(0, 1, 2) * shape
        thickness_YX += np.sqrt(np.clip(radius**2 - (y_Y1 - y) ** 2 - (x_X - x) ** 2, 0, None))
    return np.exp(thickness_YX * (-0.06j - 0.01))


def last(scan: Scan, options: PtychoOptions, device: str) -> PassDone:
    """The last pass."""
    *_, done = reconstruct(scan, options, device)
    return done


def judged(done: PassDone, truth: Truth) -> Judgement:
    """The object against the truth where there was light."""
    rows, columns = (int(corner) for corner in done.found.origin_2)
    height, width = truth.object_YX.shape
    found_YX = np.ones(truth.object_YX.shape, complex)
    object_YX = done.found.object_OLYX[0, 0].cpu().numpy()
    here = object_YX[max(-rows, 0) : height - rows, max(-columns, 0) : width - columns]
    at = slice(max(rows, 0), max(rows, 0) + here.shape[0]), slice(max(columns, 0), max(columns, 0) + here.shape[1])
    found_YX[at] = here
    return judge(found_YX, truth.object_YX, seen_region(truth.position_B2, truth.probe_MYX, truth.object_YX.shape))[0]


def figures_of(name: str, done: PassDone, truth: Truth, seconds: float) -> Figures:
    """Error of the patterns, and of the object against the truth."""
    verdict = judged(done, truth)
    return {
        f"{name} error": done.error, f"{name} object error": verdict.error, f"{name} ssim amplitude": verdict.ssim_amplitude,
        f"{name} ssim phase": verdict.ssim_phase, f"{name} s": seconds,
    }  # fmt: skip


def timed(name: str, scan: Scan, truth: Truth, options: PtychoOptions, device: str) -> Figures:
    """Figures of one reconstruction."""
    start = time.perf_counter()
    done = last(scan, options, device)
    return figures_of(name, done, truth, time.perf_counter() - start)


def star(args: argparse.Namespace) -> Figures:
    """Known probe."""
    scan, truth = simulated(args.positions, args.window)
    runs = {
        "plain cg, double": PtychoOptions(passes=args.passes, probe_from=0, warm_up=0, double=True),
        "default, double": PtychoOptions(passes=args.passes, probe_from=0, double=True),
        "default, single": PtychoOptions(passes=args.passes, probe_from=0),
    }
    return {k: v for name, options in runs.items() for k, v in timed(name, scan, truth, options, args.device).items()}


def probe(args: argparse.Namespace) -> Figures:
    """A guess of the probe."""
    scan, truth = simulated(args.positions, args.window)
    guess = torch.from_numpy(beam(LightOptions(width=0.4), args.window, False))
    scan = Scan(scan.patterns_BYX, scan.positions_B2, scan.geometry, probe_MYX=guess)
    figures: Figures = {}
    for engine in get_args(Engine):
        figures |= timed(engine, scan, truth, PtychoOptions(engine=engine, passes=args.passes), args.device)
    return figures


def positions(args: argparse.Namespace) -> Figures:
    """What is left of 3.5 px."""
    figures: Figures = {}
    for seed in args.seeds:
        scan, truth = simulated(150, 64, error=3.5, photons=args.photons, seed=seed, spheres=args.spheres)
        figures[f"{seed} start px"] = position_error(truth.recorded_B2, truth.position_B2)
        for engine in args.engines:
            done = last(scan, PtychoOptions(engine=engine, passes=args.passes, positions_from=5), args.device)
            figures[f"{seed} {engine} px"] = position_error(done.found.positions_B2.cpu().numpy(), truth.position_B2)
    return figures


def real(args: argparse.Namespace) -> Figures:
    """Errors of a file's patterns, of the result itself, not as its last pass met it."""
    scan, notices = read_scan(args.scan, ReadOptions(near_field=args.focus is not None, focus=args.focus))
    print(*notices, sep="\n")
    figures: Figures = {}
    for engine in args.engines:
        options = PtychoOptions(engine=engine, passes=args.passes, probe_modes=args.modes)
        start = time.perf_counter()
        done = last(scan, options, args.device)
        problem = Problem(scan, options, args.device)
        figures[f"{engine} error"] = problem.error(as_unknowns(done.found, scan, problem.like))
        figures[f"{engine} s"] = time.perf_counter() - start
    return figures


def floor(args: argparse.Namespace) -> Figures:
    """Seconds of a pass and of the transforms it cannot do without: forward and back, twice more along a step (cg)."""
    scan, _ = simulated(args.positions, args.window)
    figures: Figures = {}
    for engine, transforms in (("cg", 4), ("rpie", 2)):
        options = PtychoOptions(engine=engine, warm_up=0, subpixel=False)  # type: ignore[arg-type]
        problem = Problem(scan, options, args.device)
        x, _ = first_guess(scan, problem.counts, options, problem.like)
        method = engine_of(problem, {})
        wave_BYX = torch.randn(problem.chunk, *scan.window, dtype=torch.complex64, device=args.device)
        whole, bare = [], []
        for number in range(1, 8):
            start = clock(args.device)
            x, _ = method.run_pass(x, number)
            middle = clock(args.device)
            for rows_B in problem.chunks():
                for _ in range(transforms):
                    torch.fft.fft2(wave_BYX[: len(rows_B)])
            whole.append(middle - start)
            bare.append(clock(args.device) - middle)
        figures[f"{engine} s"], figures[f"{engine} floor s"] = statistics.median(whole), statistics.median(bare)
    return figures


def clock(device: str) -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Run the parts that are named and print their figures."""
    parts = {"star": star, "probe": probe, "positions": positions, "real": real, "floor": floor}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--passes", type=int, default=32)
    parser.add_argument("--positions", type=int, default=200)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--modes", type=int, default=1)
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--focus", type=float)
    parser.add_argument("--engines", nargs="+", default=["cg", "lsq", "rpie"])
    parser.add_argument("--spheres", action="store_true")
    parser.add_argument("--photons", type=float, default=1e5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures: Figures = {}
    for name in args.parts:
        figures |= {f"{name} {key}": value for key, value in parts[name](args).items()}
    publish(figures, args.out)


if __name__ == "__main__":
    main()
