"""A small refinement in the middle of its work, for tests of its files: numbers are made up, but fit each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from verglas.core.rotations import random_rotations
from verglas.io.mrc import StackWriter
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig
from verglas.refinement.state import HalfModel, Poses, Schedule, State

PIXEL = 3.0


def small_config(**changes: object) -> RefineConfig:
    """Options of the small refinement, some of them not at their defaults."""
    return RefineConfig(**{"diameter": 30.0, "healpix_order": 1, "seed": 7, "tau2_fudge": 1.5} | changes)  # type: ignore[arg-type]


def small_table(folder: Path, n: int = 12, box: int = 16, stack: str = "particles.mrcs") -> ParticleTable:
    """`n` particles of two optics groups on three micrographs, met in the order b, c, a; noise images in folder/stack."""
    draw = np.random.default_rng(3)
    with StackWriter(folder / stack, n, (box, box), PIXEL) as writer:
        writer.append(draw.normal(size=(n, box, box)).astype(np.float32))
    rows = np.arange(n)
    frame = pd.DataFrame({
        "rlnImageName": [f"{row + 1:06d}@{stack}" for row in rows],
        "rlnMicrographName": [f"mics/{'bca'[row % 3]}.mrc" for row in rows],
        "rlnOpticsGroup": 1 + (rows % 3 == 2),
        "rlnCoordinateX": draw.uniform(0, 4000, n),
        "rlnDefocusU": draw.uniform(1e4, 2e4, n),
        "rlnDefocusV": draw.uniform(1e4, 2e4, n),
        "rlnDefocusAngle": draw.uniform(0, 180, n),
        "myOwn": [f"note {row}" for row in rows],
    })  # fmt: skip
    optics = pd.DataFrame({
        "rlnOpticsGroupName": ["one", "two"], "rlnOpticsGroup": [1, 2], "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7,
        "rlnAmplitudeContrast": 0.1, "rlnImagePixelSize": PIXEL, "rlnImageSize": box, "rlnImageDimensionality": 2,
    })  # fmt: skip
    return ParticleTable(frame, optics, folder, folder / "particles.star")


def small_poses(table: ParticleTable, seed: int = 5) -> Poses:
    """Random poses and figures for the particles of `table`, half-sets by turns."""
    n, draw = len(table), torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=draw, dtype=torch.float64)

    micrograph_B = torch.from_numpy(pd.factorize(table.frame["rlnMicrographName"])[0].astype(np.int64))
    return Poses(
        rotation_B33=random_rotations(n, draw), origin_B2=uniform(-9, 9, n, 2), norm_B=uniform(0.8, 1.2, n),
        log_likelihood_B=uniform(900, 1000, n), pmax_B=uniform(0.1, 1, n), significant_B=torch.arange(1, n + 1),
        entropy_B=uniform(0, 5, n), half_B=1 + torch.arange(n) % 2, micrograph_B=micrograph_B,
        class_B=torch.zeros(n, dtype=torch.int64), gain_B=uniform(-5, 50, n), alignability_B=uniform(0, 1, n),
        misfit_B=uniform(0.5, 2, n),
    )  # fmt: skip


def small_half(box: int, groups: int, micrographs: int, directions: int, seed: int) -> HalfModel:
    """A half-set's model of random numbers; SSNR falls below 1 after shell 4."""
    draw = torch.Generator().manual_seed(seed)
    shells = torch.arange(box // 2 + 1, dtype=torch.float64)
    prior_D = torch.rand(directions, generator=draw, dtype=torch.float64)
    sigma2_S = 1e-4 * (1 + shells)
    ssnr_S = 100 * torch.exp(-shells)
    noise_GS = 1e-3 * (1 + torch.rand(groups, len(shells), generator=draw, dtype=torch.float64))
    return HalfModel(
        map_ZYX=torch.randn(box, box, box, generator=draw), sigma2_noise_GS=noise_GS, direction_prior_D=prior_D / prior_D.sum(),
        offset_sigma=4.0 + seed, norm_average=0.9, scale_M=1 + 0.1 * torch.arange(micrographs, dtype=torch.float64),
        tau2_S=sigma2_S * ssnr_S, sigma2_S=sigma2_S, ssnr_S=ssnr_S, coverage_S=torch.exp(-0.1 * shells),
        log_likelihood=12345.678 + seed, average_pmax=0.5,
    )  # fmt: skip


def small_state(table: ParticleTable, halves: int = 2, healpix_order: int = 1, seed: int = 5) -> State:
    """A state after iteration 3, for the particles of `table`."""
    box = table.groups[0].box
    poses = small_poses(table, seed)
    names = list(dict.fromkeys(table.frame["rlnMicrographName"]))
    schedule = Schedule(
        healpix_order, 1, offset_range=15.0, offset_step=6.0, perturbation=-0.2875, best_resolution=12.0,
        iterations_without_gain=1, changes_angles=2.5, changes_offsets=1.5, smallest_angles=2.0, smallest_offsets=1.25,
        accuracy_angles=3.5, accuracy_offsets=2.25,
    )  # fmt: skip
    directions = 12 * 4**healpix_order
    models = [small_half(box, len(table.groups), len(names), directions, seed + i) for i in range(halves)]
    fsc_S = torch.exp(-0.3 * torch.arange(box // 2 + 1, dtype=torch.float64))
    return State(3, models, poses, schedule, box, table.groups[0].pixel_size, 12.0, 14, fsc_S, names)


def small_directions(healpix_order: int = 1) -> torch.Tensor:
    """As many directions (rot, tilt) [D, 2] as the HEALPix grid has, evenly spread (a spiral)."""
    n = 12 * 4**healpix_order
    index_D = torch.arange(n, dtype=torch.float64)
    return torch.stack([(index_D * 137.50776) % 360 - 180, torch.rad2deg(torch.acos(1 - 2 * (index_D + 0.5) / n))], 1)
