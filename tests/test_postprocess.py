"""Post-processing functions against formulas: random generator, curves, Guinier fit, masks, cones, orientation figures."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from verglas.core.masks import soft_sphere
from verglas.core.rotations import matrix_from_euler, random_rotations
from verglas.core.sphere import even_directions
from verglas.core.symmetry import symmetry_matrices
from verglas.core.threshold import otsu_threshold
from verglas.postprocess.automask import automatic_threshold, grow, make_mask, soften, without_small_pieces
from verglas.postprocess.curves import (
    correct_for_mask,
    half_map_curves,
    half_transform,
    last_good_shell,
    particle_fsc,
    shell_correlation,
)
from verglas.postprocess.directional import conical_fsc, crossing_shell, directional_fsc, sphericity
from verglas.postprocess.options import FscOptions, MaskOptions, SharpenOptions
from verglas.postprocess.orientations import fourier_sampling, orientation_efficiency
from verglas.postprocess.random_phases import GlibcRandom, randomise_phases, squared_radius
from verglas.postprocess.sharpening import fit_guinier, fsc_weights, sharpen

PIXEL = 2.0


def blobs(box: int, seed: int = 0, sigma: float = 1.2) -> torch.Tensor:
    """A particle of Gaussian blobs within a third of the box, [Z, Y, X] float64."""
    rng = np.random.default_rng(seed)
    points = np.zeros((box, box, box))
    at = (box // 2 + rng.uniform(-box / 5, box / 5, (60, 3))).astype(int)
    np.add.at(points, tuple(at.T), rng.uniform(0.5, 1.5, 60))
    return torch.from_numpy(ndimage.gaussian_filter(points, sigma) * 100)


def half_maps(box: int = 48, noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = blobs(box, seed)
    return tuple(truth + noise * torch.randn(truth.shape, generator=generator, dtype=torch.float64) for _ in range(2))


def coordinates(box: int) -> tuple[torch.Tensor, ...]:
    """Integer frequencies z, y, x of the stored half."""
    axis = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64)
    return torch.meshgrid(axis, axis, torch.arange(box // 2 + 1, dtype=torch.float64), indexing="ij")


@pytest.mark.parametrize("seed", [0, 1, 7, 123456789, 2**31 - 1, 2**31 + 11])
def test_random_numbers_are_those_of_the_c_library(seed):
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        pytest.skip("needs glibc")
    libc.srand(ctypes.c_uint(seed))
    expected = [libc.rand() for _ in range(2000)]
    random = GlibcRandom(seed)
    # Drawn in uneven pieces, so that the sequence goes on across calls.
    actual = np.concatenate([random.draw(n) for n in (1, 2, 30, 31, 32, 904, 1000)])
    assert actual.tolist() == expected


def test_first_random_number_is_the_published_one():
    assert int(GlibcRandom(1).draw(1)[0]) == 1804289383


def test_phases_are_random_beyond_the_shell_and_kept_before():
    fourier = half_transform(blobs(24))
    changed = half_transform(randomise_phases(fourier, 5, GlibcRandom(3)))
    r2 = squared_radius(24)
    assert (changed - fourier).abs()[r2 < 25].max() < 1e-12
    # Off the plane x = 0 and the Nyquist column the amplitudes are those of the map.
    inner = (r2 >= 25) & (torch.arange(13) > 0) & (torch.arange(13) < 12)
    assert (changed.abs() - fourier.abs())[inner].abs().max() < 1e-12
    turned = torch.angle(changed[inner] / fourier[inner])
    assert abs(float(torch.exp(1j * turned).mean().abs())) < 4 / math.sqrt(int(inner.sum()))


def test_shell_correlation_against_a_loop():
    a, b = (half_transform(m) for m in half_maps(16))
    z, y, x = coordinates(16)
    shells = (torch.sqrt(z * z + y * y + x * x) + 0.5).floor().long()
    actual = shell_correlation(a, b, shells)
    for s in range(9):
        i = shells == s
        expected = (a[i] * b[i].conj()).real.sum() / ((a[i].abs() ** 2).sum() * (b[i].abs() ** 2).sum()).sqrt()
        assert actual[s] == pytest.approx(float(expected), abs=1e-12)


def test_correction_and_particle_fraction_formulas():
    masked, random = torch.tensor([1.0, 0.9, 0.8, 0.6, 0.4]), torch.tensor([1.0, 0.5, 0.5, 0.2, 0.4])
    assert correct_for_mask(masked, random, 1).tolist() == pytest.approx([1.0, 0.9, 0.8, 0.5, 0.0])
    # f = 2: half of the sphere is particle; FSC 1/3 -> 1/2 (SSNR doubles).
    assert float(particle_fsc(torch.tensor(1 / 3), 2.0)) == pytest.approx(0.5)
    assert last_good_shell(torch.tensor([-1.0, 0.9, 0.2, 0.1, 0.9])) == 2
    assert last_good_shell(torch.tensor([1.0, 1.0, 1.0])) == 2


def test_phase_randomised_fsc_shows_what_the_mask_correlates():
    """A hard tight mask correlates shells that hold nothing but noise; the correction takes that away and a warning says so."""
    generator = torch.Generator().manual_seed(1)
    truth = blobs(48, sigma=3.0)
    first, second = (truth + 0.05 * torch.randn(truth.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (truth > 0.2 * truth.max()).double()  # hard edges
    curves = half_map_curves(first, second, mask, PIXEL, FscOptions())
    noise_shells = slice(20, 25)
    assert curves.unmasked_S[noise_shells].abs().max() < 0.05 and curves.masked_S[noise_shells].min() > 0.4
    assert curves.best_S[noise_shells].abs().max() < 0.1
    assert "the mask itself correlates" in curves.warnings[0]
    assert curves.randomised_from == int((curves.unmasked_S[1:] < 0.8).nonzero()[0]) + 1


def test_identical_maps_have_no_randomised_curve_and_say_so():
    one = half_maps()[0]
    curves = half_map_curves(one, one, soft_sphere(48, 16, 4).double(), PIXEL, FscOptions())
    assert curves.random_S is None and curves.resolution == pytest.approx(2 * PIXEL)
    assert any("never falls below" in text for text in curves.warnings)
    assert any("Nyquist" in text for text in curves.warnings)


def test_a_mask_beside_the_particle_is_dropped_unless_forced():
    first, second = half_maps()
    mask = soft_sphere(48, 5, 3).roll(20, 0).double()
    curves = half_map_curves(first, second, mask, PIXEL, FscOptions())
    assert curves.best_S is curves.unmasked_S and "mask does not fit" in curves.warnings[0]
    forced = half_map_curves(first, second, mask, PIXEL, FscOptions(force_mask=True))
    assert forced.best_S is not forced.unmasked_S


@pytest.mark.parametrize("bfactor", [0.0, 80.0, 200.0])
def test_guinier_fit_finds_the_bfactor_of_a_white_map(bfactor):
    """White noise damped by exp(-B/4 u^2) has ln<|F|> = const - B/4 u^2; sharpening by the fit makes it flat again."""
    box = 64
    white = torch.randn(box, box, box, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u2 = squared_radius(box).double() / (box * PIXEL) ** 2
    damped = torch.fft.irfftn(torch.fft.rfftn(white) * torch.exp(-bfactor / 4 * u2), s=white.shape)
    curves = half_map_curves(damped, damped, None, PIXEL, FscOptions())
    result = sharpen(damped, curves, SharpenOptions(autob_lowres=12), None)
    assert result.guinier.line is not None
    assert result.bfactor == pytest.approx(-bfactor, abs=2.0)
    flat = result.guinier.sharpened_S[8:32]
    assert flat.std() < 0.02


def test_fit_is_exact_on_a_line_and_absent_without_points():
    x = torch.linspace(0, 0.05, 30, dtype=torch.float64)
    line = fit_guinier(x, 3.0 - 50 * x, low=10.0, high=5.0)
    assert line is not None and line.points == int(((x >= 0.01) & (x <= 0.04)).sum())
    assert (line.slope, line.intercept, line.correlation) == pytest.approx((-50, 3, 1))
    assert fit_guinier(x, 3.0 - 50 * x, low=4.0, high=0.0) is None


def test_mtf_and_weighting_act_per_shell():
    first, second = half_maps()
    curves = half_map_curves(first, second, None, PIXEL, FscOptions())
    plain = sharpen(first, curves, SharpenOptions(bfactor=0.0, skip_fsc_weighting=True), None).map_ZYX
    assert (plain - first).abs().max() < 1e-10
    halved = sharpen(first, curves, SharpenOptions(bfactor=0.0, skip_fsc_weighting=True), lambda u: torch.full_like(u, 0.5))
    below = squared_radius(48) < 24**2
    ratio = half_transform(halved.map_ZYX)[below] / half_transform(first)[below]
    assert (ratio - 2).abs().max() < 1e-6
    weights = fsc_weights(torch.tensor([1.0, 0.5, 0.00001, 0.9]))
    assert weights.tolist() == pytest.approx([1.0, math.sqrt(2 / 3), 0.0, 0.0])


def test_otsu_splits_two_levels():
    values = np.concatenate([np.random.default_rng(0).normal(0, 0.1, 9000), np.random.default_rng(1).normal(2, 0.1, 1000)])
    assert 0.4 < otsu_threshold(values) < 1.6


@pytest.mark.parametrize("share, noise", [(0.25, 0.0), (0.25, 0.3), (0.5, 0.3)])
def test_automatic_threshold_finds_a_ball(share, noise):
    """A ball of density 1 in noise, smoothed: the region above the threshold has the ball's volume within a third."""
    radius = 32 * share
    ball = soft_sphere(64, radius, 1.0).double()
    noisy = ball + noise * torch.randn(ball.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask, threshold = make_mask(noisy, PIXEL, MaskOptions(mask_lowpass=10, mask_extend=0, mask_edge=0))
    assert 0.2 < threshold < 0.8
    assert float(mask.sum()) == pytest.approx(4 / 3 * math.pi * (radius + 0.5) ** 3, rel=0.33)
    assert automatic_threshold(noisy + 5) == pytest.approx(automatic_threshold(noisy) + 5, abs=0.05)


def test_growing_and_softening_a_voxel():
    one = np.zeros((15, 15, 15), bool)
    one[7, 7, 7] = True
    z, y, x = np.indices(one.shape) - 7
    distance = np.sqrt(z * z + y * y + x * x)
    assert (grow(one, 3) == (distance < 3)).all()
    assert (grow(grow(one, 4), -1) <= grow(one, 4)).all()
    edge = soften(one, 4.0).numpy()
    assert np.abs(edge - np.where(distance < 4, 0.5 + 0.5 * np.cos(np.pi * distance / 4), 0)).max() < 1e-6
    two = one.copy()
    two[2:6, 2:6, 2:6] = True
    assert without_small_pieces(two).sum() == 64


def test_cones_against_a_loop():
    a, b = (half_transform(m) for m in half_maps(32))
    z, y, x = coordinates(32)
    radius = torch.sqrt(z * z + y * y + x * x)
    once = torch.where(x == 0, 0.5, 1.0).expand_as(radius)
    for direction in even_directions(4, hemisphere=True):
        cosine = (x * direction[0] + y * direction[1] + z * direction[2]).abs() / radius.clamp_min(1e-9)
        cone = (cosine >= math.cos(math.radians(30))) & ((radius + 0.5).floor() == 12)
        num = ((a * b.conj()).real * once)[cone].sum()
        den = ((a.abs() ** 2 * once)[cone].sum() * (b.abs() ** 2 * once)[cone].sum()).sqrt()
        actual = conical_fsc(a, b, direction[None], half_angle=30.0)[0, 12]
        # Cells of 1.5 degrees blur the cone's rim, where a tenth of its coefficients lie.
        assert float(actual) == pytest.approx(float(num / den), abs=0.03)


def test_a_missing_wedge_shows_in_its_direction_only():
    box = 48
    first, second = half_maps(box, noise=0.05)
    z, y, x = coordinates(box)
    along_z = z.abs() > 0.9 * torch.sqrt(z * z + y * y + x * x) + 1e-9
    noise = torch.randn(2, box, box, box, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    transforms = [
        torch.where(along_z, half_transform(n), half_transform(m)) for n, m in zip(noise * first.std(), (first, second))
    ]
    found = directional_fsc(*transforms, PIXEL)
    worst = found.direction_D3[found.resolution_D.argmax()]
    assert abs(float(worst[2])) > 0.9
    assert found.worst > 2 * found.median and found.area_ratio < 0.5
    even = directional_fsc(half_transform(first), half_transform(second), PIXEL)
    assert even.sphericity > 0.9 > found.sphericity and even.area_ratio > 0.8


def test_crossing_and_sphericity_formulas():
    assert crossing_shell(torch.tensor([1.0, 1.0, 0.543, -0.257])) == pytest.approx(2.5)
    assert crossing_shell(torch.tensor([1.0, 0.9, 0.8])) == 2
    direction = even_directions(400, hemisphere=True)
    assert sphericity(direction, torch.full((400,), 7.0).double()) == pytest.approx(1.0, abs=1e-12)
    # A prolate spheroid of axes 1, 1, 2: V = 8 pi / 3, A = 2 pi (1 + 2 asin(e) / e), e = sqrt(3) / 2.
    e = math.sqrt(3) / 2
    expected = math.pi ** (1 / 3) * (16 * math.pi) ** (2 / 3) / (2 * math.pi * (1 + 2 * math.asin(e) / e))
    radius = 1 / (direction[:, 0] ** 2 + direction[:, 1] ** 2 + direction[:, 2] ** 2 / 4).sqrt()
    # pi^(1/3) (6 V)^(2/3) with V = 8 pi / 3 is pi^(1/3) (16 pi)^(2/3).
    assert sphericity(direction, radius) == pytest.approx(expected, abs=0.005)


def views_about_z(n: int, tilt: float) -> torch.Tensor:
    rot = torch.arange(n, dtype=torch.float64) * (360 / n)
    return matrix_from_euler(rot, torch.full_like(rot, tilt), torch.zeros_like(rot))


def test_sampling_compensation_of_known_distributions():
    even = fourier_sampling(random_rotations(20000, torch.Generator().manual_seed(0)), n_directions=2000)
    assert even.scf > 0.98 and even.unsampled == 0
    side = fourier_sampling(views_about_z(20000, 90.0), n_directions=2000)
    assert side.scf == pytest.approx(8 / math.pi**2, abs=0.02)  # <1/s> = pi^2/8 for s ~ 1/sin(polar angle)
    top = fourier_sampling(views_about_z(2000, 5.0), n_directions=2000)
    assert top.scf < 0.05
    # Planes perpendicular to views within 5 degrees of z miss every direction within 85 degrees of z.
    assert top.unsampled == pytest.approx(math.cos(math.radians(85.5)) * -1 + 1, abs=0.03)


def test_symmetry_evens_out_the_views():
    """Views 40 degrees from z leave a cone of 50 degrees about z empty; turned onto x, y and z they leave nothing."""
    views = views_about_z(500, 40.0)
    alone = fourier_sampling(views, n_directions=2000)
    octahedral = fourier_sampling(views, symmetry_matrices("O"), n_directions=2000)
    assert alone.unsampled == pytest.approx(1 - math.cos(math.radians(49.4)), abs=0.02)
    assert octahedral.unsampled == 0 and alone.scf < 0.4 and octahedral.scf > 0.7


def test_efficiency_orders_distributions():
    even = orientation_efficiency(random_rotations(5000, torch.Generator().manual_seed(0)))
    side, top = orientation_efficiency(views_about_z(5000, 90.0)), orientation_efficiency(views_about_z(5000, 5.0))
    assert even > 0.98 and 0.6 < side < 0.85 and top < 0.3


def test_point_spread_of_side_views_along_their_axis():
    """Along z every side view spreads a point by its own Gaussian, so the half-height radius is half of `resolution`."""
    from verglas.postprocess.orientations import point_spread_radii

    radius = point_spread_radii(views_about_z(5000, 90.0), resolution=4.0, n_directions=2000)
    pole = even_directions(2000, hemisphere=True)[:, 2].argmax()
    assert float(radius[pole]) == pytest.approx(2.0, abs=0.02)
