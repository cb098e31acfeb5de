"""How GPU kernels on ragged lists share out their work: lists of programs that nothing waits for, weights as they are multiplied.

One small kernel writes the lists; how long they are is known on the device alone. Kernels are launched over a bound of the
length, and programs beyond it return at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks

COEFFICIENTS = 128  # of a patch, which `collect` and `spectra` take at once
PROGRAMS, MOST_PATCHES = 16384, 12  # that keep a GPU busy; patches of one program, so that it reads its lists for several
WEIGHT_SCALE = tl.constexpr(1024.0)  # the largest weight as float16: its low half stays clear of the smallest float16
TINIEST = tl.constexpr(1e-30)  # weights are not scaled up further: float32 would overflow


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: slices and shifts of a program, coefficients of a step, warps, stages."""

    slices: int
    shifts: int
    coefficients: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tasks:
    """Programs: particle [bound] and number of its block [bound] (blocks of shifts fastest), int32; only the first count[0] of
    them mean anything (count: int32 [1], on the device)."""

    particle_J: Tensor
    block_J: Tensor
    count: Tensor

    @property
    def bound(self) -> int:
        return len(self.block_J)


@dataclass(frozen=True)
class Sizes:
    """What the host knows without waiting: numbers of slices and of shifts of the particle that a sample belongs to, on average
    over the samples: those of the particles with most of the work. 0 where there are no samples."""

    slices: float
    shifts: float

    @classmethod
    def of(cls, blocks: Blocks, samples: int) -> Sizes:
        """Of blocks with so many samples in all."""
        return cls(samples / max(len(blocks.shift_M), 1), samples / max(len(blocks.slice_N), 1))


@triton.jit
def _list_kernel(slice_ptr, shift_ptr, particle_out, block_out, count, tile_slices, tile_shifts, STEP: tl.constexpr):
    """Program i lists the blocks of particle i."""
    i = tl.program_id(0).to(tl.int64)
    n = (tl.load(slice_ptr + i + 1) - tl.load(slice_ptr + i)).to(tl.int32)
    m = (tl.load(shift_ptr + i + 1) - tl.load(shift_ptr + i)).to(tl.int32)
    blocks = tl.cdiv(n, tile_slices) * tl.cdiv(m, tile_shifts)
    at = tl.atomic_add(count, blocks, sem="relaxed").to(tl.int64)
    for begin in range(0, blocks, STEP):
        j = begin + tl.arange(0, STEP)
        tl.store(particle_out + at + j, tl.full([STEP], 0, tl.int32) + i.to(tl.int32), mask=j < blocks)
        tl.store(block_out + at + j, j, mask=j < blocks)


def list_tasks(blocks: Blocks, samples: int, tile: Tile) -> Tasks:
    """Programs that cover all slices x shifts of every particle, `samples` in all, with tiles.

    Particles are listed about in order, so that programs running at one time share the images of a few particles in the cache.
    """
    a, t = tile.slices, tile.shifts  # ceil(n / a) ceil(m / t) < n m / (a t) + n / a + m / t + 1, summed over the particles
    bound = samples // (a * t) + len(blocks.slice_N) // a + len(blocks.shift_M) // t + blocks.particles
    count = torch.zeros(1, dtype=torch.int32, device=blocks.slice_N.device)
    particle_J, block_J = torch.empty(2, bound, dtype=torch.int32, device=count.device).unbind()
    if blocks.particles:
        _list_kernel[(blocks.particles,)](blocks.slice_ptr_B1, blocks.shift_ptr_B1, particle_J, block_J, count, a, t, STEP=128)
    return Tasks(particle_J, block_J, count)


def tile_of_weights(blocks: Blocks, samples: int) -> tuple[int, int]:
    """(slices, shifts) that `collect` and `spectra` multiply at once."""
    sizes = Sizes.of(blocks, samples)
    return 16 if sizes.slices <= 64 else 64, 16 if sizes.shifts <= 16 else 32 if sizes.shifts <= 32 else 128


def patches_at_once(particles: int, n_coefficients: int) -> int:
    """Patches of coefficients of one program of `collect` and `spectra`."""
    return max(1, min(MOST_PATCHES, particles * n_coefficients // (COEFFICIENTS * PROGRAMS)))


@triton.jit
def load_weights(own, a, n, t, m, HALF: tl.constexpr):
    """Weights of slices a < n, shifts t < m of a particle, whose first one is at `own`: (high, low, unit, total), where weight =
    (high + low) unit, two float16 halves with 22 bits of the largest weight of each slice; or float32 (high) as they are."""
    mask = (a < n)[:, None] & (t < m)[None, :]
    p = tl.load(own + a.to(tl.int64)[:, None] * m + t[None, :], mask=mask, other=0.0)
    total, unit = tl.sum(p, 1), tl.maximum(tl.max(p, 1), TINIEST) / WEIGHT_SCALE
    high, low = p, p
    if HALF:
        scaled = p * (1.0 / unit)[:, None]
        high = scaled.to(tl.float16)
        low = (scaled - high.to(tl.float32)).to(tl.float16)
    return high, low, unit, total
