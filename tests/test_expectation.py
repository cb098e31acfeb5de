"""The expectation of batches against single images written out in float64: preparation, posteriors, precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from expectation_by_hand import (
    Array,
    contrast,
    masked_by_loop,
    shell_power,
    shifted_by_loop,
    transform_at,
)
from expectation_world import (
    AMPLITUDE,
    CS,
    MASK_PRECISION,
    ROWS,
    VOLTAGE,
    World,
    direction_prior,
    global_posterior,
    posterior_by_hand,
    weights_of,
    world,
)
from verglas.expectation.images import ImagePreparer, ModelGrid, NoiseSpectra, Prepared, common_noise
from verglas.expectation.search import Local, Posterior, Searcher
from verglas.expectation.strong import strongest
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.refinement.config import RefineConfig
from verglas.refinement.driver import computing
from verglas.refinement.state import Schedule
from verglas.testing.log_probability import REFERENCE, difference, scores_of
from verglas.testing.made_up import Problem, searched, shell_of_domains, simulate_particles

# Preparation


MODEL = ModelGrid(16, 2.0, 7, 4)


@dataclass(frozen=True)
class Case:
    """A geometry: image box and pixel, model box and pixel (px, Å), radii kept (model shells), and what the optics do."""

    box: int = 16
    pixel: float = 2.0
    model: ModelGrid = MODEL
    premultiplied: bool = False
    corrected: bool = False
    tilt: tuple[float, float] = (0.0, 0.0)


CASES = {
    "plain": Case(),
    "premultiplied": Case(premultiplied=True),
    "needs no CTF": Case(corrected=True),
    "beam tilt": Case(tilt=(3.0, -5.0)),
    "larger field": Case(box=24, pixel=1.8, model=ModelGrid(16, 2.0, 6, 3)),
    "smaller field": Case(box=16, pixel=1.7, model=ModelGrid(20, 2.0, 8, 5), tilt=(2.0, 1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_preparation_is_its_formulas(name: str) -> None:
    case = CASES[name]
    group = OpticsGroup("g", 1, VOLTAGE, CS, AMPLITUDE, case.pixel, case.box, beam_tilt_mrad=case.tilt,
                        ctf_premultiplied=case.premultiplied, ctf_corrected=case.corrected)  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(2, case.box, case.box, generator=draw, dtype=torch.float64) + 0.3
    sigma2_S = 0.001 * (1 + torch.rand(case.model.shells, generator=draw, dtype=torch.float64))
    spectra = NoiseSpectra(sigma2_S, common_noise(torch.stack([sigma2_S, 3 * sigma2_S])))
    zero = torch.zeros(2, dtype=torch.float64)
    ctf = CtfParameters(zero + 12_000, zero + 11_000, zero + 25, zero, zero, zero + 1)
    gain, scale = torch.tensor([0.8, 1.25], dtype=torch.float64), torch.tensor([1.1, 0.9], dtype=torch.float64)
    shift = torch.tensor([[2, -3], [0, 1]])
    preparer = ImagePreparer(group, case.model, 22.0, 3.0, "cpu", torch.float64)
    got = preparer(image, shift, ctf, gain, scale, spectra)
    for i in range(2):
        moved = shifted_by_loop(image[i].numpy() * float(gain[i]), *shift[i].tolist())
        check_prepared(got, i, case, preparer, moved, float(scale[i]), spectra)


def check_prepared(
    got: Prepared, i: int, case: Case, preparer: ImagePreparer, moved: Array, scale: float, spectra: NoiseSpectra
) -> None:
    """Image i of a prepared batch, from the image that was moved to its centre."""
    ratio = case.box * case.pixel / (case.model.box * case.model.pixel_size)
    x_K, y_K = preparer.pixels.x_K.double().numpy(), preparer.pixels.y_K.double().numpy()
    fx_K, fy_K = x_K / (case.box * case.pixel), y_K / (case.box * case.pixel)
    wavelength = preparer.group.wavelength_angstrom
    odd_K = -2e-3 * np.pi * CS * 1e7 * wavelength**2 * (fx_K**2 + fy_K**2) * (case.tilt[0] * fx_K + case.tilt[1] * fy_K)
    c_K = np.ones_like(x_K) if case.corrected else contrast(fx_K, fy_K, 12_000, 11_000, 25, VOLTAGE, CS, AMPLITUDE)
    masked = masked_by_loop(moved, 22.0 / 2 / case.pixel, 3.0)
    seen_K = scale * (c_K**2 if case.premultiplied else c_K)
    added_K = scale * (1 if case.premultiplied else c_K)
    shell_K = (np.hypot(x_K, y_K) / ratio + 0.5).astype(int)
    sigma2_K, common_K = spectra.sigma2_S.numpy()[shell_K], spectra.common_S.numpy()[shell_K]
    counts_K = (x_K != 0) | (y_K != 0)
    image_K, whole_K = (transform_at(a, x_K, y_K) * ratio**2 * np.exp(-1j * odd_K) for a in (masked, moved))
    np.testing.assert_array_equal(preparer.shell_K.numpy(), shell_K)
    assert counts_K.sum() == len(x_K) - 1
    assert np.hypot(x_K, y_K)[: preparer.coarse_count].max() <= case.model.coarse_radius * ratio
    expected = {
        "scored_B2K": counts_K * seen_K * image_K * common_K / sigma2_K,
        "weight_BK": counts_K * seen_K**2 * common_K**2 / sigma2_K,
        "mapped_B2K": added_K * whole_K * common_K / sigma2_K,
        "mapped_weight_BK": (scale * c_K) ** 2 * common_K**2 / sigma2_K,
    }
    for field, value in expected.items():
        found = getattr(got, field)[i].numpy()
        found = found[0] + 1j * found[1] if found.ndim == 2 else found
        np.testing.assert_allclose(found, value, rtol=MASK_PRECISION, atol=1e-7, err_msg=field)
    power_S = shell_power(masked, ratio, case.model.shells, case.model.radius)
    np.testing.assert_allclose(got.power_BS[i].numpy(), power_S, rtol=MASK_PRECISION)
    inside = slice(1, case.model.radius + 1)
    assert float(got.constant_B[i]) == pytest.approx(0.5 * (power_S / spectra.sigma2_S.numpy())[inside].sum())
    origin = int(np.flatnonzero(~counts_K)[0])
    assert float(got.origin_B[i]) == pytest.approx(image_K[origin].real) and float(got.seen_B[i]) == pytest.approx(seen_K[origin])


# Posterior


def check_posterior(w: World, found: Posterior, i: int, expected: dict[str, Array | float]) -> None:
    weight = np.asarray(expected["weight"])
    np.testing.assert_allclose(weights_of(w, found, i), weight, rtol=MASK_PRECISION, atol=1e-12)
    assert np.count_nonzero(weight) > 3, "the posterior is too sharp to tell anything"
    assert int(found.significant_B[i]) == expected["significant"]
    assert float(found.log_evidence_B[i]) == pytest.approx(expected["evidence"], abs=MASK_PRECISION)
    assert float(found.pmax_B[i]) == pytest.approx(expected["pmax"], rel=MASK_PRECISION)
    p = weight[weight > 0]
    assert float(found.entropy_B[i]) == pytest.approx(-(p * np.log(p)).sum(), rel=MASK_PRECISION)
    best = np.unravel_index(weight.argmax(), weight.shape)
    assert (int(found.best_orientation_B[i]), int(found.best_shift_B[i])) == best


@pytest.mark.parametrize("i", ROWS.tolist())
def test_global_posterior_is_the_sum_over_all_samples(i: int) -> None:
    w = world()
    check_posterior(w, global_posterior(), i, posterior_by_hand(w, i, direction_prior(w), np.arange(72)))


def test_local_posterior_is_the_sum_over_each_particles_own_samples() -> None:
    w = world()
    draw = np.random.default_rng(2)
    lists = [np.sort(draw.choice(72, size, replace=False)) for size in (20, 7, 40)]
    priors = [draw.normal(size=len(mine)) for mine in lists]
    ptr_B1 = torch.tensor([0, 20, 27, 67])
    local = Local(ptr_B1, torch.from_numpy(np.concatenate(lists)), torch.from_numpy(np.concatenate(priors)))
    parents, significant_B = w.searcher.coarse(w.prepared, w.half._facts(ROWS, 0).old_offset_B2, local)
    found = w.searcher.fine(w.prepared, parents, significant_B)
    for i in ROWS.tolist():
        check_posterior(w, found, i, posterior_by_hand(w, i, priors[i], lists[i]))


def test_correlation_keeps_the_best_child_of_the_best_coarse_sample() -> None:
    """Whatever the grey scale of the reference, which is what this score is for."""
    w = world()
    searcher = Searcher(w.searcher.preparer, replace(w.searcher.space, correlate=True), w.searcher.coarse_slicer, w.searcher.full,
                        w.searcher.fine_slices, w.searcher.some_weights)  # fmt: skip
    sigma2_S, offsets = w.problem.model.sigma2_noise_GS[0], w.problem.plan.offsets
    parents, significant_B = searcher.coarse(w.prepared, torch.zeros(3, 2, dtype=torch.float64), None, sigma2_S)
    found = searcher.fine(w.prepared, parents, significant_B, sigma2_S)
    for i, particle in enumerate(w.particles):
        coarse = particle.correlations(w.coarse_OK, offsets.coarse_T2.numpy() / 4.0, w.coarse_counts_K)
        o, t = np.unravel_index(coarse.argmax(), coarse.shape)
        fine = particle.correlations(w.fine_OK[8 * o : 8 * o + 8], offsets.fine_F2[4 * t : 4 * t + 4].numpy() / 4.0, w.counts_K)
        c, d = np.unravel_index(fine.argmax(), fine.shape)
        expected = np.zeros((72 * 8, len(offsets.fine_F2)))
        expected[8 * o + c, 4 * t + d] = 1.0
        np.testing.assert_array_equal(weights_of(w, found, i), expected)
        assert (int(found.best_orientation_B[i]), int(found.best_shift_B[i])) == (8 * o + c, 4 * t + d)
    assert found.pmax_B.tolist() == [1.0] * 3 and found.significant_B.tolist() == [1] * 3


# Precision


@lru_cache
def strong(power_snr: float) -> Problem:
    """A small D2 particle, 32 px, searched so finely that many samples lie near the best."""
    problem = simulate_particles(shell_of_domains(600, 0.0, 30.0).symmetrised("D2"), 32, 4.0, 4, power_snr, "D2")
    step = 2.5 / math.sqrt(power_snr) * 4.0
    return searched(problem, Schedule(5, 1, 1.5 * step, step, perturbation=-0.2, local_sigma=2.0))


STRENGTHS = [(800.0, 0.05, 10), (3000.0, 0.05, 4), (13_000.0, 0.1, 1)]


@pytest.mark.parametrize("half", [False, True], ids=["single", "half operands"])
@pytest.mark.parametrize(("power_snr", "bar", "samples"), STRENGTHS)
def test_log_probabilities_keep_their_precision(power_snr: float, bar: float, samples: int, half: bool) -> None:
    """Half operands are rounded as on a GPU. samples: how many lie within 12 of the best, on average at least."""
    problem = strong(power_snr)
    on, chosen = computing(torch.device("cpu"), RefineConfig(diameter=100.0))
    assert on.dtype == torch.float32 == on.operand and "float32" in chosen["precision"]
    expected = scores_of(problem, REFERENCE, torch.arange(4))
    got = scores_of(problem, on, torch.arange(4), expected.parents, half)
    assert difference(got.fine_N, expected.fine_N, expected.fine_ptr_B1).samples > samples
    for mine, theirs, ptr in (
        (got.coarse_N, expected.coarse_N, expected.coarse_ptr_B1),
        (got.fine_N, expected.fine_N, expected.fine_ptr_B1),
    ):
        found = difference(mine, theirs, ptr)
        assert found.finite and found.samples > 1
        assert 0 < float(found.largest_B.max()) < (bar if half else bar / 5)  # single precision is far better than asked
        assert float(found.variation_B.max()) < 0.02


def test_half_operands_miss_the_bar_unless_strong_coefficients_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = strong(3000.0)
    on, _ = computing(torch.device("cpu"), RefineConfig(diameter=100.0))
    expected = scores_of(problem, REFERENCE, torch.arange(4))
    monkeypatch.setattr("verglas.expectation.strong.TOLERATED", math.inf)
    got = scores_of(problem, on, torch.arange(4), expected.parents, rounded=True)
    assert float(difference(got.fine_N, expected.fine_N, expected.fine_ptr_B1).largest_B.max()) > 0.05


def test_what_is_found_for_a_particle_does_not_depend_on_its_batch() -> None:
    """Half operands: the same coefficients are taken out whoever comes first, though particles of weak CTF alone would ask for
    fewer."""
    problem = strong(3000.0)
    scale_M = torch.tensor([1.0, 0.3, 0.2, 0.1], dtype=torch.float64)
    poses = replace(problem.poses, micrograph_B=torch.arange(4))
    problem = replace(problem, model=replace(problem.model, scale_M=scale_M), poses=poses)
    on, _ = computing(torch.device("cpu"), RefineConfig(diameter=100.0))
    together = scores_of(problem, on, torch.arange(4), rounded=True)
    for i in range(4):
        alone = scores_of(problem, on, torch.tensor([i]), rounded=True)
        mine_N = together.coarse_N[together.coarse_ptr_B1[i] : together.coarse_ptr_B1[i + 1]]
        torch.testing.assert_close(alone.coarse_N - alone.coarse_N.max(), mine_N - mine_N.max(), rtol=0, atol=2e-4)


def test_a_reference_far_from_zero_does_not_overflow_half_operands() -> None:
    problem = strong(3000.0)
    map_ZYX = problem.model.map_ZYX + 1000 * problem.model.map_ZYX.max()
    problem = replace(problem, model=replace(problem.model, map_ZYX=map_ZYX))
    on, _ = computing(torch.device("cpu"), RefineConfig(diameter=100.0))
    got = scores_of(problem, on, torch.arange(4), None, rounded=True)
    assert not torch.isnan(got.coarse_N).any() and not torch.isnan(got.fine_N).any()
    assert torch.isfinite(got.coarse_N).all() and not torch.isposinf(got.fine_N).any()


def test_strong_coefficients_are_the_fewest_that_do() -> None:
    draw = torch.Generator().manual_seed(1)
    power_K = torch.full((400,), 0.5, dtype=torch.float64).index_fill_(0, torch.randperm(400, generator=draw)[:21], 60.0)
    found_K = strongest(power_K, power_K.square(), 200)
    assert set((power_K > 1).nonzero().squeeze(1).tolist()) <= set(found_K.tolist())
    inside = int((found_K < 200).sum())
    assert inside % 8 == (len(found_K) - inside) % 8 == 0 and len(found_K) <= 21 + 14
    assert torch.equal(found_K, found_K.sort().values)
    even_K = power_K.clamp_max(2.0)
    assert len(strongest(even_K, even_K.square(), 200)) == 0
    assert len(strongest(even_K, 100 * even_K.square(), 200)) > 0  # the same power in a few particles or orientations
