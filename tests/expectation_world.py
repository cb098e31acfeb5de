"""A tiny refinement step for tests: three particles, every sample of which can be computed one by one (expectation_by_hand)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from expectation_by_hand import (
    Array,
    Flags,
    Numbers,
    OneParticle,
    Transforms,
    contrast,
    masked_by_loop,
    shifted_by_loop,
    smallest_set,
    transform_at,
)
from verglas.expectation.images import Prepared
from verglas.expectation.search import Posterior, Searcher
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.state import Schedule
from verglas.testing.log_probability import REFERENCE
from verglas.testing.made_up import Problem, plan_of, searched, shell_of_domains, simulate_particles

VOLTAGE, CS, AMPLITUDE = 300.0, 2.7, 0.1
MASK_PRECISION = 2e-6  # circular masks are made in single precision, whatever the images are


@dataclass(frozen=True)
class World:
    """A tiny problem and everything about it in NumPy: slices of all fine and coarse orientations, offsets in px."""

    problem: Problem
    half: HalfExpectation
    searcher: Searcher
    prepared: Prepared
    particles: list[OneParticle]
    coarse_OK: Transforms
    fine_OK: Transforms
    counts_K: Flags
    coarse_counts_K: Flags


ROWS, RADIUS, SCALE, NORM_AVERAGE = torch.arange(3), 6, 1.3, 0.9
FRACTION = 0.99


@lru_cache
def world() -> World:
    """Three particles, 16 px, 72 coarse orientations, 5 coarse offsets; gains, scale and whole-pixel offsets not trivial."""
    problem = simulate_particles(shell_of_domains(900, 0.0, 16.0), 16, 4.0, 3, 40.0)
    config = replace(problem.config, adaptive_fraction=FRACTION)
    origin_B2 = torch.tensor([[4.0, 0.0], [0.0, -8.0], [1.0, 5.0]], dtype=torch.float64)
    poses = replace(problem.poses, origin_B2=origin_B2, norm_B=torch.tensor([0.8, 0.9, 1.1], dtype=torch.float64))
    schedule = Schedule(0, 1, 8.0, 8.0, perturbation=0.3)
    problem = replace(problem, config=config, poses=poses, plan=plan_of(schedule, config, problem.data.groups[0], RADIUS))
    problem = searched(problem, schedule)
    draw = torch.Generator().manual_seed(8)
    prior_D = 0.2 + torch.rand(12, generator=draw, dtype=torch.float64)
    model = replace(problem.model, direction_prior_D=prior_D / prior_D.sum(), norm_average=NORM_AVERAGE,
                    scale_M=torch.tensor([SCALE], dtype=torch.float64), offset_sigma=6.0)  # fmt: skip
    problem = replace(problem, model=model)
    half = HalfExpectation([model], problem.data, poses, problem.plan, config, REFERENCE)
    searcher, prepared = half.prepared(ROWS, 0)
    pixels = searcher.preparer.pixels
    coarse_OK, fine_OK = (
        complex_of(half.volumes[0].slices(rotations, pixels.coordinates_K3(torch.float64)))
        for rotations in (problem.plan.grid.rotations(), problem.plan.grid.child_rotations(torch.arange(72 * 8)))
    )
    counts_K = (pixels.shell_K > 0).numpy()
    coarse_counts_K = counts_K & (np.arange(pixels.count) < searcher.preparer.coarse_count)
    particles = [one_particle(problem, searcher, i) for i in ROWS.tolist()]
    return World(problem, half, searcher, prepared, particles, coarse_OK, fine_OK, counts_K, coarse_counts_K)


def complex_of(slices_R2K: Tensor) -> Transforms:
    return slices_R2K[:, 0].numpy() + 1j * slices_R2K[:, 1].numpy()


def masked_image(problem: Problem, i: int) -> Array:
    gain = NORM_AVERAGE / float(problem.poses.norm_B[i])
    whole = np.round(problem.poses.origin_B2[i].numpy() / 4.0).astype(int)
    moved = shifted_by_loop(problem.data.images[0][i].numpy() * gain, *whole.tolist())
    return masked_by_loop(moved, problem.config.diameter / 2 / 4.0, problem.config.mask_edge)


def one_particle(problem: Problem, searcher: Searcher, i: int) -> OneParticle:
    pixels, ctf = searcher.preparer.pixels, problem.data.ctf
    assert ctf is not None
    x_K, y_K = pixels.x_K.double().numpy(), pixels.y_K.double().numpy()
    c_K = contrast(x_K / 64.0, y_K / 64.0, float(ctf.defocus_u_B[i]), float(ctf.defocus_v_B[i]), float(ctf.angle_B[i]),
                   VOLTAGE, CS, AMPLITUDE)  # fmt: skip
    sigma2_K = problem.model.sigma2_noise_GS[0].numpy()[pixels.shell_K.numpy()]
    return OneParticle(x_K, y_K, 16, transform_at(masked_image(problem, i), x_K, y_K), SCALE * c_K, sigma2_K)


def old_offset(w: World, i: int) -> Array:
    """Å, whole pixels of 4 Å."""
    return np.round(w.problem.poses.origin_B2[i].numpy() / 4.0) * 4.0


def posterior_by_hand(w: World, i: int, prior_O: Array, mine: Numbers) -> dict[str, Array | float]:
    """Weights [fine orientations, fine offsets] of particle i among coarse orientations `mine` with log priors `prior_O`."""
    offsets = w.problem.plan.offsets
    log_offset_T = -0.5 * ((old_offset(w, i) + offsets.coarse_T2.numpy()) ** 2).sum(1) / 6.0**2
    log_offset_T -= np.log(np.exp(log_offset_T).mean())
    particle = w.particles[i]
    coarse = particle.log_probabilities(w.coarse_OK[mine], offsets.coarse_T2.numpy() / 4.0, w.coarse_counts_K)
    coarse += prior_O[:, None] + log_offset_T
    chosen = smallest_set(np.exp(coarse - coarse.max()), FRACTION)
    fine_mine = (mine[:, None] * 8 + np.arange(8)).ravel()
    fine = particle.log_probabilities(w.fine_OK[fine_mine], offsets.fine_F2.numpy() / 4.0, w.counts_K)
    prior = prior_O[:, None] + log_offset_T
    admitted = np.where(chosen, prior, -np.inf).repeat(8, 0).repeat(4, 1)
    fine += admitted
    top = fine.max()
    total = np.exp(fine - top).sum()
    p = np.exp(fine - top) / total
    kept = np.where(smallest_set(p, FRACTION), p, 0.0)
    weight = np.zeros((72 * 8, len(offsets.fine_F2)))
    weight[fine_mine] = kept
    constant = 0.5 * (np.abs(particle.image_K) ** 2 / particle.sigma2_K)[w.counts_K].sum()
    return {"weight": weight, "evidence": top + math.log(total) + constant, "significant": float(chosen.sum()), "pmax": p.max()}


def weights_of(w: World, found: Posterior, i: int) -> Array:
    """A posterior's weights of particle i on the whole fine grid."""
    slices, shifts, where = found.blocks.lists(i)
    out = np.zeros((72 * 8, len(w.problem.plan.offsets.fine_F2)))
    out[np.ix_(found.orientation_U[slices].numpy(), shifts.numpy())] = found.weight_N[where].view(len(slices), -1).numpy()
    return out


@lru_cache
def global_posterior() -> Posterior:
    w = world()
    parents, significant_B = w.searcher.coarse(w.prepared, w.half._facts(ROWS, 0).old_offset_B2)
    return w.searcher.fine(w.prepared, parents, significant_B)


def direction_prior(w: World) -> Array:
    prior_D = w.problem.model.direction_prior_D.numpy()
    return np.log(prior_D / prior_D.mean()).repeat(6)
