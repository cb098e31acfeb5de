"""pty-chi (LSQML) and tike beside verglas: seconds to an error, `python -m benchmarks.ptychography_peers --device cuda`.

One simulated scan (PtyGer's test by default), positions in whole pixels, one first guess for all: the probe narrower by a fifth,
the object 1. Only passes are timed, what each reports for itself among them; no start, no compilation (a pass runs first).
The error is sum (sqrt I - sqrt n)^2 / sum n, of everybody's object and probe in our model, at the probe's best scale.
--scan FILE: a real scan with its own probe, or one guessed, instead; a near field with --focus M, without tike, which has none.
The last lines say after how many seconds cg was at the last error of a peer, and how often that fits into the peer's.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import publish
from benchmarks.ptychography_gpu import guessed, scan_on, synchronize
from verglas.ptychography.files import read_scan
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.problem import Problem
from verglas.ptychography.read_options import ReadOptions
from verglas.ptychography.reconstruct import engine_of
from verglas.ptychography.scan import Scan
from verglas.ptychography.start import first_guess
from verglas.ptychography.unknowns import Line, Unknowns

Curve = list[tuple[float, float]]  # (seconds so far, error)
# What peers import for tables, films and pictures alone.
ASIDE = (
    "torchvision", "torchvision.transforms", "pandas", "sklearn", "sklearn.cluster", "tifffile", "cv2",
    "matplotlib", "matplotlib.pyplot", "matplotlib.animation",
)  # fmt: skip


class Referee:
    """Our model, which tells the error of an object and a probe."""

    def __init__(self, scan: Scan, device: str) -> None:
        self.problem = Problem(scan, PtychoOptions(), device)
        self.x, _ = first_guess(scan, self.problem.counts, self.problem.options, self.problem.like)

    def error(self, object_YX: Tensor, probe_YX: Tensor) -> float:
        """1 - (sum sqrt(n I))^2 / (sum n sum I): the error where the scale of the probe is best."""
        like = self.x["object_OLYX"]
        x = self.x.changed(object_OLYX=object_YX.to(like)[None, None], probe_MYX=probe_YX.to(like)[None])
        return error_of(self.problem, x)


def error_of(problem: Problem, x: Unknowns) -> float:
    """See `Referee.error`."""
    sums_3 = torch.zeros(3, dtype=torch.float64, device=problem.like.device)
    for rows_B in problem.everything.split(200):
        (intensity,) = problem.model.waves(Line(x), rows_B).intensity
        counts = problem.counts.rows(rows_B)
        parts = ((counts * intensity).sqrt(), counts, intensity)
        sums_3 += torch.stack([one.sum(dtype=torch.float64) for one in parts])
    both, n, i = sums_3.tolist()
    return 1 - both**2 / (n * i)


def timed(one_pass: Callable[[], None], error: Callable[[], float], passes: int, device: str) -> Curve:
    """(seconds, error) after each pass."""
    out, took = [], 0.0
    for _ in range(passes):
        synchronize(device)
        start = time.perf_counter()
        one_pass()
        synchronize(device)
        took += time.perf_counter() - start
        out.append((took, error()))
    return out


def ours(scan: Scan, referee: Referee, engine: str, passes: int, device: str, **more: object) -> Curve:
    """Passes of one of our engines."""
    options = PtychoOptions(engine=engine, passes=passes, **more)  # type: ignore[arg-type]
    problem = Problem(scan, options, device)
    x, _ = first_guess(scan, problem.counts, options, problem.like)
    method, number = engine_of(problem, {}), 0

    def one_pass() -> None:
        nonlocal x, number
        number += 1
        x, _ = method.run_pass(x, number)

    return timed(one_pass, lambda: referee.error(x["object_OLYX"][0, 0], x["probe_MYX"][0]), passes, device)


def pty_chi(scan: Scan, referee: Referee, passes: int, device: str, batch: int, momentum: float = 0.0) -> Curve:
    """pty-chi's LSQML, data on the device."""
    import ptychi.api as api
    from ptychi.api.task import PtychographyTask

    options = api.LSQMLOptions()
    counts = scan.patterns_BYX.numpy().astype(np.float32)
    options.data_options.data, options.data_options.fft_shift = np.fft.ifftshift(counts, axes=(1, 2)), False
    options.data_options.save_data_on_device = device != "cpu"
    height, width = referee.x["object_OLYX"].shape[-2:]
    options.object_options.initial_guess = np.ones((1, height, width), np.complex64)
    options.object_options.pixel_size_m = 1.0
    if scan.geometry.kind == "near":
        assert scan.object_pixel is not None and scan.geometry.distance and scan.geometry.wavelength
        options.data_options.data = counts
        options.object_options.pixel_size_m = scan.object_pixel[0]
        options.data_options.free_space_propagation_distance_m = scan.geometry.distance
        options.data_options.wavelength_m = scan.geometry.wavelength
    options.probe_options.initial_guess = referee.x["probe_MYX"][None].cpu().numpy()
    position_B2 = referee.x["positions_B2"].cpu().numpy()
    corner_2 = [round(n / 2) - edge // 2 for n, edge in zip((height, width), scan.window, strict=True)]
    options.probe_position_options.position_y_px = (position_B2[:, 0] - corner_2[0]).astype(np.float32)
    options.probe_position_options.position_x_px = (position_B2[:, 1] - corner_2[1]).astype(np.float32)
    for one, fitted in ((options.object_options, True), (options.probe_options, True), (options.probe_position_options, False)):
        one.optimizable = fitted
    chosen = options.reconstructor_options
    chosen.num_epochs, chosen.batch_size, chosen.random_seed = passes + 1, batch, 0
    chosen.momentum_acceleration_gain = momentum
    chosen.displayed_loss_function = None
    chosen.default_device = api.Devices.CPU if device == "cpu" else api.Devices.GPU

    def error() -> float:
        return referee.error(task.get_data("object")[0], task.get_data("probe")[0, 0])

    for count in (1, passes):
        task = PtychographyTask(options)
        curve = timed(lambda task=task: task.run(n_epochs=1), error, count, device)  # type: ignore[misc]
    return curve


def tike_curve(scan: Scan, referee: Referee, passes: int, batches: int, engine: str) -> Curve:
    """tike's engines: "lstsq" or "rpie"."""
    import tike.ptycho as tike
    from tike.ptycho.solvers import LstsqOptions, PtychoParameters, RpieOptions

    counts = np.fft.ifftshift(scan.patterns_BYX.numpy(), axes=(1, 2))
    kind = LstsqOptions if engine == "lstsq" else RpieOptions
    for count in (1, passes):
        parameters = PtychoParameters(
            probe=referee.x["probe_MYX"][None, None].cpu().numpy().astype(np.complex64),
            psi=referee.x["object_OLYX"][0].cpu().numpy().astype(np.complex64),
            scan=referee.x["positions_B2"].cpu().numpy().astype(np.float32),
            algorithm_options=kind(num_iter=count, num_batch=batches),
            object_options=tike.ObjectOptions(), probe_options=tike.ProbeOptions(recover_probe=True),
        )  # fmt: skip
        with tike.Reconstruction(counts, parameters) as context:
            def error() -> float:
                found = context.get_result()
                return referee.error(torch.from_numpy(np.array(found.psi[0])), torch.from_numpy(np.array(found.probe[0, 0, 0])))

            curve = timed(lambda context=context: context.iterate(1), error, count, "cuda")  # type: ignore[misc]
    return curve


def show(name: str, curve: Curve) -> dict[str, float]:
    """Print a curve; its last error and seconds."""
    print(name, " ".join(f"{took:.3f}s:{error:.5f}" for took, error in curve), flush=True)
    return {f"{name} error": curve[-1][1], f"{name} s": curve[-1][0], f"{name} s a pass": curve[-1][0] / len(curve)}


def main() -> None:
    """Everybody in turn; a peer that fails says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=3600)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--focus", type=float)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--without", nargs="*", default=[], choices=("ours", "ptychi", "tike"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # pty-chi's, a line for each array that it is given
    absent = {root for root in {name.split(".")[0] for name in ASIDE} if find_spec(root) is None}
    sys.modules |= {name: MagicMock(__spec__=ModuleSpec(name, None)) for name in ASIDE if name.split(".")[0] in absent}
    if args.scan:
        scan, _ = read_scan(args.scan, ReadOptions(near_field=args.focus is not None, focus=args.focus))
    else:
        scan = guessed(scan_on(args.device, args.positions, args.window, True)[0], args.window)
    referee = Referee(scan, args.device)
    figures = {"start error": referee.error(referee.x["object_OLYX"][0, 0], referee.x["probe_MYX"][0])}
    runs: dict[str, Callable[[], Curve]] = {}
    for engine in ("cg", "lsq", "rpie"):
        ours(scan, referee, engine, 7 if engine == "cg" else 1, args.device)  # so that kernels are compiled
        runs[f"ours {engine}"] = lambda engine=engine: ours(scan, referee, engine, args.passes, args.device)  # type: ignore[misc]
    for batch, momentum in ((16, 0.0), (52, 0.0)) if args.scan else ((120, 0.0), (120, 0.5), (400, 0.0)):
        name = f"ptychi LSQML, batch {batch}, momentum {momentum}"
        runs[name] = lambda b=batch, m=momentum: pty_chi(scan, referee, args.passes, args.device, b, m)  # type: ignore[misc]
    for engine, batches in () if args.focus else (("lstsq", 30), ("lstsq", 5), ("rpie", 30)):
        runs[f"tike {engine}, {batches} batches"] = lambda e=engine, b=batches: tike_curve(scan, referee, args.passes, b, e)  # type: ignore[misc]
    curves: dict[str, Curve] = {}
    for name, run in runs.items():
        if name.split()[0] in args.without:
            continue
        try:
            curves[name] = run()
            figures |= show(name, curves[name])
        except Exception:
            print(name, traceback.format_exc(limit=-4), flush=True)
        if args.device != "cpu":
            torch.cuda.empty_cache()
    publish(figures | ratios(curves), args.out)


def ratios(curves: dict[str, Curve]) -> dict[str, float]:
    """Seconds after which cg had a peer's last error, and how often they fit into the peer's."""
    found = {}
    for name, curve in curves.items():
        took, error = curve[-1]
        there = [ours for ours, reached in curves.get("ours cg", []) if reached <= error]
        if there and not name.startswith("ours"):
            found |= {f"cg at the last error of {name} s": there[0], f"times faster than {name}": took / there[0]}
    return found


if __name__ == "__main__":
    main()
