"""Ptychography on one GPU: `python -m benchmarks.ptychography_gpu PART ...`, on PtyGer's test (3,600 positions, 256 px):

bare        seconds of bare batched Fourier transforms of all positions, by positions in a batch
curves      small scans, far and near field: error curves of all engines on the device against float64 on the CPU
check       gradient, misfit and misfit along a step by the kernels of `farfield` against the model in double precision
batches     mini-batches of rpie and lsq, recorded and repeated, against the same in double precision
kernels     seconds of the kernels of `farfield` over all positions, by positions in a batch
passes      seconds of a pass of cg, rpie and lsq beside those of the transforms they cannot do without (see `bare`), probe
            known and not, whole pixels and not, mini-batches of the default size
truth       error and structural similarity against the truth after --passes: plain conjugate gradients in double and single
            precision, and single with float16 patterns
profile     what a pass of --engine spends its time on
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import scipy.fft
import torch

from benchmarks.figures import publish
from benchmarks.ptychography import Figures, figures_of, simulated
from verglas.ptychography import fused
from verglas.ptychography.conjugate_gradients import ConjugateGradients
from verglas.ptychography.line_search import LENGTHS
from verglas.ptychography.model import Model
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.problem import Problem
from verglas.ptychography.reconstruct import engine_of, reconstruct
from verglas.ptychography.scan import Scan
from verglas.ptychography.simulation import Setting, Truth, beam, make_truth
from verglas.ptychography.simulation_options import DetectorOptions, LightOptions, PathOptions
from verglas.ptychography.start import first_guess
from verglas.ptychography.unknowns import Line, Unknowns

ENGINES = ("cg", "lsq", "rpie", "epie", "dm", "raar")


def scan_on(device: str, positions: int, window: int, whole: bool, photons: float = 1e6) -> tuple[Scan, Truth]:
    """A Siemens star whose patterns, uint16, are predicted and drawn on the device; with its true probe."""
    start = time.perf_counter()
    setting = Setting(
        light=LightOptions(photons=photons, width=0.5),
        path=PathOptions(positions=positions, overlap=0.75, whole_pixels=whole),
        detector=DetectorOptions(window=window),
    )
    truth = make_truth(setting)
    like = torch.zeros(1, dtype=torch.float64, device=device)
    model = Model(truth.geometry, (window, window), truth.geometry.object_pixel((window, window)), like)
    arrays = (truth.object_YX[None, None], truth.probe_MYX, truth.scale_B, truth.position_B2)
    object_OLYX, probe_MYX, scale_B, position_B2 = (torch.from_numpy(one).to(device) for one in arrays)
    x = Unknowns(object_OLYX, probe_MYX, scale_B, like.expand(window, window), position_B2)
    draw = torch.Generator(device).manual_seed(1)
    counts = []
    for rows_B in torch.arange(positions, device=device).split(100):
        (intensity,) = model.waves(Line(x), rows_B).intensity
        few = torch.poisson(intensity.clamp_min(0), generator=draw).clamp_max(65535)
        counts.append(torch.fft.fftshift(few, (1, 2)).int().to(torch.int16).cpu())
    patterns = torch.cat(counts).view(torch.uint16)
    recorded_B2 = torch.from_numpy(truth.recorded_B2)
    print(f"a scan of {positions} x {window} px made in {time.perf_counter() - start:.1f} s", flush=True)
    return Scan(patterns, recorded_B2, truth.geometry, probe_MYX=torch.from_numpy(truth.probe_MYX)), truth


def guessed(scan: Scan, window: int) -> Scan:
    """The scan with a probe narrower by a fifth."""
    return replace(scan, probe_MYX=torch.from_numpy(beam(LightOptions(width=0.4), window, False)))


def seconds(call: object, device: str, times: int = 5) -> float:
    """Median of the seconds of a call, when all that it asked of a GPU is done."""
    out = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        call()  # type: ignore[operator]
        synchronize(device)
        out.append(time.perf_counter() - start)
    return statistics.median(out)


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def bare_transforms(positions: int, window: int, batch: int, device: str) -> float:
    """Seconds of one transform of every position, in batches, in place as far as torch lets it be."""
    wave_BYX = torch.randn(batch, window, window, dtype=torch.complex64, device=device)
    out_BYX = torch.empty_like(wave_BYX)

    def all_of_them() -> None:
        for _ in range(positions // batch):
            torch.fft.fft2(wave_BYX, norm="ortho", out=out_BYX)

    all_of_them()
    return seconds(all_of_them, device) * positions / (positions // batch * batch)


def bare(args: argparse.Namespace) -> Figures:
    """Transforms alone."""
    sizes = [n for n in (8, 16, 24, 32, 48, 64, 128, 256, 1024, 3600) if n <= args.positions]
    return {f"batch {n} s": bare_transforms(args.positions, args.window, n, args.device) for n in sizes}


def curves(args: argparse.Namespace) -> Figures:
    """The greatest relative difference of errors, and the last errors."""
    figures: Figures = {}
    for kind in ("far", "near"):
        scan = small(kind)
        for engine in ENGINES:
            options = PtychoOptions(engine=engine, passes=12)  # type: ignore[arg-type]
            *_, single = reconstruct(scan, options, args.device)
            *_, double = reconstruct(scan, replace(options, double=True), "cpu")
            found, expected = (torch.tensor(one.found.error_P) for one in (single, double))
            figures[f"{kind} {engine} difference"] = float(((found - expected).abs() / expected).max())
            figures[f"{kind} {engine} error"] = float(found[-1])
    return figures


def small(kind: str) -> Scan:
    """60 positions of 64 px."""
    if kind == "far":
        return simulated(60, 64)[0]
    from verglas.ptychography.simulation import patterns

    setting = Setting(path=PathOptions(positions=60), detector=DetectorOptions(window=64, near_field=True))
    truth = make_truth(setting)
    counts = torch.cat([torch.from_numpy(part.astype("float32")) for part in patterns(truth, setting)])
    return Scan(counts, torch.from_numpy(truth.recorded_B2), truth.geometry, probe_MYX=torch.from_numpy(truth.probe_MYX))


def passes(args: argparse.Namespace) -> Figures:
    """Median seconds of a pass after the first, and the share that the transforms would need by themselves."""
    figures: Figures = {}
    for whole in (True, False):
        scan, _ = scan_on(args.device, args.positions, args.window, whole)
        for engine, known in (("cg", True), ("cg", False), ("rpie", False), ("lsq", False)):
            name = f"{engine}, {'known' if known else 'fitted'} probe, {'whole px' if whole else 'fractions'}"
            options = PtychoOptions(engine=engine, warm_up=0, probe_from=0 if known else 1)  # type: ignore[arg-type]
            try:
                took = pass_seconds(scan, options, args)
            except torch.cuda.OutOfMemoryError as error:
                print(name, error)
                continue
            figures[f"{name} s"] = took
            figures[f"{name} share"] = transforms_of(engine, known, whole) * args.bare_s / took
    return figures


def transforms_of(engine: str, known: bool, whole: bool) -> int:
    """Of all positions, that a pass cannot do without: there and back, of cg also of the step's waves (object; and object with
    probe). With fractions of a pixel light is moved, and, where it is fitted, its gradient back and its step."""
    if engine != "cg":
        return 2 if whole else 4
    return (3 if known else 4) if whole else (4 if known else 7)


def problem_of(scan: Scan, options: PtychoOptions, args: argparse.Namespace) -> Problem:
    """On the device; --plain: without the kernels of `farfield`; --chunk: positions at a time."""
    problem = Problem(scan, options, args.device)
    problem.why_not_fused = "asked for" if args.plain else problem.why_not_fused
    problem.chunk = args.chunk or problem.chunk
    return problem


def check(args: argparse.Namespace) -> Figures:
    """Relative differences."""
    figures: Figures = {}
    for window, whole in ((64, False), (256, True)):
        scan, _ = scan_on(args.device, 40, window, whole)
        single, double = (Problem(scan, PtychoOptions(double=one), args.device) for one in (False, True))
        x, _ = first_guess(scan, double.counts, double.options, double.like)
        names = ("object_OLYX", "probe_MYX")
        expected = double.sums(x, names)
        x32, _ = first_guess(scan, single.counts, single.options, single.like)
        found = single.sums(x32, names)
        for name in names:
            apart = (found.gradient[name] - expected.gradient[name]).norm() / expected.gradient[name].norm()
            figures[f"{window} {name} difference"] = float(apart)
        figures[f"{window} loss difference"] = abs(found.loss / expected.loss - 1)
        step, lengths = expected.gradient.scaled(-1e-4), [0.0, 0.3, 1.0]
        step32 = found.gradient.scaled(-1e-4)
        line = ConjugateGradients(double, {}).along(x, step)
        rows = fused.misfit_along(single, x32, step32, lengths).tolist()
        figures[f"{window} along difference"] = max(
            abs(a / b - 1) for t, row in zip(lengths, rows, strict=True) for a, b in zip(row, line(t), strict=True)
        )
    return figures


def batches(args: argparse.Namespace) -> Figures:
    """Relative differences of object and errors after three passes, whole pixels and not."""
    figures: Figures = {}
    for whole in (True, False):
        scan = guessed(scan_on(args.device, 100, 64, whole)[0], 64)
        for engine in ("rpie", "lsq"):
            options = PtychoOptions(engine=engine, passes=3, batch_size=20)  # type: ignore[arg-type]
            *_, found = reconstruct(scan, options, args.device)
            *_, expected = reconstruct(scan, replace(options, double=True), "cpu")
            objects = found.found.object_OLYX.cpu(), expected.found.object_OLYX
            name = f"{engine}, {'whole px' if whole else 'fractions'}"
            figures[f"{name}, object"] = float((objects[0] - objects[1]).norm() / objects[1].norm())
            figures[f"{name}, error"] = abs(found.error / expected.error - 1)
    return figures


def kernels(args: argparse.Namespace) -> Figures:
    """Gradient and line search, known light and not."""
    scan, _ = scan_on(args.device, args.positions, args.window, True)
    problem = Problem(scan, PtychoOptions(), args.device)
    x, _ = first_guess(scan, problem.counts, problem.options, problem.like)
    gradient = x.only("object_OLYX", "probe_MYX")
    step = {"fitted": gradient.scaled(1e-3), "known": x.only("object_OLYX").scaled(1e-3)}
    lengths = list(LENGTHS)
    figures: Figures = {}
    for chunk in (120, 3600):
        problem.chunk = chunk
        runs = {"gradient": lambda: [fused.add_sums(problem, x, rows, gradient) for rows in problem.chunks()]}
        for name, one in step.items():
            runs[f"along, {name}"] = lambda one=one: fused.misfit_along(problem, x, one, lengths)  # type: ignore[misc]
        for name, run in runs.items():
            run()
            figures[f"{name}, batch {chunk} s"] = seconds(run, args.device)
    return figures


def pass_seconds(scan: Scan, options: PtychoOptions, args: argparse.Namespace, times: int = 6) -> float:
    """Median seconds of a pass."""
    problem = problem_of(scan, options, args)
    x, _ = first_guess(scan, problem.counts, options, problem.like)
    method = engine_of(problem, {})
    number = 1

    def one_pass() -> None:
        nonlocal x, number
        x, _ = method.run_pass(x, number)
        number += 1

    one_pass()
    return seconds(one_pass, args.device, times)


def truth(args: argparse.Namespace) -> Figures:
    """Known probe, as PtyGer has it; and how far single precision, also with float16 patterns, is from double."""
    scan, true = scan_on(args.device, args.positions, args.window, True)
    plain = PtychoOptions(passes=args.passes, probe_from=0, warm_up=0)
    halves = scan.patterns_BYX.float().clamp_max(torch.finfo(torch.float16).max).half()
    runs = {
        "double": (scan, replace(plain, double=True)),
        "single": (scan, plain),
        "mixed": (replace(scan, patterns_BYX=halves), plain),
    }
    figures: Figures = {}
    for name, (one, options) in runs.items():
        start = time.perf_counter()
        *_, done = reconstruct(one, options, args.device)
        synchronize(args.device)
        took = time.perf_counter() - start
        with scipy.fft.set_workers(os.cpu_count() or 1):
            found = figures_of(name, done, true, took)
        print(found, flush=True)
        figures |= found
    for name in ("single", "mixed"):
        for what in ("error", "object error", "ssim amplitude", "ssim phase"):
            figures[f"{name} less double, {what}"] = figures[f"{name} {what}"] - figures[f"double {what}"]
    return figures


def profile(args: argparse.Namespace) -> Figures:
    """A table of kernels."""
    scan, _ = scan_on(args.device, args.positions, args.window, True)
    options = PtychoOptions(engine=args.engine, warm_up=0)
    problem = problem_of(scan, options, args)
    x, _ = first_guess(scan, problem.counts, options, problem.like)
    method = engine_of(problem, {})
    x, _ = method.run_pass(x, 1)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as found:
        method.run_pass(x, 2)
        synchronize(args.device)
    key = "self_device_time_total" if args.device != "cpu" else "self_cpu_time_total"
    longest = sorted(found.key_averages(), key=lambda one: getattr(one, key), reverse=True)[:16]
    return {f"{one.key[:70]}, {one.count} calls s": 1e-6 * getattr(one, key) for one in longest}


def one_transform(args: argparse.Namespace) -> float:
    """Seconds of a transform of all positions in the best batch."""
    sizes = [n for n in (32, 64, 256, 1024) if n <= args.positions]
    return min(bare_transforms(args.positions, args.window, n, args.device) for n in sizes)


def main() -> None:
    """Run the parts that are named and print their figures."""
    parts = {one.__name__: one for one in (bare, check, batches, kernels, curves, passes, truth, profile)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--positions", type=int, default=3600)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--passes", type=int, default=32)
    parser.add_argument("--engine", default="cg")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.bare_s = one_transform(args)
    figures: Figures = {"transform s": args.bare_s}
    for name in args.parts:
        start = time.perf_counter()
        found = {f"{name} {key}": value for key, value in parts[name](args).items()}
        lines = [f"{name}: {time.perf_counter() - start:.1f} s", *(f"  {key}: {value:.6g}" for key, value in found.items())]
        print("\n".join(lines), flush=True)
        figures |= found
    publish(figures, args.out)


if __name__ == "__main__":
    main()
