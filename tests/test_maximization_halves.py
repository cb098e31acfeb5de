"""The maximization of a refinement: halves, joint solution, references; against formulas written out plainly.

Letters at the end of a name are its axes: K Fourier coefficients, V packed voxels, S shells, Z Y X volume.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blobs import Blobs
from verglas.core.fourier import centred_rfft3, half_plane_pixels, shells_of_half_volume
from verglas.core.rotations import random_rotations
from verglas.core.shells import fsc
from verglas.core.symmetry import symmetry_matrices
from verglas.errors import InputError
from verglas.io.mrc import Map
from verglas.maximization import reference as ref
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import fsc_of_sums, gathered_halves, join_low_shells, solve_halves, solve_joined, solve_single
from verglas.maximization.solve import gather_sums
from verglas.maximization.solvent import corrected_fsc, random_phases
from verglas.projection.volume import FourierVolume

BOX, PIXEL = 32, 3.0
FIELD = BOX * PIXEL
BLOBS = Blobs.random(25, spread=28.0, sigma=3.0)
MAP = BLOBS.map(BOX, PIXEL)


def halves(radius: int = BOX // 2, padding: float = 2.0, views: int = 300, level: float = 3.0) -> tuple[Accumulator, Accumulator]:
    """Noisy views of blobs in two accumulators, the same every time."""
    generator = torch.Generator().manual_seed(7)
    pixels = half_plane_pixels(BOX, radius)
    made = []
    for _ in range(2):
        poses = random_rotations(views, generator)
        slices = BLOBS.slices(poses, pixels.frequency_K2(PIXEL, torch.float64), FIELD, PIXEL)
        ctf = torch.cos(0.01 * pixels.shell_K**2 * torch.rand(views, 1, generator=generator, dtype=torch.float64))
        noise = torch.randn(views, 2, pixels.count, generator=generator, dtype=torch.float64) * level * float(slices.abs().mean())
        sums = Accumulator(BOX, radius, padding, dtype=torch.float64)
        data = torch.view_as_real(slices * ctf).transpose(1, 2) + noise
        sums.add(data * ctf[:, None], ctf**2, poses, pixels.coordinates_K3(torch.float64))
        made.append(sums)
    return made[0], made[1]


def dense(sums: Accumulator, symmetry: str = "C1") -> dict[tuple[int, int, int], np.ndarray]:
    """Gathered sums as a plain dictionary (x, y, z) -> (re, im, weight)."""
    gathered = gather_sums([sums], symmetry)
    values = torch.cat([gathered.data_V2, gathered.weight_V[:, None]], 1).numpy()
    return {tuple(c): v for c, v in zip(gathered.rows.coordinates_V3().tolist(), values)}


def away_from_zero(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def plain_fsc(a: dict, b: dict, radius: int, padding: float) -> np.ndarray:
    """Facts 4.5 voxel by voxel."""
    averages = []
    for half in (a, b):
        total: dict[tuple[int, ...], np.ndarray] = {}
        for place, value in half.items():
            key = tuple(away_from_zero(c / padding) for c in place)
            total[key] = total.get(key, 0) + value
        averages.append({k: complex(v[0], v[1]) / v[2] if v[2] > 0 else 0 for k, v in total.items()})
    cross, first, second = np.zeros((3, BOX // 2 + 1))
    for key in averages[0]:
        r = math.sqrt(sum(c * c for c in key))
        if r <= radius:
            p, q = averages[0][key], averages[1][key]
            shell = away_from_zero(r)
            cross[shell] += (p * q.conjugate()).real
            first[shell] += abs(p) ** 2
            second[shell] += abs(q) ** 2
    curve = cross / np.maximum(np.sqrt(first * second), 1e-300)
    curve[0] = 1
    return curve


def shell_means(sums: dict, radius: int, padding: float) -> np.ndarray:
    total, count = np.zeros((2, radius + 1))
    for place, value in sums.items():
        r = math.sqrt(sum(c * c for c in place))
        if r < away_from_zero(radius * padding):
            total[away_from_zero(r / padding)] += value[2]
            count[away_from_zero(r / padding)] += 1
    return total / count


# Halves


@pytest.mark.parametrize(("radius", "padding"), [(16, 2.0), (11, 2.0), (13, 1.5), (16, 1.0)])
def test_fsc_comes_from_the_sums_on_the_unpadded_grid(radius: int, padding: float) -> None:
    sums = halves(radius, padding)
    expected = plain_fsc(dense(sums[0]), dense(sums[1]), radius, sums[0].padding)
    found = fsc_of_sums(gathered_halves(sums, "C1"))
    assert found.shape == (BOX // 2 + 1,) and found.dtype == torch.float64
    assert np.allclose(found.numpy(), expected, atol=1e-9) and 0.1 < float(found[8]) < 0.99
    assert float(found[0]) == 1 and not found[radius + 1 :].any()


@pytest.mark.parametrize("fudge", [1.0, 4.0])
def test_two_halves_are_solved_with_the_prior_of_their_fsc(fudge: float) -> None:
    radius, padding = 12, 2.0
    plain = [dense(half, "C3") for half in halves(radius)]
    untouched = gathered_halves(halves(radius), "C3")
    solutions, curve = solve_halves(halves(radius), "C3", 0, fudge)
    expected_S = plain_fsc(plain[0], plain[1], radius, padding)
    assert np.allclose(curve.numpy(), expected_S, atol=1e-9)
    f = np.clip(expected_S[: radius + 1], 0.001, 0.999)
    for half, solution, sums in zip(plain, solutions, untouched):
        sigma2 = 1 / (padding**3 * shell_means(half, radius, padding))
        ssnr = fudge * f / (1 - f)
        assert np.allclose(solution.sigma2_S[: radius + 1], sigma2)
        assert np.allclose(solution.ssnr_S[: radius + 1], ssnr) and np.allclose(solution.tau2_S[: radius + 1], ssnr * sigma2)
        for curve_S in (solution.sigma2_S, solution.ssnr_S, solution.tau2_S, solution.coverage_S):
            assert curve_S.shape == (BOX // 2 + 1,) and curve_S.dtype == torch.float64 and not curve_S[radius + 1 :].any()
        inverse = torch.from_numpy(1 / (padding**3 * fudge * ssnr * sigma2))
        assert torch.allclose(solution.map_ZYX, sums.map(inverse), rtol=1e-5, atol=1e-6 * float(solution.map_ZYX.abs().max()))
        seen = [0.0] * (radius + 1), [0] * (radius + 1)
        for place, value in half.items():
            r = math.sqrt(sum(c * c for c in place))
            if r < radius * padding:
                shell = away_from_zero(r / padding)
                seen[0][shell] += float(value[2] >= inverse[shell])
                seen[1][shell] += 1
        assert np.allclose(solution.coverage_S[: radius + 1], np.array(seen[0]) / np.array(seen[1]), atol=1e-3)
        assert any(0.05 < share < 0.95 for share in solution.coverage_S[: radius + 1].tolist())
        assert solution.map_ZYX.dtype == torch.float32 and solution.map_ZYX.shape == (BOX,) * 3


def test_joining_averages_what_lies_within_the_shell_and_nothing_else() -> None:
    before, after = gathered_halves(halves(), "C1"), gathered_halves(halves(), "C1")
    join_low_shells(after, 4)
    r2 = before[0].rows.coordinates_V3().double().square().sum(1)
    near = r2 <= 64  # (4 x padding)^2
    for name in ("data_V2", "weight_V"):
        (a, b), (c, d) = (getattr(h, name) for h in before), (getattr(h, name) for h in after)
        assert torch.equal(c[near], d[near]) and torch.allclose(c[near], (a[near] + b[near]) / 2)
        assert torch.equal(a[~near], c[~near]) and torch.equal(b[~near], d[~near])
        assert not torch.equal(a[near], b[near])
    curve = solve_halves(halves(), "C1", 4)[1]
    apart = solve_halves(halves(), "C1", 0)[1]
    assert torch.allclose(curve[:4], torch.ones(4).double()) and float(apart[3]) < 0.999
    assert float(apart[4]) < float(curve[4]) < 1 and torch.allclose(curve[6:], apart[6:])  # half of shell 4 lies beyond


def test_joining_at_shell_0_leaves_the_halves_apart() -> None:
    before, after = gathered_halves(halves(), "C1"), gathered_halves(halves(), "C1")
    join_low_shells(after, 0)
    assert all(torch.equal(a.data_V2, b.data_V2) for a, b in zip(before, after))


def test_the_curve_can_be_given_or_measured_on_maps() -> None:
    given = torch.linspace(1, 0, BOX // 2 + 1).double()
    solutions, curve = solve_halves(halves(), "C1", 0, fsc_S=given)
    assert torch.equal(curve, given)
    assert float(solutions[0].ssnr_S[8]) == pytest.approx(1.0)  # FSC 0.5
    seen: list[torch.Tensor] = []

    def judge(maps: list[torch.Tensor]) -> torch.Tensor:
        seen.extend(maps)
        return given

    again, _ = solve_halves(halves(), "C1", 3, fsc_S=judge)
    assert len(seen) == 2 and float(fsc(*seen)[1]) > 0.999  # joined already
    assert torch.allclose(again[0].map_ZYX[10], solutions[0].map_ZYX[10], atol=0.3 * float(solutions[0].map_ZYX.std()))


def test_the_last_iteration_takes_all_particles_and_keeps_plain_half_maps() -> None:
    untouched = gathered_halves(halves(), "C2")
    whole, half_maps, curve = solve_joined(halves(), "C2")
    assert torch.allclose(curve, fsc_of_sums(untouched))
    for half, found in zip(untouched, half_maps):
        assert torch.equal(found, half.map())
    f = curve.clamp_min(0.001)
    c_ref = (2 * f / (1 + f)).sqrt().clamp_max(0.999)
    assert torch.allclose(whole.ssnr_S, c_ref / (1 - c_ref))
    both = gather_sums(list(halves()), "C2")
    assert torch.allclose(whole.sigma2_S, 1 / (8 * both.shell_weight()))
    assert torch.allclose(whole.map_ZYX, both.map(1 / (8 * whole.tau2_S)), rtol=1e-4, atol=1e-5 * float(MAP.max()))
    truth = fsc(whole.map_ZYX.double(), MAP)
    assert float((truth - fsc(half_maps[0].double(), MAP))[2:10].min()) > 0
    joined = solve_joined(halves(), "C2", join_shell=5)
    assert float(joined[2][4]) == pytest.approx(1.0) and torch.equal(joined[1][0], half_maps[0])


@pytest.mark.parametrize("fudge", [1.0, 2.0])
def test_one_set_takes_its_prior_from_the_reference(fudge: float) -> None:
    sums, untouched = halves(12)[0], gather_sums([halves(12)[0]])
    tau2 = ref.reference_spectrum(MAP, 2.0, 12)
    found = solve_single(sums, "C1", tau2, fudge)
    mean = untouched.shell_weight()
    assert torch.allclose(found.sigma2_S[:13], 1 / (8 * mean)) and torch.allclose(found.tau2_S, tau2)
    assert torch.allclose(found.ssnr_S[:13], 8 * fudge * mean * tau2[:13])
    expected = untouched.map(1 / (8 * fudge * tau2[:13]))
    assert torch.allclose(found.map_ZYX, expected, atol=1e-6 * float(expected.abs().max()))


def test_shells_that_the_reference_lacks_come_out_empty() -> None:
    tau2 = ref.reference_spectrum(MAP, 2.0, 8)
    assert float(tau2[8]) > 0 and not tau2[9:].any()
    found = solve_single(halves()[0], "C1", tau2)
    assert bool(found.map_ZYX.isfinite().all()) and not found.ssnr_S[9:].any() and not found.coverage_S[9:].any()
    only = gather_sums([halves()[0]])
    shell_V = (only.rows.coordinates_V3().double().square().sum(1).sqrt() / 2 + 0.5).floor()
    only.data_V2[shell_V > 8] = 0
    expected = only.map(1 / (8 * tau2.clamp_min(1e-30)))
    assert torch.allclose(found.map_ZYX, expected, atol=1e-6 * float(expected.abs().max()))


def test_sums_in_single_precision_give_the_same_solution() -> None:
    double = solve_halves(halves(), "D2", 3)
    singles = halves()
    for half in singles:
        half.running_V4 = half.running_V4.float()
    single = solve_halves(singles, "D2", 3)
    assert torch.allclose(single[1], double[1], atol=1e-5)
    scale = float(double[0][0].map_ZYX.abs().max())
    assert torch.allclose(single[0][0].map_ZYX, double[0][0].map_ZYX, atol=1e-4 * scale)


def test_half_sets_with_nothing_in_them_give_empty_maps() -> None:
    solutions, curve = solve_halves((Accumulator(BOX), Accumulator(BOX)), "C1", 2)
    assert float(curve[1:].abs().max()) == 0
    assert not solutions[0].map_ZYX.any() and not solutions[0].sigma2_S.any() and not solutions[0].tau2_S.any()


# Solvent


def noisy_maps(level: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [MAP + level * torch.randn(BOX, BOX, BOX, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_corrected_fsc_follows_its_formula() -> None:
    maps, mask = noisy_maps(float(MAP.std())), ref.flatten(torch.ones(BOX, BOX, BOX), 9.0, 3.0)
    found = corrected_fsc(maps, mask, 24)
    below = (fsc(*maps)[1:] < 0.8).nonzero()
    assert found.first_shell == int(below[0]) + 1 and found.notice is None
    assert found.masked_S is not None and found.random_S is not None
    masked = fsc(maps[0] * mask, maps[1] * mask)
    start = found.first_shell + 2
    assert torch.allclose(found.fsc_S[1:start], masked[1:start])
    expected = ((masked - found.random_S) / (1 - found.random_S)).clamp_min(0)
    assert torch.allclose(found.fsc_S[start:13], expected[start:13]) and not found.fsc_S[13:].any()
    assert float(found.fsc_S[1:13].mean()) > float(found.unmasked_S[1:13].mean())
    assert torch.equal(corrected_fsc(maps, mask, 24).fsc_S, found.fsc_S)


def test_a_tight_mask_lends_noise_no_resolution() -> None:
    """Two maps that share nothing: a narrow mask makes them correlate, the correction takes that away."""
    generator = torch.Generator().manual_seed(5)
    shared = ref.low_pass(torch.randn(BOX, BOX, BOX, generator=generator, dtype=torch.float64), FIELD / 6, PIXEL)
    maps = [shared + 0.01 * torch.randn(BOX, BOX, BOX, generator=generator, dtype=torch.float64) for _ in range(2)]
    mask = torch.zeros(BOX, BOX, BOX)
    mask[14:18, 14:18, 14:18] = 1
    found = corrected_fsc(maps, mask, BOX)
    assert found.first_shell is not None and found.masked_S is not None
    beyond = slice(found.first_shell + 2, 15)
    assert float(found.masked_S[beyond].mean()) > 0.3 and float(found.fsc_S[beyond].mean()) < 0.25


def test_no_correction_where_the_unmasked_curve_stays_high() -> None:
    maps = [torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(8), dtype=torch.float64)]
    maps.append(1.5 * maps[0] + 0.1)
    found = corrected_fsc(maps, torch.ones(BOX, BOX, BOX), 20)
    assert found.notice is not None and "never falls below 0.8" in found.notice and found.first_shell is None
    assert torch.allclose(found.fsc_S[:11], torch.ones(11).double(), atol=1e-6) and not found.fsc_S[11:].any()


def test_random_phases_keep_amplitudes_and_low_shells() -> None:
    shells = shells_of_half_volume(BOX)
    before = centred_rfft3(MAP)
    changed = random_phases(before, shells, 6, 1)
    after = centred_rfft3(changed)
    assert torch.allclose(after.abs(), before.abs(), atol=1e-9 * float(before.abs().max()))
    assert torch.allclose(after[shells < 6], before[shells < 6], atol=1e-12)
    assert abs(float(fsc(changed, MAP)[8:].mean())) < 0.1 and not torch.equal(changed, random_phases(before, shells, 6, 2))


# References


def as_map(values: torch.Tensor, pixel: float = PIXEL) -> Map:
    return Map(values.float().numpy(), pixel)


def test_low_pass_is_a_raised_cosine_about_the_unrounded_shell() -> None:
    noise = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gain = centred_rfft3(ref.low_pass(noise, 17.0, PIXEL)) / centred_rfft3(noise)
    axis = torch.fft.fftfreq(BOX, 1 / BOX).double()
    r = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[: BOX // 2 + 1].abs() ** 2).sqrt()
    middle = FIELD / 17.0  # 5.65 shells
    expected = torch.where(r < middle - 1, 1.0, 0.5 - 0.5 * torch.cos(math.pi * (middle + 1 - r) / 2))
    expected = torch.where(r > middle + 1, 0.0, expected)
    assert torch.allclose(gain.real, expected, atol=1e-6) and float(gain.imag.abs().max()) < 1e-6


@pytest.mark.parametrize(("box", "pixel"), [(48, PIXEL), (40, 2.5), (64, 2.0), (40, 3.217), (24, 4.3)])
def test_a_reference_of_another_grid_becomes_the_same_density(box: int, pixel: float) -> None:
    """Blobs in closed form, sampled on the other grid, against the same blobs on the particles' grid."""
    found, notices = ref.initial_reference(as_map(BLOBS.map(box, pixel), pixel), BOX, PIXEL, 14.0)
    expected = ref.low_pass(MAP, 14.0, PIXEL)
    assert found.dtype == torch.float32 and found.shape == (BOX,) * 3
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert any("resampled" in notice for notice in notices) == (pixel != PIXEL)
    assert any("cropped around its centre" in notice for notice in notices)


def test_a_reference_of_a_smaller_box_is_padded() -> None:
    found, notices = ref.initial_reference(as_map(MAP[4:28, 4:28, 4:28]), BOX, PIXEL, 3 * PIXEL)
    assert len(notices) == 1 and "24 px (72 Å); it was padded with 0 to the particles' 32 px (96 Å)" in notices[0]
    inner = slice(8, 24)
    expected = ref.low_pass(ref.window(MAP[4:28, 4:28, 4:28], BOX), 3 * PIXEL, PIXEL)
    assert torch.allclose(found[inner, inner, inner].double(), expected[inner, inner, inner], atol=1e-5 * float(MAP.max()))


def test_a_reference_that_fits_is_only_filtered() -> None:
    found, notices = ref.initial_reference(as_map(MAP), BOX, PIXEL * (1 + 1e-5), 20.0)
    assert notices == [] and torch.allclose(found, ref.low_pass(MAP, 20.0, PIXEL).float(), atol=1e-4 * float(MAP.max()))


def test_cropping_away_much_of_a_reference_is_told() -> None:
    away = torch.zeros(64, 64, 64)
    away[10:20, 28:36, 28:36] = 1
    away[30:34, 30:34, 30:34] = 1
    _, notices = ref.initial_reference(as_map(away), BOX, PIXEL, 20.0)
    assert "55 % of its power lay outside" in notices[0]


def test_resampling_by_a_ratio_of_boxes_is_cropping_the_transform() -> None:
    noise = torch.randn(36, 36, 36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    smooth = ref.low_pass(noise, 4.0, 1.0)  # shell 9 of 36
    found = ref.resample(smooth, 1.0, 24, 1.5)
    fourier, crop = centred_rfft3(smooth), centred_rfft3(found)
    assert torch.allclose(crop[:12, :12, :12], fourier[:12, :12, :12], atol=1e-12)
    back = ref.resample(found, 1.5, 36, 1.0)
    inside = slice(3, 33)  # the last voxels of the finer grid lie beyond the coarser one's
    assert torch.allclose(back[inside, inside, inside], smooth[inside, inside, inside], atol=1e-9)


@pytest.mark.parametrize(
    ("volume", "pixel", "resolution", "words"),
    [
        (torch.full((8, 8, 8), torch.nan), 3.0, 20.0, "512 voxels are not finite"),
        (torch.ones(8, 8, 8), 3.0, 20.0, "every voxel holds 1"),
        (MAP, 0.0, 20.0, "verglas map --pixel"),
        (MAP[:, :, :16], 3.0, 20.0, "16 x 32 x 32 voxels"),
        (MAP, 3.0, 200.0, "initial resolution of 200 Å"),
        (torch.nn.functional.pad(torch.ones(2, 2, 2), [0, 94] * 3), 3.0, 20.0, "nothing of it lies within"),
    ],
)
def test_references_that_cannot_be_meant_are_refused(volume: torch.Tensor, pixel: float, resolution: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ref.initial_reference(as_map(volume, pixel), BOX, 3.0, resolution)


def test_flattening_multiplies_by_a_sphere_or_a_mask() -> None:
    ones = torch.ones(BOX, BOX, BOX)
    found = ref.flatten(ones, 8.0, 4.0)
    line = found[BOX // 2, BOX // 2]
    assert torch.equal(line[16:25], torch.ones(9)) and float(line[26]) == pytest.approx(0.5) and not line[28:].any()
    mask = torch.rand(BOX, BOX, BOX)
    assert torch.equal(ref.flatten(2 * ones, 3.0, 1.0, mask), 2 * mask)


@pytest.mark.parametrize(("padding", "radius"), [(2.0, 16), (1.5, 9)])
def test_the_spectrum_of_a_reference_is_that_of_its_padded_transform(padding: float, radius: int) -> None:
    found = ref.reference_spectrum(MAP, padding, radius)
    volume = FourierVolume.from_map(MAP, radius, padding, dtype=torch.float64)
    total, count = np.zeros((2, BOX // 2 + 1))
    for (x, y, z), value in zip(volume.rows.coordinates_V3().tolist(), volume.values.numpy()):
        r = math.sqrt(x * x + y * y + z * z)
        if r <= away_from_zero(padding * radius):
            total[away_from_zero(r / volume.padding)] += (value**2).sum() / 2
            count[away_from_zero(r / volume.padding)] += 1
    assert np.allclose(found[: radius + 1], total[: radius + 1] / count[: radius + 1], rtol=1e-4)
    assert found.shape == (BOX // 2 + 1,) and not found[radius + 1 :].any()


def test_the_spectrum_has_the_units_of_projections() -> None:
    """A single voxel of 3 projects to a single pixel of 3, whose transform is 3 / N^2 everywhere."""
    point = torch.zeros(BOX, BOX, BOX)
    point[BOX // 2, BOX // 2, BOX // 2] = 3
    found = ref.reference_spectrum(point, 2.0, BOX // 2)
    assert torch.allclose(found, torch.full((BOX // 2 + 1,), 9 / BOX**4 / 2).double(), rtol=1e-5)


def test_initial_ssnr() -> None:
    noise = torch.stack([torch.full((BOX // 2 + 1,), 2e-3), torch.full((BOX // 2 + 1,), 4e-3), torch.zeros(BOX // 2 + 1)])
    tau2, ssnr = ref.initial_ssnr(MAP, noise, 500, tau2_fudge=2.0)
    shells = shells_of_half_volume(BOX)
    power = centred_rfft3(MAP).abs().square()[shells == 7].mean()
    assert float(tau2[7]) == pytest.approx(float(2.0 * BOX**2 * power / 2), rel=1e-6)
    assert float(ssnr[7]) == pytest.approx(500 / 3e-3 / 14 * float(tau2[7]), rel=1e-6)
    assert float(ssnr[0]) == pytest.approx(500 / 3e-3 * float(tau2[0]), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "pixel", "words"),
    [
        (torch.ones(16, 16, 16), PIXEL, "16 x 16 x 16 voxels; expected 32 x 32 x 32"),
        (torch.ones(BOX, BOX, BOX), 2.0, "voxels of 2 Å"),
        (MAP * 0 + 2, PIXEL, "values from 2 to 2"),
        (MAP * 0 - 1, PIXEL, "values from -1"),
        (MAP * 0 + torch.nan, PIXEL, "values from nan"),
        (MAP * 0, PIXEL, "empty"),
    ],
)
def test_masks_that_cannot_serve_are_refused(values: torch.Tensor, pixel: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ref.check_mask(as_map(values, pixel), BOX, PIXEL)


def test_a_mask_is_taken_as_it_is() -> None:
    mask = ref.flatten(torch.ones(BOX, BOX, BOX), 8.0, 3.0)
    assert torch.equal(ref.check_mask(as_map(mask), BOX, PIXEL), mask)
    assert float(ref.check_mask(as_map(mask * 1.0005), BOX, PIXEL).max()) == 1


@pytest.mark.parametrize("symmetry", ["C3", "D2", "T", "O", "I1"])
def test_a_map_with_the_symmetry_correlates_with_its_copies(symmetry: str) -> None:
    operators = symmetry_matrices(symmetry)
    centres = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 10
    axis = (torch.arange(BOX) - BOX // 2).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    grid = torch.stack([x, y, z], -1)
    whole = torch.zeros(BOX, BOX, BOX).double()
    for centre in (centres @ operators.transpose(1, 2)).reshape(-1, 3) * (9 / centres.norm(dim=1).max()):
        whole += torch.exp(-(grid - centre).square().sum(-1) / 8)
    assert ref.symmetry_correlation(whole, symmetry) > 0.97
    assert ref.symmetry_correlation(MAP, symmetry) < 0.7
    assert ref.symmetry_correlation(MAP, "C1") == 1.0
