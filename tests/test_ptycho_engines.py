"""Engines on made-up data: they fit, find the truth, go on after a pause; parts of the model that are fitted, and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptycho_world import made_up, scan_of, smooth
from verglas.errors import InputError
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.problem import Problem
from verglas.ptychography.reconstruct import PassDone, reconstruct
from verglas.ptychography.scan import Geometry, Scan
from verglas.ptychography.start import as_unknowns

TRUTH = made_up()
SCAN = scan_of(TRUTH)
# Error after 30 passes without noise; a fit without any change of the first guess has 0.1.
ENGINES = {"cg": 4e-4, "lsq": 3e-4, "rpie": 3e-4, "epie": 8e-4, "dm": 3e-4, "raar": 5e-5}


def last(scan: Scan, **options: object) -> PassDone:
    *_, done = reconstruct(scan, PtychoOptions(**options))  # type: ignore[arg-type]
    return done


def agreement(found: Tensor, origin_2: tuple[float, float], truth: Tensor) -> float:
    """Correlation with the truth where all light was, by products of neighbours: free of a factor and a phase ramp."""
    rows, columns = (slice(14 - int(o), 42 - int(o)) for o in origin_2)
    ours, theirs = found[0, 0, rows, columns].cdouble(), truth[0, 0, 14:42, 14:42]
    # A ramp multiplies the ratio of neighbours by the same number everywhere.
    score = []
    for axis in (0, 1):
        a, b = (one.narrow(axis, 1, 27) * one.narrow(axis, 0, 27).conj() for one in (ours, theirs))
        a, b = a - a.mean(), b - b.mean()
        score.append(float(torch.vdot(a.flatten(), b.flatten()).abs() / (a.norm() * b.norm())))
    return min(score)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_fit_and_find_the_truth(engine: str) -> None:
    done = last(SCAN, engine=engine, passes=30)
    assert done.error < ENGINES[engine]
    assert agreement(done.found.object_OLYX, done.found.origin_2, TRUTH.object_OLYX) > 0.93
    assert len(done.found.error_P) == 30 and done.found.error_P[0] > 10 * done.error


@pytest.mark.parametrize("options", [
    {"engine": "cg"}, {"engine": "lsq", "momentum": 0.5}, {"engine": "rpie", "batches": "compact"}, {"engine": "raar"},
    {"engine": "cg", "positions_from": 2, "fit_scale": True, "fit_background": True, "opr_modes": 1, "probe_modes": 2},
], ids=str)  # fmt: skip
def test_goes_on_to_the_same_result(options: dict[str, object]) -> None:
    chosen = PtychoOptions(passes=6, **options)  # type: ignore[arg-type]
    *_, whole = reconstruct(SCAN, chosen)
    passes = reconstruct(SCAN, chosen)
    paused = [next(passes) for _ in range(3)][-1]
    *_, resumed = reconstruct(SCAN, chosen, after=paused)
    assert resumed.found.error_P == whole.found.error_P
    assert torch.equal(resumed.found.object_OLYX, whole.found.object_OLYX)
    assert torch.equal(resumed.found.positions_B2, whole.found.positions_B2)


def test_double_precision_agrees_with_single() -> None:
    single, double = (last(SCAN, engine="cg", passes=10, double=flag) for flag in (False, True))
    assert double.found.object_OLYX.dtype == torch.complex128
    assert abs(single.error - double.error) < 1e-3 * double.error


def test_poisson_noise() -> None:
    """Fitted to counted photons, Poisson's likelihood is greater than the truth's: noise is fitted, too."""
    truth = made_up(counts=2e4)
    noisy = scan_of(truth, seed=1)
    options = PtychoOptions(engine="cg", noise="poisson", passes=50)
    *_, done = reconstruct(noisy, options)
    problem = Problem(noisy, options)
    found, true = (
        problem.sums(as_unknowns(one, noisy, problem.like), ("object_OLYX",)).loss for one in (done.found, truth)
    )
    assert found < true


def test_bad_pixels_do_not_count() -> None:
    mask = torch.rand(SCAN.shape, generator=torch.Generator().manual_seed(3)) > 0.05
    spoilt = torch.where(mask, SCAN.patterns_BYX, torch.tensor(float("nan")))
    spoilt[: len(SCAN) // 2] = torch.where(mask, SCAN.patterns_BYX[: len(SCAN) // 2], torch.tensor(-1.0))
    first, second = (
        last(replace(SCAN, patterns_BYX=patterns, mask_YX=mask), engine="cg", passes=7)
        for patterns in (SCAN.patterns_BYX, spoilt)
    )
    assert first.error == second.error and first.error < 0.02


def test_background_and_scale_are_found() -> None:
    draw = torch.Generator().manual_seed(4)
    scale = 0.7 + 0.6 * torch.rand(len(SCAN), generator=draw, dtype=torch.float64)
    background = torch.full(SCAN.shape, 2.0, dtype=torch.float64)
    scan = scan_of(replace(TRUTH, scale_B=scale, background_YX=background))
    without = last(scan, engine="cg", passes=60)
    done = last(scan, engine="cg", passes=60, fit_scale=True, fit_background=True)
    assert done.error < 0.1 * without.error
    assert (done.found.scale_B - scale / scale.mean()).abs().max() < 0.08  # 0.3 at the start
    assert 1.5 < float(done.found.background_YX.median()) < 2.5


@pytest.mark.parametrize("part", ["probe modes", "changing probe", "near field", "slices"])
def test_fits_with_more_of_the_model(part: str) -> None:
    options: dict[str, object] = {"engine": "cg", "passes": 60}
    truth, geometry = TRUTH, Geometry()
    if part == "probe modes":
        second = TRUTH.probe_MYX * torch.linspace(-1, 1, 32, dtype=torch.float64) * 1.5
        truth, options["probe_modes"] = replace(TRUTH, probe_MYX=torch.cat([TRUTH.probe_MYX, second])), 2
    elif part == "changing probe":
        eigen = TRUTH.probe_MYX * smooth(32, 32, seed=9, width=3)
        weight = 0.3 * torch.randn(len(SCAN), 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        truth, options["opr_modes"] = replace(TRUTH, eigen_KYX=eigen, opr_BK=weight), 1
    elif part == "near field":
        geometry = Geometry("near", 1e-10, 2e-3, 2e-7)
    else:
        geometry = Geometry("far", 1e-10, 2.0, 75e-6, (3e-4,))
        pixel = geometry.object_pixel(SCAN.shape)
        second_slice = torch.exp(0.3j * smooth(*TRUTH.object_OLYX.shape[-2:], seed=8, width=2))
        truth = replace(TRUTH, object_OLYX=torch.cat([TRUTH.object_OLYX, second_slice[None, None]], 1), pixel=pixel)
    truth = replace(truth, pixel=geometry.object_pixel(SCAN.shape))
    scan = scan_of(truth, geometry)
    done = last(scan, **options)
    assert done.error < 2e-3
    if part in ("probe modes", "changing probe"):
        assert done.error < 0.4 * last(scan, engine="cg", passes=60).error


def test_limits_and_total_variation() -> None:
    noisy = scan_of(made_up(counts=2e3), seed=1)
    plain = last(noisy, engine="cg", passes=20)
    smoothed = last(noisy, engine="cg", passes=20, total_variation=0.05)
    limited = last(noisy, engine="lsq", passes=5, amplitude_limit=1.0)
    assert roughness(smoothed) < 0.8 * roughness(plain)
    assert float(limited.found.object_OLYX.abs().max()) < 1 + 1e-5


def roughness(done: PassDone) -> float:
    return float(done.found.object_OLYX.diff(dim=-1).abs().mean())


def test_bad_data_is_refused() -> None:
    for patterns, word in ((SCAN.patterns_BYX - 1, "negative"), (SCAN.patterns_BYX * 0, "light")):
        with pytest.raises(InputError, match=word):
            last(replace(SCAN, patterns_BYX=patterns), passes=1)
    for wrong in ({"passes": 0}, {"momentum": 1.0}, {"opr_modes": 1, "engine": "dm"}):
        with pytest.raises(InputError):
            PtychoOptions(**wrong)  # type: ignore[arg-type]
