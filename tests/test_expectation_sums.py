"""What an expectation adds up, against loops over samples in float64: noise, norm, scale, priors, likelihood, map."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from expectation_by_hand import (
    Array,
    shell_power,
    shifted_by_loop,
    transform_at,
)
from expectation_world import (
    NORM_AVERAGE,
    RADIUS,
    ROWS,
    SCALE,
    World,
    direction_prior,
    global_posterior,
    masked_image,
    old_offset,
    posterior_by_hand,
    weights_of,
    world,
)
from verglas.expectation.images import NoiseSpectra
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.gather import BatchResult, update_sums, weighted_slices
from verglas.maximization.sums import (
    Sums,
    half_plane_counts,
    updated_direction_prior,
    updated_noise,
    updated_offset_sigma,
    updated_scale,
)
from verglas.refinement.expect import HalfExpectation
from verglas.testing.log_probability import REFERENCE


@lru_cache
def sums_of_world() -> tuple[Sums, BatchResult, Accumulator]:
    """Sums, new particle values and map sums of the global posterior."""
    w, found = world(), global_posterior()
    half = HalfExpectation([w.problem.model], w.problem.data, w.problem.poses, w.problem.plan, w.problem.config, REFERENCE)
    facts = half._facts(ROWS, 0)
    spectra = NoiseSpectra(w.problem.model.sigma2_noise_GS[0], half.common_S)
    ssnr_S = torch.tensor([10.0, 9.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    result = update_sums(half.sums, w.searcher, w.prepared, found, facts, spectra, ssnr_S[None])
    weighted_slices(w.searcher, w.prepared, found, half.common_S).add_to(half.accumulators)
    return half.sums, result, half.accumulators[0]


def residuals_by_hand(w: World, i: int) -> Array:
    """Squared difference of image and prediction per shell, each sample by its weight; beyond the current size the image."""
    weight, particle = weights_of(w, global_posterior(), i), w.particles[i]
    shell_K, mass = w.searcher.preparer.pixels.shell_K.numpy(), weight.sum()
    power_K = np.abs(particle.image_K) ** 2
    residual_S = shell_power(masked_image(w.problem, i), 1.0, 9, RADIUS)
    residual_S[: RADIUS + 1] *= mass
    residual_S -= mass * np.bincount(shell_K, power_K, 9)
    for o, t in zip(*np.nonzero(weight), strict=True):
        shift = w.problem.plan.offsets.fine_F2[t].numpy() / 4.0
        difference_K = particle.shifted(shift) - particle.contrast_K * w.fine_OK[o]
        residual_S += weight[o, t] * np.bincount(shell_K, np.abs(difference_K) ** 2, 9)
    return residual_S


def test_noise_and_norm_are_the_weighted_residuals() -> None:
    w = world()
    sums, result, _ = sums_of_world()
    residual_BS = np.array([residuals_by_hand(w, i) for i in ROWS.tolist()])
    np.testing.assert_allclose(sums.noise_GS[0].numpy(), residual_BS.sum(0), rtol=1e-5)
    mass = sum(weights_of(w, global_posterior(), i).sum() for i in ROWS.tolist())
    assert 2.9 < mass < 3 and float(sums.particles_G[0]) == pytest.approx(mass) and sums.weight == pytest.approx(mass)
    noise_S = updated_noise(sums, torch.zeros(1, 9, dtype=torch.float64), half_plane_counts(16))[0]
    expected_S = residual_BS.sum(0) / (2 * mass * half_plane_counts(16).numpy())
    np.testing.assert_allclose(noise_S.numpy(), expected_S, rtol=1e-5)
    norm_B = w.problem.poses.norm_B.numpy() / NORM_AVERAGE * np.sqrt(2 * residual_BS.sum(1))
    np.testing.assert_allclose(result.norm_B.numpy(), norm_B, rtol=1e-5)
    assert sums.norm == pytest.approx(norm_B.sum(), rel=1e-5) and sums.particles == 3


def test_scale_is_fitted_to_the_strong_shells() -> None:
    w = world()
    sums, _, _ = sums_of_world()
    cross = power = 0.0
    strong_K = (w.searcher.preparer.pixels.shell_K.numpy() <= 3) & w.counts_K  # where the SSNR is above 3
    for i, particle in enumerate(w.particles):
        weight = weights_of(w, global_posterior(), i)
        for o, t in zip(*np.nonzero(weight), strict=True):
            seen_K = particle.contrast_K / SCALE * w.fine_OK[o]
            image_K = particle.shifted(w.problem.plan.offsets.fine_F2[t].numpy() / 4.0)
            cross += weight[o, t] * (seen_K.conj() * image_K).real[strong_K].sum()
            power += weight[o, t] * (np.abs(seen_K) ** 2)[strong_K].sum()
    assert float(sums.cross_M[0]) == pytest.approx(cross, rel=1e-5)
    assert float(sums.power_M[0]) == pytest.approx(power, rel=1e-5)


def test_scales_have_mean_one_and_stay_near_their_median() -> None:
    cross_M, power_M = torch.tensor([1.0, 2.0, 30.0, 0.0]), torch.tensor([1.0, 2.0, 2.0, 0.0])
    particles_M = torch.tensor([5.0, 1.0, 2.0, 0.0])
    scale_M = updated_scale(replace(Sums.zeros(1, 9, 12, 4), cross_M=cross_M, power_M=power_M), particles_M)
    assert float((scale_M * particles_M).sum()) == pytest.approx(8)
    assert float(scale_M[2] / scale_M[0]) == pytest.approx(5) and float(scale_M[1]) == pytest.approx(float(scale_M[0]))


def test_directions_and_offsets_are_weighted_means() -> None:
    w = world()
    sums, result, _ = sums_of_world()
    direction_D, spread = np.zeros(12), 0.0
    for i in ROWS.tolist():
        weight = weights_of(w, global_posterior(), i)
        direction_D += weight.sum(1).reshape(12, -1).sum(1)
        offset_F2 = old_offset(w, i) + w.problem.plan.offsets.fine_F2.numpy()
        spread += (weight.sum(0) * (offset_F2**2).sum(1)).sum()
        best = np.unravel_index(weight.argmax(), weight.shape)
        np.testing.assert_allclose(result.origin_B2[i].numpy(), offset_F2[best[1]])
        rotation_33 = w.problem.plan.grid.child_rotations(torch.tensor([int(best[0])]))[0]
        torch.testing.assert_close(result.rotation_B33[i], rotation_33)
    np.testing.assert_allclose(updated_direction_prior(sums).numpy(), direction_D / direction_D.sum(), rtol=1e-8)
    assert updated_offset_sigma(sums, 1.0) == pytest.approx(math.sqrt(spread / (2 * sums.weight)))


def test_gain_is_the_mean_likelihood_over_that_of_noise() -> None:
    """The average over all fine samples of prior times p(X | pose) / p(X | noise); the priors have mean 1."""
    w, (_, result, _) = world(), sums_of_world()
    samples = 72 * 8 * len(w.problem.plan.offsets.fine_F2)
    for i in ROWS.tolist():
        by_hand = posterior_by_hand(w, i, direction_prior(w), np.arange(72))
        assert float(result.gain_B[i]) == pytest.approx(float(np.asarray(by_hand["evidence"])) - math.log(samples), abs=1e-4)
        weight = weights_of(w, global_posterior(), i)
        entropy = -(weight[weight > 0] * np.log(weight[weight > 0])).sum()
        assert float(result.alignability_B[i]) == pytest.approx(1 - entropy / math.log(samples), abs=1e-5)


def test_log_likelihood_is_the_normalised_evidence() -> None:
    w = world()
    _, result, _ = sums_of_world()
    sigma2_S, counts_S = w.problem.model.sigma2_noise_GS[0].numpy(), half_plane_counts(16).numpy()
    inside = slice(1, RADIUS + 1)
    left_out = sum(int(math.hypot(x, RADIUS) + 0.5) == RADIUS for x in range(1, 9))  # the last shell lacks the row y = -radius
    for i in ROWS.tolist():
        evidence = float(np.asarray(posterior_by_hand(w, i, direction_prior(w), np.arange(72))["evidence"]))
        power_S = shell_power(masked_image(w.problem, i), 1.0, 9, RADIUS)
        constant = 0.5 * (power_S / sigma2_S)[inside].sum() + 0.5 * power_S[RADIUS + 1 :].sum()
        logs_S = counts_S * np.log(2 * np.pi * sigma2_S)
        normalisation = logs_S[inside].sum() - left_out * np.log(2 * np.pi * sigma2_S[RADIUS])
        assert float(result.log_likelihood_B[i]) == pytest.approx(evidence - constant - normalisation, abs=1e-4)


def test_map_sums_are_weighted_images() -> None:
    """C X' / sigma^2 and C^2 / sigma^2 of the unmasked images, added slice by slice."""
    w = world()
    coordinates_K3 = w.searcher.preparer.pixels.coordinates_K3(torch.float64)
    expected = Accumulator(16, RADIUS, 2.0, dtype=torch.float64)
    for i, particle in enumerate(w.particles):
        moved = shifted_by_loop(w.problem.data.images[0][i].numpy(), *(old_offset(w, i) / 4).astype(int).tolist())
        whole_K = transform_at(moved, particle.x_K, particle.y_K) * NORM_AVERAGE / float(w.problem.poses.norm_B[i])
        whole = replace(particle, image_K=whole_K)
        shifted_FK = np.array([whole.shifted(d) for d in w.problem.plan.offsets.fine_F2.numpy() / 4.0])
        weight = weights_of(w, global_posterior(), i)
        for o in np.flatnonzero(weight.sum(1)).tolist():
            data_K = (weight[o] @ shifted_FK) * particle.contrast_K / particle.sigma2_K
            total_K = weight[o].sum() * particle.contrast_K**2 / particle.sigma2_K
            data_12K = torch.from_numpy(np.stack([data_K.real, data_K.imag])[None])
            rotation = w.problem.plan.grid.child_rotations(torch.tensor([o]))
            expected.add(data_12K, torch.from_numpy(total_K[None]), rotation, coordinates_K3)
    got_V3, expected_V3 = sums_of_world()[2].total()[:, :3], expected.total()[:, :3]
    assert float((got_V3 - expected_V3).abs().max()) < 1e-6 * float(expected_V3.abs().max())
