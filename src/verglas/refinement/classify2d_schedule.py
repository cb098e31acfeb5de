"""How a 2-D classification goes on: how many classes and particles each iteration has. Pure functions of the iteration's number.

By expectation-maximization (EM) every iteration sees all particles. The gradient sees a batch in each but the last ones: so many
particles for each class there is, so batches grow with the number of classes, and then up to `abinitio_schedule.GROWTH` times
as large while steps get smaller. The last iterations see all particles, as those of EM do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.refinement.abinitio_schedule import GROWTH as BATCH_GROWTH
from verglas.refinement.abinitio_schedule import drawn_rows
from verglas.refinement.config import Classify2dConfig

GROWTH, DIVIDING = 1.5, 0.6  # classes per iteration; share of the iterations in which they grow in number
GRADIENT = 0.88  # share of the iterations that see a batch
LARGEST_STEP, SMALLEST_STEP = 0.7, 0.3
FEWEST_IN_BATCH = 500
KEEP_SAFE = 1.5  # a coarse search sees details of the arc between two angles over this (facts 3.3),
KEEP_STEPS = 3.5  # and details of so many steps between two offsets: finer ones are out of phase halfway between them
ENOUGH_PER_CLASS = 1000  # particles, from which on the gradient is the default


@dataclass(frozen=True)
class Step:
    """What an iteration sees. rows: the particles' numbers, ascending; size: of the step towards their sums, 1: nothing is kept
    of those before; whole: whether they are all."""

    rows: Tensor
    size: float
    whole: bool


def coarse_radius(field: float, config: Classify2dConfig, offset_step: float) -> int:
    """Last shell of the coarse search. field: edge of the images; offset_step: between coarse offsets; both Å."""
    arc = math.radians(config.psi_step) / 2 * config.diameter
    return math.ceil(field / max(arc / KEEP_SAFE, KEEP_STEPS * offset_step))


def uses_gradient(config: Classify2dConfig, particles: int) -> bool:
    """As asked for, or as the number of particles asks for."""
    return particles >= ENOUGH_PER_CLASS * config.classes if config.gradient is None else config.gradient


def mode_notice(config: Classify2dConfig, particles: int) -> str:
    """How the classes are found, and why."""
    mode = f"the gradient, in batches of {config.batch} particles a class" if uses_gradient(config, particles) else "EM"
    passes = sum(seen(number, particles, config) for number in range(1, config.max_iterations + 1)) / particles
    each = f"{particles / config.classes:.0f} particles a class"
    why = "as asked for" if config.gradient is not None else f"{each}, the gradient is the default from {ENOUGH_PER_CLASS} on"
    return f"Classes are found by {mode} ({why}): {config.max_iterations} iterations see every particle {passes:.1f} times."


def first_count(config: Classify2dConfig) -> int:
    """How many classes to begin with so that all are there in time: mostly one."""
    return max(1, math.ceil(config.classes / GROWTH ** int(DIVIDING * config.max_iterations)))


def next_count(count: int, config: Classify2dConfig) -> int:
    """Number of classes in the iteration after one with `count`."""
    return min(config.classes, max(count + 1, int(GROWTH * count)))


def count_at(number: int, config: Classify2dConfig) -> int:
    """Number of classes in iteration 1, 2, ..."""
    count = first_count(config)
    for _ in range(number - 1):
        count = next_count(count, config)
    return count


def seen(number: int, particles: int, config: Classify2dConfig) -> int:
    """How many particles iteration 1, 2, ... sees."""
    if number > _last_batch(config) or not uses_gradient(config, particles):
        return particles
    batch = config.batch * count_at(number, config) * (1 + (BATCH_GROWTH - 1) * _ramp(number, config))
    return min(particles, max(FEWEST_IN_BATCH, round(batch)))


def step_of(number: int, particles: int, config: Classify2dConfig) -> Step:
    """Of iteration 1, 2, ...; the same whenever it is asked for."""
    batch = seen(number, particles, config)
    if batch == particles:
        return Step(torch.arange(particles), 1.0, True)
    size = LARGEST_STEP + (SMALLEST_STEP - LARGEST_STEP) * _ramp(number, config)
    return Step(drawn_rows(number, particles, batch, config.seed), size, False)


def searches_left(number: int, particles: int, config: Classify2dConfig) -> float:
    """What the iterations after `number` see, in what iteration `number` saw."""
    rest = sum(seen(later, particles, config) for later in range(number + 1, config.max_iterations + 1))
    return rest / seen(number, particles, config)


def _last_batch(config: Classify2dConfig) -> int:
    """Number of the last iteration that sees a batch."""
    return int(GRADIENT * config.max_iterations)


def _ramp(number: int, config: Classify2dConfig) -> float:
    """0 while classes grow in number, then up to 1 at the last batch."""
    first, last = DIVIDING * config.max_iterations, _last_batch(config)
    return min(max((number - first) / (last - first), 0.0), 1.0)
