"""maximization: the sums and what is solved from them, against closed forms and values by hand.

Letters at the end of a name are its axes: R slices, K Fourier coefficients, V packed voxels, S shells, Z Y X volume.
"""

from __future__ import annotations

import csv
import math

import pytest
import torch

from blobs import Blobs
from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere
from verglas.core.shells import fsc
from verglas.core.symmetry import symmetry_matrices
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.reconstruction import Reconstruction, frequency_S, solve
from verglas.maximization.solve import SolvedSums, add_friedel_partners, gather_sums, wiener_term
from verglas.optics.ctf import CtfParameters, ctf_BK
from verglas.optics.group import OpticsGroup
from verglas.projection.volume import gridding_correction, pack
from verglas.testing.dense import padded_transform

BOX, PIXEL = 32, 3.0
FIELD = BOX * PIXEL
PIXELS = half_plane_pixels(BOX)
BLOBS = Blobs.random(25, spread=28.0, sigma=3.0)
MAP = BLOBS.map(BOX, PIXEL)
GROUP = OpticsGroup("one", 1, 300.0, 2.7, 0.1, PIXEL, BOX)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def ctfs(n: int, seed: int = 5) -> torch.Tensor:
    """CTFs [n, K] of random astigmatic defoci."""
    defocus = 8000 + 14000 * torch.rand(n, generator=generator(seed), dtype=torch.float64)
    angle, zero = 180 * torch.rand(n, generator=generator(seed + 1), dtype=torch.float64), torch.zeros(n).double()
    parameters = CtfParameters(defocus + 300, defocus - 300, angle, zero, zero, zero + 1)
    return ctf_BK(PIXELS.frequency_K2(PIXEL, torch.float64), parameters, GROUP)


def add_views(sums: Accumulator, poses: torch.Tensor, ctf: torch.Tensor | float = 1.0, blobs: Blobs = BLOBS) -> Accumulator:
    """Add exact projections of `blobs`, seen through `ctf` and weighted by it."""
    slices = blobs.slices(poses, PIXELS.frequency_K2(PIXEL, torch.float64), FIELD, PIXEL)
    data = torch.view_as_real(slices * ctf * ctf).transpose(1, 2).contiguous()
    weight = torch.as_tensor(ctf * ctf).double().expand(slices.shape).contiguous()
    dtype = sums.running_V4.dtype
    sums.add(data.to(dtype), weight.to(dtype), poses, PIXELS.coordinates_K3(dtype))
    return sums


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


# Sums


def random_slices(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.rand(n, PIXELS.count, generator=generator(2))
    return noise(n, 2, PIXELS.count).float(), weight, random_rotations(n, generator(1))


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_flushing_changes_no_total(every: int) -> None:
    data, weight, poses = random_slices(10)
    exact = Accumulator(BOX, dtype=torch.float64)
    exact.add(data.double(), weight.double(), poses, PIXELS.coordinates_K3(torch.float64))
    assert exact.settled_V3 is None and exact.total().dtype == torch.float64
    sums = Accumulator(BOX)
    sums.flush_every = every
    for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
        sums.add(data[part], weight[part], poses[part], PIXELS.coordinates_K3())
    assert (sums.settled_V3 is not None) == (every < 10) and sums.slices == 10
    assert relative(sums.total()[:, :3], exact.total()[:, :3]) < 5e-6  # float32 rounds positions to 2e-6 of a voxel
    assert relative(sums.total()[:, :3], exact.total()[:, :3]) < 5e-6  # asking twice adds nothing


def test_single_precision_stalls_where_flushing_does_not() -> None:
    """2^24 + 1 is no float32: adding ones one at a time to a voxel that holds 2^24 changes nothing."""
    pose, zero = torch.eye(3)[None], torch.zeros(1, 3)
    totals = {}
    for every in (1, 1000):
        sums = Accumulator(8)
        sums.flush_every = every
        for value in (2.0**24, *[1.0] * 20):
            sums.add(torch.full((1, 2, 1), value), torch.full((1, 1), value), pose, zero)
        totals[every] = float(sums.total()[:, 2].double().sum())
    assert totals == {1: 2.0**24 + 20, 1000: 2.0**24}


@pytest.mark.parametrize("every", [1, 6, 1000])
def test_sums_are_rounded_once_in_the_memory_that_they_have(every: int) -> None:
    data, weight, poses = random_slices(9)
    sums = Accumulator(BOX)
    sums.flush_every = every
    sums.add(data, weight, poses, PIXELS.coordinates_K3())
    exact, place = sums.total()[:, :3].clone(), sums.running_V4.data_ptr()
    found = sums.rounded()
    assert torch.equal(found[:, :3], exact.float()) and found.data_ptr() == place and sums.settled_V3 is None


def test_flushes_come_before_a_voxel_has_had_a_hundred_thousand_additions() -> None:
    assert Accumulator(16, padding=2.0).flush_every == 25000  # at most 2 x 2 samples of a slice share a voxel
    assert Accumulator(16, padding=1.0).flush_every == 11111


@pytest.mark.parametrize("every", [1, 6, 1000])
def test_merging_is_adding(every: int) -> None:
    data, weight, poses = random_slices(9)
    whole, one, two = (Accumulator(BOX) for _ in range(3))
    whole.add(data, weight, poses, PIXELS.coordinates_K3())
    one.flush_every = two.flush_every = every
    one.add(data[:4], weight[:4], poses[:4], PIXELS.coordinates_K3())
    two.add(data[4:], weight[4:], poses[4:], PIXELS.coordinates_K3())
    before = two.total()[:, :3].clone()
    one.merge(two)
    assert one.slices == 9 and relative(one.total()[:, :3], whole.total()[:, :3]) < 1e-6
    assert torch.equal(two.total()[:, :3], before)
    assert (one.settled_V3 is not None) == (every < 9)
    separate = gather_sums([Accumulator(BOX), one])
    assert relative(separate.weight_V, gather_sums([whole]).weight_V.double()) < 1e-6


def test_only_like_sums_are_merged() -> None:
    for other in (Accumulator(16), Accumulator(32, radius=8), Accumulator(32, padding=1.5)):
        with pytest.raises(ValueError, match="cannot be added"):
            Accumulator(32).merge(other)


# From sums to a map


def test_friedel_partners_by_brute_force() -> None:
    rows = packed_sphere(4)
    values = noise(rows.count, 3)
    where = {tuple(c): i for i, c in enumerate(rows.coordinates_V3().tolist())}
    expected = values.clone()
    for (x, y, z), i in where.items():
        if x == 0 and (y, z) == (0, 0):  # its own partner counts once; it is real
            expected[i, 1] = 0
        elif x == 0:
            expected[i] += values[where[0, -y, -z]] * torch.tensor([1, -1, 1])
    found = values.clone()
    add_friedel_partners(found, rows)
    assert torch.allclose(found, expected, atol=1e-15)


def test_a_map_from_2000_views_through_their_ctfs_is_itself() -> None:
    sums = add_views(Accumulator(BOX), random_rotations(2000, generator(3)), ctfs(2000))
    found = gather_sums([sums]).map()
    assert found.dtype == torch.float32 and found.shape == MAP.shape
    curve = fsc(found.double(), MAP)
    assert float(curve[1:13].min()) > 0.998  # 0.8 of Nyquist is shell 12.8
    assert float((found * MAP).sum() / MAP.square().sum()) == pytest.approx(1, abs=0.02)  # grey values, too
    assert relative(found, MAP) < 0.06


def test_half_of_the_views_fill_the_other_half_of_fourier_space() -> None:
    """A single view, whose x = 0 line holds no partners, gives the projection smeared along z: real and unmirrored."""
    sums = add_views(Accumulator(BOX, dtype=torch.float64), torch.eye(3)[None])
    found = gather_sums([sums]).map().double()
    image, expected = found.sum(0), MAP.sum(0)
    correlation = (image * expected).sum() / (image.norm() * expected.norm())
    mirrored = (image * expected.flip(0).roll(1, 0)).sum() / (image.norm() * expected.norm())
    assert float(correlation) > 0.99 > float(mirrored) + 0.05


@pytest.mark.parametrize("symmetry, error", [("C4", 1e-5), ("D2", 1e-5), ("C3", 0.05), ("T", 0.06)])
def test_symmetrised_sums_are_those_of_all_equivalent_views(symmetry: str, error: float) -> None:
    """Poses A R for every R of the group; the same to rounding where R takes the grid onto itself."""
    poses, group = random_rotations(300, generator(4)), symmetry_matrices(symmetry)
    lopsided = Blobs.random(9, spread=24.0, sigma=4.5, seed=8)  # no symmetry of its own
    slices = lopsided.slices(poses, PIXELS.frequency_K2(PIXEL, torch.float64), FIELD, PIXEL)
    data = torch.view_as_real(slices).transpose(1, 2).contiguous()
    views, every = Accumulator(BOX, dtype=torch.float64), Accumulator(BOX, dtype=torch.float64)
    for operator in group:
        every.add(data, torch.ones_like(data[:, 0]), poses @ operator, PIXELS.coordinates_K3(torch.float64))
    views.add(data, torch.ones_like(data[:, 0]), poses, PIXELS.coordinates_K3(torch.float64))
    found, expected = gather_sums([views], symmetry).map(), gather_sums([every]).map().double()
    assert relative(found, expected) < error
    assert relative(gather_sums([views]).map(), expected) > 0.3
    average = torch.stack([turned(lopsided, operator).map(BOX, PIXEL) for operator in group]).mean(0)
    assert relative(found, average) < 0.12
    assert float((found * average).sum() / average.square().sum()) == pytest.approx(1, abs=0.02)


def turned(blobs: Blobs, operator: torch.Tensor) -> Blobs:
    """`blobs` turned by the operator's inverse; an average over a group holds both."""
    return Blobs(blobs.centre_P3 @ operator, blobs.height_P, blobs.sigma)


def sums_of(map_ZYX: torch.Tensor, weight_V: torch.Tensor | None = None, gain_V: torch.Tensor | None = None) -> SolvedSums:
    """Sums whose quotient is the transform that `map` turns into `map_ZYX`; data times `gain_V` if given."""
    rows = packed_sphere(BOX)
    squared = gridding_correction(BOX, 2.0).double() ** 2  # one is divided away on the way in, one on the way out
    transform_V2 = pack(padded_transform(map_ZYX * squared, 2 * BOX), rows)
    weight_V = torch.full((rows.count,), 2.0).double() if weight_V is None else weight_V
    gain_V = weight_V if gain_V is None else gain_V
    return SolvedSums(transform_V2 * gain_V[:, None], weight_V, rows, BOX, BOX // 2, 2.0)


def radius_V(sums: SolvedSums) -> torch.Tensor:
    """Radius of every packed voxel in image frequencies."""
    return sums.rows.coordinates_V3().double().norm(dim=1) / 2


def test_the_quotient_of_the_sums_is_the_map() -> None:
    smooth = Blobs.random(25, spread=24.0, sigma=4.5).map(BOX, PIXEL)
    assert relative(sums_of(smooth).map(), smooth) < 2e-3
    uneven = 0.5 + torch.rand(packed_sphere(BOX).count, generator=generator(1), dtype=torch.float64)
    assert relative(sums_of(smooth, uneven).map(), sums_of(smooth).map().double()) < 1e-6


def test_hardly_seen_voxels_are_divided_by_a_thousandth_of_their_shells_mean() -> None:
    rows = packed_sphere(BOX)
    seen = torch.rand(rows.count, generator=generator(7)) > 0.2
    weight_V = torch.where(seen, 2.0, 1e-7).double()
    sums = sums_of(MAP, weight_V, torch.where(seen, 2.0, 1e-3).double())  # unfloored, these would be 10^4 too large
    inside = radius_V(sums) < BOX / 2
    shell_V = radius_V(sums).floor().long().clamp(max=BOX // 2 - 1)
    count_S = torch.bincount(shell_V[inside], minlength=BOX // 2)
    mean_S = torch.bincount(shell_V[inside], weight_V[inside], BOX // 2) / count_S
    factor_V = torch.where(seen, 1.0, 1e-3 / (1e-3 * mean_S[shell_V]))
    assert float(factor_V[inside & ~seen].mean()) == pytest.approx(0.625, rel=0.01)
    expected = sums_of(MAP, None, 2.0 * factor_V).map().double()
    assert relative(sums.map(), expected) < 1e-4


def test_the_wiener_term_by_hand() -> None:
    """1 / tau^2 = weight / SSNR; SSNR = F / (1 - F) of a half, 2 F / (1 - F) of both; F within 0.001..0.999."""
    fsc_S = torch.tensor([1.0, 0.5, 0.2, -0.3, 0.75])
    weight_S = torch.tensor([10.0, 6, 8, 4, 3], dtype=torch.float64)
    expected = [10 * 0.001 / 0.999, 6.0, 32.0, 4 * 999, 1.0]
    assert wiener_term(fsc_S, weight_S, joined=False).tolist() == pytest.approx(expected, rel=1e-4)
    assert wiener_term(fsc_S, weight_S, joined=True).tolist() == pytest.approx([e / 2 for e in expected], rel=1e-4)
    assert len(wiener_term(fsc_S, weight_S[:3], joined=True)) == 3


def test_the_prior_damps_from_shell_five_on() -> None:
    """Even weights of 2 and a prior of 6: every shell from 5 on shrinks to 2 / (2 + 6)."""
    sums, prior = sums_of(noise(BOX, BOX, BOX)), torch.full((BOX // 2 + 1,), 6.0).double()
    wanted = torch.where((radius_V(sums) + 0.5).floor() >= 5, 0.25, 1.0)
    expected = sums_of(noise(BOX, BOX, BOX), None, 2.0 * wanted.double()).map().double()
    assert relative(sums.map(prior), expected) < 1e-5
    assert relative(sums.map(prior, keep_scale=True), sums.map().double()) < 1e-5
    assert relative(sums.map(0 * prior), sums.map().double()) < 1e-6


def test_keep_scale_keeps_the_mean_amplitude_of_each_shell() -> None:
    """Voxels seen well and badly (4 and 0.5) with a prior of 2 count 2/3 and 1/5; 0.433 on average is divided away."""
    rows = packed_sphere(BOX)
    well = torch.rand(rows.count, generator=generator(6)) > 0.5
    sums = sums_of(noise(BOX, BOX, BOX), torch.where(well, 4.0, 0.5).double())
    prior = torch.full((BOX // 2 + 1,), 2.0).double()
    filter_V = torch.where(well, 2 / 3, 1 / 5).double()
    shell_V = (radius_V(sums) + 0.5).floor().long()
    inside = radius_V(sums) < BOX / 2
    mean_S = torch.bincount(shell_V[inside], filter_V[inside]) / torch.bincount(shell_V[inside])
    assert torch.allclose(mean_S[5:], torch.tensor(13 / 30).double(), atol=0.03)
    gain_V = torch.where(shell_V >= 5, filter_V / mean_S[shell_V.clamp(max=BOX // 2)], 1.0)
    expected = sums_of(noise(BOX, BOX, BOX), None, 2.0 * gain_V).map().double()
    assert relative(sums.map(prior, keep_scale=True), expected) < 1e-5
    assert relative(sums.map(prior), expected) > 0.3


def test_shell_weights_and_coverage() -> None:
    rows = packed_sphere(BOX)
    well = torch.rand(rows.count, generator=generator(6)) > 0.25
    sums = sums_of(MAP, torch.where(well, 4.0, 1.0).double())
    shell_V, inside = (radius_V(sums) + 0.5).floor().long(), radius_V(sums) < BOX / 2
    share_S = torch.bincount(shell_V[inside], well[inside].double()) / torch.bincount(shell_V[inside])
    assert torch.allclose(sums.shell_weight(), 1 + 3 * share_S)
    ones = torch.ones(BOX // 2 + 1).double()
    assert torch.allclose(sums.coverage(2 * ones), share_S) and 0.7 < float(share_S[10]) < 0.8
    assert torch.equal(sums.coverage(1 * ones), ones) and torch.equal(sums.coverage(4.1 * ones), 0 * ones)


# Two halves


@pytest.fixture(scope="module")
def halves() -> Reconstruction:
    """1,000 noisy views in two halves: SNR falls with frequency as the blobs do."""
    sums, poses, ctf = [Accumulator(BOX), Accumulator(BOX)], random_rotations(1000, generator(11)), ctfs(1000)
    slices = BLOBS.slices(poses, PIXELS.frequency_K2(PIXEL, torch.float64), FIELD, PIXEL)
    level = 0.5 * float((slices * ctf).abs().square().mean().sqrt())
    data = torch.view_as_real(slices * ctf).transpose(1, 2) + level * noise(1000, 2, PIXELS.count)
    for half, part in zip(sums, (slice(0, 500), slice(500, 1000))):
        weighted = (data[part] * ctf[part, None]).float()
        half.add(weighted, ctf[part].square().float(), poses[part], PIXELS.coordinates_K3())
    return solve(sums, "C1", PIXEL)


def test_half_maps_say_how_good_the_map_is(halves: Reconstruction) -> None:
    """FSC with the truth is sqrt(2 FSC / (1 + FSC)) of the halves (Rosenthal & Henderson 2003)."""
    assert halves.half_maps is not None and halves.fsc_S is not None and halves.wiener_ZYX is not None
    expected = (2 * halves.fsc_S / (1 + halves.fsc_S)).clamp_min(0).sqrt()
    found = fsc(halves.map_ZYX.double(), MAP)
    good = halves.fsc_S > 0.3
    assert 6 < int(good.sum()) < BOX // 2  # neither noise alone nor none
    assert float((found - expected)[good].abs().max()) < 0.04
    assert torch.allclose(fsc(*(half.double() for half in halves.half_maps)), halves.fsc_S, atol=1e-4)
    assert relative(halves.wiener_ZYX, MAP) < 0.8 * relative(halves.map_ZYX, MAP)


def test_curves_of_two_halves(halves: Reconstruction, tmp_path) -> None:
    assert halves.fsc_masked_S is not None and halves.ssnr_S is not None and halves.coverage_S is not None
    clamped = halves.fsc_masked_S.clamp(1e-3, 0.999)
    assert torch.allclose(halves.ssnr_S, 2 * clamped / (1 - clamped), rtol=1e-3)
    halves.save_curves(tmp_path / "fsc.csv")
    table = list(csv.reader((tmp_path / "fsc.csv").open()))
    assert table[0] == ["shell", "resolution_angstrom", "fsc_unmasked", "fsc_masked", "ssnr", "coverage"]
    assert len(table) == 1 + BOX // 2 + 1 and table[1][:2] == ["0", ""]
    for shell in range(1, BOX // 2 + 1):
        curves = (halves.fsc_S, halves.fsc_masked_S, halves.ssnr_S, halves.coverage_S)
        expected = [shell, FIELD / shell, *(float(c[shell]) for c in curves if c is not None)]
        assert [float(value) for value in table[1 + shell]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.allclose(frequency_S(halves).double(), torch.arange(BOX // 2 + 1).double() / FIELD)
    last = int((halves.fsc_S[1:] < 0.143).nonzero()[0]) if (halves.fsc_S[1:] < 0.143).any() else BOX // 2
    assert halves.resolution() == pytest.approx(FIELD / last)
    assert halves.reaches_last_shell() == bool((halves.fsc_S[1:] >= 0.143).all())


def test_one_accumulator_gives_one_map() -> None:
    result = solve([add_views(Accumulator(BOX), random_rotations(50, generator(3)))], "C1", PIXEL)
    assert result.half_maps is None and result.fsc_S is None and result.wiener_ZYX is None
    assert result.box == BOX and not result.reaches_last_shell() and math.isfinite(float(result.map_ZYX.sum()))


@pytest.mark.parametrize("mask_radius", [None, 16.0])
def test_half_maps_of_pure_noise_do_not_correlate(mask_radius: float | None) -> None:
    """Weighting voxels by how well they were seen must not make noise agree: no resolution without signal."""
    generator = torch.Generator().manual_seed(3)
    pixels = half_plane_pixels(48)
    sums = []
    for _ in range(2):
        half = Accumulator(48)
        defocus = 0.5 + torch.rand(600, 1, generator=generator)
        ctf = torch.sin(0.02 * pixels.shell_K.float() ** 2 * defocus)
        noise = torch.randn(600, 2, pixels.count, generator=generator)
        half.add(noise * ctf[:, None], ctf**2, random_rotations(600, generator), pixels.coordinates_K3())
        sums.append(half)
    result = solve(sums, "C1", 1.0, mask_radius=mask_radius)
    assert result.fsc_S is not None and result.fsc_masked_S is not None
    for curve in (result.fsc_S, result.fsc_masked_S):
        assert abs(float(curve[5:24].mean())) < 0.03  # a shell's spread is about 0.03, so the mean's is below 0.01
    assert result.resolution(0.5) > 15
