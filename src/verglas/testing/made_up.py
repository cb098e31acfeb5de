"""Particles of known poses and noise in memory, for tests and benchmarks of the expectation: no files, any strength."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2, half_plane_pixels
from verglas.core.masks import soft_circle
from verglas.core.rotations import random_rotations
from verglas.expectation.images import ModelGrid
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.optics.ctf import CtfParameters, ctf_reference_BK
from verglas.optics.group import OpticsGroup
from verglas.particles.table import ParticleTable
from verglas.projection.volume import FourierVolume
from verglas.refinement.computing import Plan
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset
from verglas.refinement.schedule import coarse_size
from verglas.refinement.state import HalfModel, Poses, Schedule, flat_spectrum
from verglas.simulation.maps import truth_map
from verglas.simulation.model import AtomModel


@dataclass(frozen=True)
class Problem:
    """What the expectation of one half-set starts from; poses hold the prior of local searches."""

    model: HalfModel
    data: Dataset
    poses: Poses
    plan: Plan
    config: RefineConfig


def shell_of_domains(atoms: int, inner: float, outer: float, seed: int = 0) -> AtomModel:
    """Atoms in domains of 100 within 7 Å, their centres spread over a hollow ball from `inner` to `outer` Å; no symmetry."""
    draw = torch.Generator().manual_seed(seed)
    domains = max(1, atoms // 100)
    direction_N3 = torch.nn.functional.normalize(torch.randn(domains, 3, generator=draw, dtype=torch.float64), dim=1)
    share_N = torch.rand(domains, generator=draw, dtype=torch.float64)
    centre_N3 = direction_N3 * (inner**3 + share_N * (outer**3 - inner**3)).pow(1 / 3)[:, None]
    cloud = 7.0 * torch.randn(domains, 100, 3, generator=draw, dtype=torch.float64)
    xyz_N3 = (centre_N3[:, None] + cloud).reshape(-1, 3)
    xyz_N3 = xyz_N3[xyz_N3.norm(dim=1) < outer + 15.0]
    return AtomModel("domains", xyz_N3, torch.full((len(xyz_N3),), 6.7, dtype=torch.float64))


def simulate_particles(
    atoms: AtomModel, box: int, pixel_size: float, n: int, power_snr: float, symmetry: str = "C1", seed: int = 0
) -> Problem:
    """`n` images of atoms with CTF, offsets and white noise of variance 1, and a global search of order 2.

    power_snr: mean over the particles of sum |C P|^2 / sigma^2 over the half plane without the origin (sigma^2: variance of
    a component) that the reference's scale is chosen for. The images are slices of the reference, which is exact.
    """
    draw = torch.Generator().manual_seed(seed)
    group = OpticsGroup("made up", 1, 300.0, 2.7, 0.1, pixel_size, box)
    map_ZYX = truth_map(atoms, box, pixel_size, 60.0).double()
    rotation_B33 = random_rotations(n, draw)
    origin_B2 = (4 * torch.rand(n, 2, generator=draw, dtype=torch.float64) - 2) * pixel_size
    ctf = _defoci(n, draw)
    pixels = half_plane_pixels(box)
    slices_B2K = FourierVolume.from_map(map_ZYX, dtype=torch.float64).slices(rotation_B33, pixels)
    turns_BK = (origin_B2[:, :1] * pixels.x_K + origin_B2[:, 1:] * pixels.y_K) / (box * pixel_size)
    contrast_BK = ctf_reference_BK(pixels.frequency_K2(pixel_size), ctf, group)
    signal_BK = torch.polar(contrast_BK, 2 * math.pi * turns_BK) * torch.complex(slices_B2K[:, 0], slices_B2K[:, 1])
    diameter = 0.85 * box * pixel_size
    # The mask leaves this share of the white noise.
    share = float(soft_circle(box, diameter / 2 / pixel_size, 5.0).square().mean())
    sigma2 = share / (2 * box**2)
    power = float((signal_BK.abs().square() * (pixels.shell_K > 0)).sum(1).mean()) / sigma2
    scale = math.sqrt(power_snr / power)
    image_BYX = scale * centred_irfft2(pixels.scatter(signal_BK), box)
    image_BYX += torch.randn(n, box, box, generator=draw, dtype=torch.float64)
    config = RefineConfig(diameter=diameter, symmetry=symmetry)
    model = half_model(scale * map_ZYX, flat_spectrum(box // 2 + 1, sigma2), 1)
    data = _dataset(image_BYX, group, ctf)
    poses = _poses(rotation_B33, torch.zeros_like(origin_B2))
    start = Schedule(2, 1, 3 * pixel_size, 2 * pixel_size, perturbation=0.3)
    return searched(Problem(model, data, poses, plan_of(start, config, group, box // 2), config), start)


def searched(problem: Problem, schedule: Schedule) -> Problem:
    """The same particles searched with another schedule; direction priors are flat."""
    group, radius = problem.data.groups[0], problem.plan.model_grid.radius
    plan = plan_of(schedule, problem.config, group, radius)
    directions = plan.grid.n_directions
    prior_D = torch.full((directions,), 1 / directions, dtype=torch.float64)
    return replace(problem, plan=plan, model=replace(problem.model, direction_prior_D=prior_D))


def plan_of(schedule: Schedule, config: RefineConfig, group: OpticsGroup, radius: int) -> Plan:
    """Grids of a schedule for particles of one optics group, with a model of their box."""
    grid = OrientationGrid.build(schedule.healpix_order, schedule.oversampling, config.symmetry, schedule.perturbation)
    offsets = OffsetGrid.build(schedule.offset_range, schedule.offset_step, schedule.oversampling, schedule.perturbation)
    coarse = coarse_size(schedule, config, group.box, group.pixel_size, 2 * radius)
    return Plan(grid, offsets, ModelGrid(group.box, group.pixel_size, radius, coarse // 2), schedule, False)


def half_model(map_ZYX: Tensor, sigma2_S: Tensor, directions: int) -> HalfModel:
    """A model of one optics group and one scale group with flat priors."""
    flat_D = torch.full((directions,), 1 / directions, dtype=torch.float64)
    empty_S = torch.zeros_like(sigma2_S)
    one = torch.ones(1, dtype=torch.float64)
    return HalfModel(map_ZYX, sigma2_S[None], flat_D, 10.0, 1.0, one, empty_S, empty_S, empty_S + 10, empty_S)


def _defoci(n: int, draw: torch.Generator) -> CtfParameters:
    u_B = 8000 + 14000 * torch.rand(n, generator=draw, dtype=torch.float64)
    v_B = u_B + 400 * torch.rand(n, generator=draw, dtype=torch.float64)
    angle_B = 180 * torch.rand(n, generator=draw, dtype=torch.float64)
    zero_B = torch.zeros(n, dtype=torch.float64)
    return CtfParameters(u_B, v_B, angle_B, zero_B, zero_B, zero_B + 1, has_envelope=False)


def _dataset(image_BYX: Tensor, group: OpticsGroup, ctf: CtfParameters | None) -> Dataset:
    n = len(image_BYX)
    nowhere = ParticleTable(pd.DataFrame(index=range(n)), pd.DataFrame(), Path(), Path("made up"))
    return Dataset(nowhere, [image_BYX], torch.arange(n), torch.zeros(n, dtype=torch.int64), ctf, [group])


def _poses(rotation_B33: Tensor, origin_B2: Tensor) -> Poses:
    n = len(rotation_B33)
    zero_B = torch.zeros(n, dtype=torch.float64)
    whole_B = torch.zeros(n, dtype=torch.int64)
    half_B, group_B, class_B = whole_B + 1, whole_B, whole_B
    return Poses(
        rotation_B33, origin_B2, zero_B + 1, zero_B, zero_B, whole_B, zero_B, half_B, group_B, class_B, zero_B, zero_B, zero_B
    )  # fmt: skip
