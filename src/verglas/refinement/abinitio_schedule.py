"""How the search for first models goes on: how fine, how many particles, how large a step. Pure functions of the step's number.

A *round* is ten gradient steps, after which files may be written; a restart is as many rounds as `config.steps` asks for.
Iterations are numbered through: the rounds of all restarts, one that compares the restarts if there are several, iterations
with all particles without symmetry, and with the point group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from verglas.refinement.config import AbInitioConfig

STEPS_PER_ROUND = 10
WARM_UP, SETTLED = 0.2, 0.8  # share of the steps before detail is added, and after which no more is
LARGEST_STEP, SMALLEST_STEP = 0.5, 0.1
GROWTH = 3  # batches of the last steps against those of the first
COARSEST_AT_START, COARSEST_AT_END = 1 / 5, 1 / 14  # of the diameter: finer detail blurs within the steps of the grid
PIXELS_PER_DETAIL = 2.5  # the resolution is never finer
OFFSETS_PER_DETAIL = 4.0  # coarse offsets per resolution; no fewer than ...
OFFSETS_ACROSS = 2.5  # ... so many in the range


class Stage(Enum):
    """What an iteration does."""

    GRADIENT = "gradient"
    COMPARE = "restarts compared"
    FULL = "all particles"
    SYMMETRIC = "all particles, point group"


@dataclass(frozen=True)
class Step:
    """One gradient step. resolution: Å; rows: the particles' numbers, ascending; size: step towards the batch's sums;
    temperature: factor of the noise's variance."""

    resolution: float
    rows: Tensor
    size: float
    temperature: float


def rounds(config: AbInitioConfig) -> int:
    """Of one restart."""
    return math.ceil(config.steps / STEPS_PER_ROUND)


def stage_of(iteration: int, config: AbInitioConfig) -> Stage | None:
    """Of iteration 1, 2, ...; None after the last."""
    left = iteration - rounds(config) * config.restarts
    if left <= 0:
        return Stage.GRADIENT
    left -= config.restarts > 1
    if left <= 0:
        return Stage.COMPARE
    if left <= config.full_iterations:
        return Stage.FULL
    if has_group(config) and left <= 2 * config.full_iterations:
        return Stage.SYMMETRIC
    return None


def has_group(config: AbInitioConfig) -> bool:
    """Whether there is a point group, or may be one."""
    return config.symmetry != "C1" or config.find_symmetry


def total_iterations(config: AbInitioConfig) -> int:
    """How many there are, or may be."""
    symmetric = config.full_iterations if has_group(config) else 0
    return rounds(config) * config.restarts + (config.restarts > 1) + config.full_iterations + symmetric


def resolutions(config: AbInitioConfig, pixel_size: float) -> tuple[float, float]:
    """(first, last) in Å: those asked for, unless the grids or the pixels are too coarse for them."""
    last = max(config.final_resolution, COARSEST_AT_END * config.diameter, PIXELS_PER_DETAIL * pixel_size)
    return max(config.initial_resolution, COARSEST_AT_START * config.diameter, last), last


def step_of(number: int, particles: int, pixel_size: float, config: AbInitioConfig) -> Step:
    """Gradient step `number` (from 0, through all restarts) for so many particles."""
    within, steps = number % (rounds(config) * STEPS_PER_ROUND), rounds(config) * STEPS_PER_ROUND
    ramp = min(max((within / steps - WARM_UP) / (SETTLED - WARM_UP), 0.0), 1.0)
    first, last = resolutions(config, pixel_size)
    size = LARGEST_STEP + (SMALLEST_STEP - LARGEST_STEP) * ramp
    rows = drawn_rows(number, particles, _batch(ramp, particles, config), config.seed)
    return Step(1 / ((1 - ramp) / first + ramp / last), rows, size, config.temperature + (1 - config.temperature) * ramp)


def offset_grid(config: AbInitioConfig, resolution: float, pixel_size: float) -> tuple[float, float]:
    """(range, step) in Å of the offsets at a resolution."""
    reach = config.offset_range * pixel_size
    return reach, min(max(resolution / OFFSETS_PER_DETAIL, reach / OFFSETS_ACROSS), reach)


def _batch(ramp: float, particles: int, config: AbInitioConfig) -> int:
    """Particles of a step."""
    return min(particles, round(config.batch * config.classes * (1 + (GROWTH - 1) * ramp)))


def drawn_rows(number: int, particles: int, batch: int, seed: int) -> Tensor:
    """Ascending numbers of a batch without repeats, drawn from the seed and the step's number."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(particles, generator=draw)[:batch].sort().values
