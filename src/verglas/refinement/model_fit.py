"""How well each particle of a 2-D classification fits a rough map that is made of the good classes.

Averages of good classes are views of one object; half a particle, a gap between two, or a particle far off the centre can have an
average of its own, but no map holds it. The map is a first model of particles of the good classes (`abinitio`, from one
random start). Then all particles, selected or not, are compared with it once, in all poses:

    gain     ln p(image | map) - ln p(image | noise alone): half a particle, or one with little contrast, has less
    misfit   power of what the map leaves of the image, in the noise's: neighbours, ice, and particles of another shape have more

The hand of the map stays open, and does not matter here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from verglas.maximization.reference import low_pass
from verglas.refinement import abinitio, single
from verglas.refinement.abinitio_schedule import resolutions
from verglas.refinement.accuracy import plan_of
from verglas.refinement.computing import Computing
from verglas.refinement.config import AbInitioConfig, Classify2dConfig
from verglas.refinement.dataset import Dataset, Progress
from verglas.refinement.driver import first_noise
from verglas.refinement.step import expect, particle_sets

EDGE = 2  # shells of the images beyond that of the resolution: those where the map fades out
FEWEST, MOST = 100, 3000  # particles: no map of fewer is made; a map has enough of so many, drawn at random


def model_fits(rows: Tensor, data: Dataset, config: Classify2dConfig, on: Computing, progress: Progress) -> Tensor | None:
    """(gain, misfit) of every particle, float64 [B, 2]; None if there are fewer than `FEWEST` to make a map of.

    rows: of the particles of the good classes (of several ranks those of the lead count); data: all particles.
    """
    draw = torch.Generator().manual_seed(config.seed)
    rows = on.ranks.agreed(rows[torch.randperm(len(rows), generator=draw)[:MOST]].sort().values, "particles of a map")
    if len(rows) < FEWEST:
        return None
    own = model_config(config)
    finest = resolutions(own, data.groups[0].pixel_size)[1]
    map_ZYX = low_pass(first_model(rows, data, own, on, progress), finest, data.groups[0].pixel_size)
    state = single.initial_state(data.table, map_ZYX, first_noise(data, own, on.ranks), own)
    state = replace(state, current_size=min(2 * (state.shell_of(finest) + EDGE), state.box))
    plan = plan_of(state, own, correlate=False)
    _, poses = expect(particle_sets(state), state.poses, data, own, on, plan, progress)
    return torch.stack([poses.gain_B, poses.misfit_B], 1)


def model_config(config: Classify2dConfig) -> AbInitioConfig:
    """Options of the map and of the comparison with it."""
    return AbInitioConfig(
        diameter=config.diameter, mask_edge=config.mask_edge, seed=config.seed, precision=config.precision, restarts=1,
        absolute_greyscale=True,
    )  # fmt: skip


def first_model(rows: Tensor, data: Dataset, config: AbInitioConfig, on: Computing, progress: Progress) -> Tensor:
    """A map of these particles [Z, Y, X]."""
    session = abinitio.prepare(data.table.select(rows.numpy()), config, on.device, ranks=on.ranks)
    *_, last = abinitio.iterations(replace(session, on=on), progress)
    return last.state.halves[0].map_ZYX
