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
from verglas.core.rows import RowTable, packed_sphere
from verglas.core.shells import fsc
from verglas.core.symmetry import symmetry_matrices
from verglas.kernels import voxels
from verglas.kernels.project import project
from verglas.maximization import reference as ref
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import (
    CELLS_AT_ONCE,
    Solution,
    fsc_of_sums,
    gathered_halves,
    join_low_shells,
    solve_halves,
    solve_joined,
    solve_single,
)
from verglas.maximization.point_group import apply_point_group, cosets, subgroup_chain
from verglas.maximization.solve import add_friedel_partners, gather_sums
from verglas.maximization.solvent import corrected_fsc, random_phases

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


@pytest.mark.parametrize("compiled", [True, False])
def test_fsc_plane_by_plane_is_that_of_all_planes_at_once(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = gathered_halves(halves(13, 1.5), "C1")
    expected = fsc_of_sums(gathered)
    monkeypatch.setattr(voxels, "compiled", lambda values: compiled)
    monkeypatch.setitem(CELLS_AT_ONCE, "cpu", 1)
    torch.testing.assert_close(fsc_of_sums(gathered), expected, rtol=0, atol=1e-12)


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


# Point groups, and plain torch against the compiled passes


def random_sums(radius: float = 9.0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, RowTable]:
    """Random sums whose Friedel partners agree, as `gather_sums` makes them."""
    rows = packed_sphere(radius)
    sums = torch.randn(rows.count, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    sums[:, 2].abs_()
    add_friedel_partners(sums, rows)
    return sums, rows


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("symmetry", ["C1", "C2", "C3", "C4", "C7", "D2", "D3", "D4", "D7", "T", "O", "I1", "I2", "I3"])
def test_point_groups_are_sums_over_every_operator(symmetry: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(voxels, "compiled", lambda values: False)
    sums, rows = random_sums()
    expected = sums.clone()
    weight = torch.stack([sums[:, 2], 0 * sums[:, 2]], 1)
    for operator in symmetry_matrices(symmetry)[1:]:
        position = rows.coordinates_V3().double()
        expected[:, :2] += project(sums[:, :2].contiguous(), rows, operator[None], position, "reference")[0].T
        expected[:, 2] += project(weight, rows, operator[None], position, "reference")[0, 0]
    before = sums.clone()
    found = apply_point_group(sums, rows, symmetry)
    # At the radius itself rounding decides whether a turned voxel is still sampled; maps leave that out.
    inside = rows.coordinates_V3().square().sum(1) < rows.radius**2
    assert torch.allclose(found[inside], expected[inside], atol=1e-9)
    assert torch.equal(sums, before)


@pytest.mark.parametrize(
    ("symmetry", "interpolated", "gathered"), [("O", 0, 5), ("D2", 0, 2), ("I1", 4, 4), ("C7", 6, 0), ("T", 11, 0)]
)
def test_no_more_is_interpolated_than_the_group_asks_for(symmetry: str, interpolated: int, gathered: int) -> None:
    representatives, on_grid = cosets(symmetry_matrices(symmetry))
    assert len(representatives) - 1 == interpolated and sum(len(step) for step in subgroup_chain(on_grid)) == gathered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("radius", "padding"), [(16, 2.0), (11, 1.5)])
def test_plain_torch_and_compiled_passes_agree(
    dtype: torch.dtype, radius: int, padding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solved() -> tuple[list[Solution], torch.Tensor]:
        sums = halves(radius, padding, views=30)
        for half in sums:
            half.running_V4 = half.running_V4.to(dtype)
        return solve_halves(sums, "D2", 3)

    compiled, curve = solved()
    monkeypatch.setattr(voxels, "compiled", lambda values: False)
    plain, plain_curve = solved()
    assert torch.allclose(curve, plain_curve, atol=1e-6)
    for a, b in zip(compiled, plain):
        assert torch.allclose(a.map_ZYX, b.map_ZYX, atol=1e-5 * float(b.map_ZYX.abs().max()))
        for name in ("tau2_S", "sigma2_S", "ssnr_S"):
            assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-4)
        assert torch.allclose(a.coverage_S, b.coverage_S, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetry", ["C1", "D3", "O"])
def test_a_gpu_solves_as_the_cpu_does(symmetry: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    results = []
    for device in ("cpu", "cuda"):
        sums = halves()
        moved = []
        for half in sums:
            there = Accumulator(BOX, half.radius, half.padding, device)
            there.running_V4 += half.running_V4.to(device, torch.float32)
            moved.append(there)
        results.append(solve_halves((moved[0], moved[1]), symmetry, 3))
    (ours, curve), (theirs, other_curve) = results
    assert torch.allclose(curve, other_curve.cpu(), atol=1e-4)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a.map_ZYX, b.map_ZYX.cpu(), atol=1e-3 * float(a.map_ZYX.abs().max()))
