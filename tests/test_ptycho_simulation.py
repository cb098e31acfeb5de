"""Simulated scans and their judge: known numbers, and what must be found again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from verglas.errors import InputError
from verglas.ptychography import judge as judging
from verglas.ptychography.phase import levelled, unwrapped
from verglas.ptychography.simulation import Setting, beam, intensities, make_truth, moved, patterns, siemens_star, walk
from verglas.ptychography.simulation_options import DetectorOptions, LightOptions, PathOptions, StarOptions


def small(**changed: object) -> Setting:
    detector = DetectorOptions(window=32, **{k: v for k, v in changed.items() if k in ("near_field", "background", "noiseless")})
    light = LightOptions(**{k: v for k, v in changed.items() if k in ("modes", "photons", "fluctuation", "optic", "cone")})
    rest = {k: v for k, v in changed.items() if k in ("path", "positions", "jitter", "position_error", "whole_pixels")}
    return Setting(light=light, path=PathOptions(**{"positions": 30, **rest}), detector=detector, seed=3)


def test_a_star_has_the_transmission_that_was_asked_for() -> None:
    star = StarOptions(phase=-0.5, absorption=0.3, support=0.0)
    object_YX = siemens_star((120, 150), star)
    assert np.allclose([np.abs(object_YX).min(), np.abs(object_YX).max()], [0.7, 1.0])
    assert np.isclose(np.angle(object_YX).min(), -0.5)
    assert 0.4 < (np.abs(object_YX[40:80, 50:100]) < 0.85).mean() < 0.6  # half of it is bars


@pytest.mark.parametrize("optic", ["aperture", "zone-plate"])
@pytest.mark.parametrize("near", [False, True])
def test_a_beam_has_its_power_width_and_modes(optic: str, near: bool) -> None:
    light = LightOptions(optic=optic, modes=3, photons=5e4, width=0.4, cone=0.3)  # type: ignore[arg-type]
    probe_MYX = beam(light, 64, near)
    flat = probe_MYX.reshape(3, -1)
    gram = flat @ flat.conj().T
    assert np.isclose(np.trace(gram).real, 5e4) and np.allclose(gram, np.diag(np.diag(gram)), atol=1e-6)
    assert np.allclose(np.diag(gram).real[1:] / np.diag(gram).real[:-1], 0.5)
    power_YX = np.abs(probe_MYX[0]) ** 2
    y, x = np.mgrid[:64, :64] - 32
    assert abs((power_YX * y).sum() / power_YX.sum()) < 0.6  # about pixel 32
    inside = power_YX[np.hypot(y, x) < 0.6 * 0.4 * 64].sum() / power_YX.sum()
    assert inside > 0.85


def test_a_pattern_is_the_sum_written_out() -> None:
    truth = make_truth(small(modes=2))
    b, n = 4, 32
    y0, x0 = truth.position_B2[b]
    rows, columns = int(y0), int(x0)
    probe_MYX = moved(truth.probe_MYX, np.array([[y0 - rows, x0 - columns]]))[0]
    wave_MYX = probe_MYX * truth.object_YX[rows : rows + n, columns : columns + n]
    r = np.arange(n)
    kernel = np.exp(-2j * math.pi * np.outer(r - n // 2, r) / n) / math.sqrt(n)  # direct beam in the middle
    expected_YX = (np.abs(kernel @ wave_MYX @ kernel.T) ** 2).sum(0) * truth.scale_B[b]
    found_YX = intensities(truth, truth.position_B2[b : b + 1], truth.scale_B[b : b + 1])[0]
    assert np.allclose(found_YX, expected_YX, atol=1e-9 * expected_YX.max())


def test_free_space_keeps_power_and_bends_light() -> None:
    truth = make_truth(small(near_field=True))
    found_BYX = intensities(truth, truth.position_B2[:3], np.ones(3))
    assert truth.geometry.kind == "near" and np.isclose(truth.geometry.object_pixel((32, 32))[0], 1e-8)
    for b in range(3):  # what leaves the object arrives at the detector
        y, x = np.floor(truth.position_B2[b]).astype(int)
        probe_MYX = moved(truth.probe_MYX, truth.position_B2[b : b + 1] % 1)[0]
        exit_YX = probe_MYX[0] * truth.object_YX[y : y + 32, x : x + 32]
        assert np.isclose(found_BYX[b].sum(), (np.abs(exit_YX) ** 2).sum())
        assert np.abs(found_BYX[b] - np.abs(exit_YX) ** 2).max() > 0.1 * found_BYX[b].max()


@pytest.mark.parametrize("path", ["raster", "spiral", "fermat"])
def test_paths_have_their_step(path: str) -> None:
    position_B2 = walk(PathOptions(path=path, positions=100), 7.0)  # type: ignore[arg-type]
    distance = np.linalg.norm(position_B2[:, None] - position_B2, axis=-1) + 1e9 * np.eye(100)
    assert abs(np.median(distance.min(1)) / 7.0 - 1) < 0.2
    area = np.prod(np.ptp(position_B2, axis=0)) * (math.pi / 4 if path != "raster" else 1)
    assert abs(area / (100 * 49) - 1) < 0.45


def test_counts_are_drawn_from_what_is_expected() -> None:
    setting = small(photons=2e4, background=0.5, fluctuation=0.1)
    truth = make_truth(setting)
    counts_BYX = np.concatenate(list(patterns(truth, setting))).astype(float)
    expected_BYX = intensities(truth, truth.position_B2, truth.scale_B) + 0.5
    chi2 = ((counts_BYX - expected_BYX) ** 2 / expected_BYX).mean()
    assert abs(chi2 - 1) < 0.05 and abs(counts_BYX.sum() / expected_BYX.sum() - 1) < 0.01
    assert np.array_equal(counts_BYX, np.concatenate(list(patterns(truth, setting))))
    assert 0.05 < truth.scale_B.std() < 0.2 and np.isclose(truth.scale_B.mean(), 1)


def test_recorded_positions_err_as_asked() -> None:
    truth = make_truth(small(position_error=3.0, positions=400))
    error_B2 = truth.position_B2 - truth.recorded_B2
    assert abs(math.sqrt((error_B2**2).sum(1).mean()) - 3.0) < 0.3
    whole = make_truth(small(whole_pixels=True)).position_B2
    assert np.array_equal(whole, np.round(whole))
    for position_B2 in (truth.position_B2, truth.recorded_B2):
        assert position_B2.min() >= 0 and (position_B2.max(0) + 32 <= truth.object_YX.shape).all()


def test_options_that_make_no_sense_are_refused() -> None:
    for options in (StarOptions(absorption=1.0), LightOptions(width=1.2), PathOptions(positions=1), DetectorOptions(window=33)):
        with pytest.raises(InputError, match="expected"):
            options.check()


def test_the_judge_removes_what_data_cannot_tell() -> None:
    y, x = np.mgrid[:160, :140].astype(float)
    truth_YX = siemens_star((160, 140), StarOptions(spokes=12))
    smooth_YX = ndimage.gaussian_filter(truth_YX.real, 2.5) + 1j * ndimage.gaussian_filter(truth_YX.imag, 2.5)
    shift, slope = (2.3, -4.6), (0.05, -0.021)
    found_YX = judging.shifted(smooth_YX, (-shift[0], -shift[1]))
    found_YX = found_YX * 1.7 * np.exp(0.9j - 1j * (slope[0] * (y - 80) + slope[1] * (x - 70)))
    seen_YX = np.zeros(truth_YX.shape, bool)
    seen_YX[15:-15, 15:-15] = True
    verdict, _ = judging.judge(found_YX, smooth_YX, seen_YX)
    assert np.allclose(verdict.alignment.shift_2, shift, atol=5e-3) and np.allclose(verdict.alignment.slope_2, slope, atol=1e-4)
    assert verdict.error < 1e-2 and verdict.ssim_amplitude > 0.999 and verdict.ssim_phase > 0.999
    noise_YX = 0.1 * np.random.default_rng(0).normal(size=(2, 160, 140))
    worse, _ = judging.judge(found_YX + 1.7 * (noise_YX[0] + 1j * noise_YX[1]), smooth_YX, seen_YX)
    power = (np.abs(smooth_YX[seen_YX]) ** 2).mean()
    assert np.isclose(worse.error, math.sqrt(0.02 / power), rtol=0.03) and worse.ssim_phase < 0.99


def test_ssim_by_hand() -> None:
    image_YX = np.random.default_rng(1).normal(size=(40, 40))
    everywhere = np.ones((40, 40), bool)
    assert np.isclose(judging.ssim(image_YX, image_YX, everywhere), 1.0)
    assert judging.ssim(6 - image_YX, 3 + image_YX, everywhere) < -0.7  # same means, opposite structure
    flat = np.full((40, 40), 2.0)
    scale = np.ones((40, 40))
    scale[0, 0] = 2.0  # range 1: c1 = 1e-4
    inner = np.zeros((40, 40), bool)
    inner[20:30, 20:30] = True
    inner[0, 0] = True
    expected = (2 * 2 * 1 + 1e-4) / (4 + 1 + 1e-4)
    assert np.isclose(judging.ssim(flat, scale, inner), expected)


def test_rings_of_noise_and_of_signal() -> None:
    random = np.random.default_rng(5)

    def white() -> np.ndarray:
        return random.normal(size=(128, 128)) + 1j * random.normal(size=(128, 128))

    signal_YX = white()
    frequency_S, alike_S, _ = judging.frc(signal_YX, signal_YX)
    assert np.allclose(alike_S[1:], 1) and frequency_S[-1] == 0.5
    noise1_YX, noise2_YX = white(), white()
    _, half_S, halfbit_S = judging.frc(signal_YX + noise1_YX, signal_YX + noise2_YX)
    assert abs(half_S[20:].mean() - 0.5) < 0.05  # SNR 1
    _, none_S, _ = judging.frc(noise1_YX, noise2_YX)
    assert none_S[10:].max() < 0.3 and (none_S[10:] > halfbit_S[10:]).mean() < 0.05
    assert judging.resolution(frequency_S, np.where(frequency_S < 0.2, 1.0, 0.0), halfbit_S) == pytest.approx(5.0, rel=0.1)
    dip_S = np.where((frequency_S < 0.2) & (np.abs(frequency_S - 0.04) > 0.02), 1.0, 0.0)  # at long periods, hardly determined
    assert judging.resolution(frequency_S, dip_S, halfbit_S) == pytest.approx(5.0, rel=0.1)
    assert judging.resolution(frequency_S, 0 * frequency_S, halfbit_S) == np.inf


def test_what_is_seen_is_where_light_went() -> None:
    probe_MYX = np.zeros((1, 20, 20), complex)
    probe_MYX[0, 5:15, 5:15] = 1
    seen_YX = judging.seen_region(np.array([[0.0, 0.0], [0, 10], [10, 0], [10, 10]]), probe_MYX, (30, 40))
    expected_YX = np.zeros((30, 40), bool)
    expected_YX[5:25, 5:25] = True
    assert np.array_equal(seen_YX, expected_YX)
    rows, columns = judging.largest_square(seen_YX)
    assert 18 <= rows.stop - rows.start <= 20 and seen_YX[rows, columns].all()


def test_phases_without_slope_and_without_jumps() -> None:
    y, x = np.mgrid[:60, :80].astype(float)
    smooth_YX = 9 * np.exp(-((y - 30) ** 2 + (x - 40) ** 2) / 300)
    jumpy_YX = np.angle(np.exp(1j * smooth_YX))
    found_YX = unwrapped(jumpy_YX)
    assert np.allclose(found_YX - smooth_YX, (found_YX - smooth_YX)[0, 0], atol=1e-9)
    seen_YX = np.ones((60, 80), bool)
    tilted_YX = 0.7 * np.exp(1j * (0.2 * np.sin(x) + 0.3 * y - 0.1 * x + 1.0))
    level_YX = levelled(tilted_YX, seen_YX)
    assert np.abs(np.angle(level_YX)).max() < 0.25 and np.allclose(np.abs(level_YX), 0.7)


def test_positions_are_judged_but_for_an_affine_map() -> None:
    random = np.random.default_rng(2)
    truth_B2 = random.uniform(0, 100, (200, 2))
    error_B2 = random.normal(0, 0.3 / math.sqrt(2), (200, 2))
    found_B2 = (truth_B2 + error_B2) @ np.array([[1.02, 0.01], [-0.03, 0.99]]) + np.array([5.0, -7.0])
    assert abs(judging.position_error(found_B2, truth_B2) / 0.3 - 1) < 0.1
