"""The first guess of the light: how far out of focus it is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from verglas.ptychography.beam import defocused, guessed_beam, mean_pattern, middle_of
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.reconstruct import reconstruct
from verglas.ptychography.scan import Scan
from verglas.ptychography.simulation import Setting, make_truth, patterns
from verglas.ptychography.simulation_options import DetectorOptions, LightOptions, PathOptions, StarOptions


def simulated() -> tuple[Scan, np.ndarray]:
    setting = Setting(
        StarOptions(spokes=10), LightOptions(width=0.5), PathOptions(positions=60, overlap=0.75), DetectorOptions(window=48)
    )
    truth = make_truth(setting)
    counts_BYX = np.concatenate(list(patterns(truth, setting)))
    return Scan(torch.from_numpy(counts_BYX), torch.from_numpy(truth.recorded_B2), truth.geometry), truth.probe_MYX[0]


def test_a_defocus_spreads_the_light_as_wide_as_it_says() -> None:
    axis = torch.arange(128) - 64
    # A soft edge: a hard one has tails without end, which the mean square radius would count.
    disc_YX = torch.sigmoid((20 - torch.hypot(axis[:, None].double(), axis.double())) / 1.5)
    for width in (0.25, -0.5):
        probe_YX = defocused(disc_YX, 1, width)[0]
        light_YX = probe_YX.abs().square()
        radius2_YX = axis[:, None].double() ** 2 + axis.double() ** 2
        radius = math.sqrt(2 * float((light_YX * radius2_YX).sum() / light_YX.sum()))  # of a disc with this mean square
        assert abs(radius / (abs(width) * 64) - 1) < 0.2
        assert torch.allclose(torch.fft.fftshift(torch.fft.fft2(probe_YX)).abs(), disc_YX.sqrt(), atol=1e-9)


def test_trials_find_the_defocus_and_its_sign() -> None:
    scan, probe_YX = simulated()
    beam = guessed_beam(scan, "cpu")
    assert 0.25 <= beam.width <= 0.85 and beam.error[0] < beam.error[1]
    guess_YX = beam.probe_MYX[0].numpy()
    assert abs(np.vdot(guess_YX, probe_YX)) > 0.5 * np.linalg.norm(guess_YX) * np.linalg.norm(probe_YX)
    options = PtychoOptions(engine="rpie", passes=10)
    *_, lit = reconstruct(replace(scan, probe_MYX=beam.probe_MYX), options)
    *_, dark = reconstruct(scan, options)
    assert lit.error < 0.3 * dark.error


def test_trials_find_the_curvature_of_a_near_field() -> None:
    setting = Setting(
        StarOptions(spokes=10), LightOptions(width=0.6), PathOptions(positions=40, overlap=0.75),
        DetectorOptions(window=48, near_field=True),
    )  # fmt: skip
    truth = make_truth(setting)
    counts_BYX = np.concatenate(list(patterns(truth, setting)))
    scan = Scan(torch.from_numpy(counts_BYX), torch.from_numpy(truth.recorded_B2), truth.geometry)
    beam = guessed_beam(scan, "cpu")
    assert beam.width == 0.4 and beam.error[0] < 0.7 * beam.error[1]  # 1 / (4 x 0.6) is the truth


def test_a_known_width_needs_no_trials() -> None:
    scan, _ = simulated()
    beam = guessed_beam(scan, "cpu", -0.3)
    assert beam.width == -0.3 and math.isnan(beam.error[0])
    assert torch.equal(beam.probe_MYX, defocused(mean_pattern(scan), 1, -0.3))


def test_what_the_mean_pattern_leaves_out() -> None:
    scan, _ = simulated()
    mask_YX = torch.ones(48, 48, dtype=torch.bool)
    mask_YX[24, 24] = False
    known = replace(scan, mask_YX=mask_YX, background_YX=torch.full((48, 48), 0.5))
    mean_YX = mean_pattern(known)
    whole_YX = scan.patterns_BYX.double().mean(0)
    assert mean_YX[24, 24] == 0 and mean_YX.min() >= 0
    assert np.isclose(float(mean_YX[20, 20]), max(float(whole_YX[20, 20]) - 0.5, 0))


def test_neighbours_in_the_middle_are_tried() -> None:
    position_B2 = torch.stack(torch.meshgrid(torch.arange(30.0), torch.arange(30.0), indexing="ij"), -1).reshape(-1, 2)
    chosen_B2 = position_B2[middle_of(position_B2)]
    assert len(chosen_B2) == 120 and (chosen_B2 - 15).abs().max() <= 7
