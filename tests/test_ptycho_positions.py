"""Positions that the file has wrong are found again, up to what no data tell: a shift and an affine map of all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ptycho_world import made_up, scan_of
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.reconstruct import reconstruct
from verglas.ptychography.scan import Geometry, Scan
from verglas.ptychography.simulation import Setting, make_truth, patterns
from verglas.ptychography.simulation_options import DetectorOptions, LightOptions, PathOptions


def left_over(found: np.ndarray, true: np.ndarray) -> float:
    """rms distance, px, after the affine map that fits best."""
    basis = np.concatenate([true, np.ones((len(true), 1))], 1)
    left = found - basis @ np.linalg.lstsq(basis, found, rcond=None)[0]
    return float(np.sqrt((left**2).sum(1).mean()))


@pytest.mark.parametrize("engine", ["rpie", "lsq", "cg"])
def test_small_errors(engine: str) -> None:
    truth = made_up()
    scan = scan_of(truth, seed=1)
    draw = torch.Generator().manual_seed(7)
    wrong = scan.positions_B2 + 0.7 * torch.randn(len(scan), 2, generator=draw, dtype=torch.float64)
    options = PtychoOptions(engine=engine, passes=40, positions_from=3)  # type: ignore[arg-type]
    *_, done = reconstruct(replace(scan, positions_B2=wrong), options)
    assert left_over(wrong.numpy(), truth.positions_B2.numpy()) > 0.8
    assert left_over(done.found.positions_B2.numpy(), truth.positions_B2.numpy()) < 0.1


@pytest.mark.parametrize("near_field", [False, True])
def test_a_position_at_the_rim_comes_home(near_field: bool) -> None:
    """A lone wrong window fits the object that it alone has drawn: it has to be tried on what the others see."""
    geometry = Geometry("near", 1e-10, 2e-3, 2e-7) if near_field else Geometry()
    truth = replace(made_up(), pixel=geometry.object_pixel((32, 32)))
    scan = scan_of(truth, geometry, seed=1)
    wrong = scan.positions_B2.clone()
    wrong[0] += torch.tensor([-6.0, -5.0])
    *_, done = reconstruct(replace(scan, positions_B2=wrong), PtychoOptions(passes=20, positions_from=4))
    found, true = done.found.positions_B2.numpy(), np.concatenate([truth.positions_B2.numpy(), np.ones((len(scan), 1))], 1)
    affine = np.linalg.lstsq(true[1:], found[1:], rcond=None)[0]
    assert np.linalg.norm(found[0] - true[0] @ affine) < 0.3


@pytest.mark.slow
def test_large_errors() -> None:
    """3.5 px rms: some positions are 10 px off, and no slope leads home from there."""
    setting = Setting(
        light=LightOptions(photons=1e5, width=0.5),
        path=PathOptions(positions=150, position_error=3.5, overlap=0.75),
        detector=DetectorOptions(window=64, bits=32),
    )
    truth = make_truth(setting)
    counts = torch.from_numpy(np.concatenate(list(patterns(truth, setting))).astype(np.float32))
    scan = Scan(counts, torch.from_numpy(truth.recorded_B2), probe_MYX=torch.from_numpy(truth.probe_MYX))
    *_, done = reconstruct(scan, PtychoOptions(passes=64, positions_from=5))
    assert left_over(truth.recorded_B2, truth.position_B2) > 3
    assert left_over(done.found.positions_B2.numpy(), truth.position_B2) < 0.2
