"""Engines by the kernels of `farfield`, on the CPU through farfield_on_cpu.py: the same passes as by the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from benchmarks.ptychography import judged, simulated

from farfield_on_cpu import device_of_kernels
from ptycho_world import made_up, scan_of
from verglas.kernels import farfield
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.problem import Problem
from verglas.ptychography.reconstruct import reconstruct
from verglas.ptychography.scan import Geometry, Scan

SCAN = scan_of(made_up(side=4), seed=1)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the kernels run."""
    with pytest.MonkeyPatch.context() as patch:
        for place in device_of_kernels(tmp_path_factory.mktemp("fused")):
            if place == "cpu":
                patch.setattr(farfield, "why_not", lambda device, dtype, window: None if dtype == torch.float32 else "double")
                patch.setattr(farfield, "implementation_for", lambda device, dtype: "cuda" if dtype == torch.float32 else "cpu")
            yield place


def whole(scan: Scan) -> Scan:
    return replace(scan, positions_B2=scan.positions_B2.round())


@pytest.mark.parametrize("scan", [SCAN, whole(SCAN)], ids=["fractions", "whole"])
@pytest.mark.parametrize("options", [
    {"warm_up": 1}, {"warm_up": 0, "probe_from": 0}, {"engine": "rpie", "batch_size": 5}, {"engine": "lsq", "batch_size": 9},
    {"warm_up": 0, "probe_modes": 2, "noise": "poisson", "total_variation": 0.01}, {"warm_up": 0, "positions_from": 1},
], ids=str)  # fmt: skip
def test_passes_are_those_of_the_model(
    device: str, scan: Scan, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PtychoOptions(passes=3, **options)  # type: ignore[arg-type]
    assert Problem(scan, chosen, device).why_not_fused is None
    *_, found = reconstruct(scan, chosen, device)
    if scan is SCAN and "probe_from" not in options:
        # Mini-batches: the model shares curvatures of positions between pixels among these, the kernels move the light. So
        # kernels in double precision are what single ones are held to; the model differs by a few percent on the way.
        *_, model = reconstruct(scan, replace(chosen, double=True))
        assert found.found.error_P == pytest.approx(model.found.error_P, rel=5e-2)
        monkeypatch.setattr(farfield, "why_not", lambda device, dtype, window: None)
    *_, expected = reconstruct(scan, replace(chosen, double=True))
    for one, other in zip(found.found.error_P, expected.found.error_P, strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    apart = found.found.object_OLYX.cpu() - expected.found.object_OLYX
    assert apart.norm() < 3e-3 * expected.found.object_OLYX.norm()


def test_single_precision_costs_nothing_against_the_truth(device: str) -> None:
    """Plain conjugate gradients with a known probe, as PtyGer's test has it, but small: the kernels on counts of 16 bits beside
    the model in double precision."""
    scan, truth = simulated(60, 32, photons=1e5)
    plain = PtychoOptions(passes=6, probe_from=0, warm_up=0)
    *_, double = reconstruct(scan, replace(plain, double=True))
    expected = judged(double, truth)
    assert expected.ssim_phase > 0.7 and double.error < 0.3 * double.found.error_P[0]
    for stored in (torch.uint16, torch.float16):
        *_, single = reconstruct(replace(scan, patterns_BYX=scan.patterns_BYX.to(torch.int32).to(stored)), plain, device)
        found = judged(single, truth)
        assert single.error == pytest.approx(double.error, rel=1e-3)
        for name in ("error", "ssim_amplitude", "ssim_phase"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-3), name


def test_what_goes_through_the_model(device: str) -> None:
    near = Geometry("near", 1e-10, 4e-3, 2e-7)
    for scan, options, reason in (
        (SCAN, {"double": True}, "double"), (SCAN, {"object_modes": 2}, "modes of the object"),
        (SCAN, {"opr_modes": 1}, "changes"), (SCAN, {"fit_scale": True}, "scales"),
        (SCAN, {"fit_background": True}, "background"), (replace(SCAN, geometry=near), {}, "near"),
    ):  # fmt: skip
        why = Problem(scan, PtychoOptions(**options), device).why_not_fused  # type: ignore[arg-type]
        assert why is not None and (reason in why or device == "cuda")
    *_, plain = reconstruct(replace(SCAN, geometry=near), PtychoOptions(passes=1), device)
    *_, fused = reconstruct(SCAN, PtychoOptions(passes=1), device)
    assert plain.plan[-1] == "sums by the model, array by array: a near field"
    assert fused.plan[-1] == "sums by the far field's kernels"
