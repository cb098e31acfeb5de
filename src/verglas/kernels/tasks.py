"""Work lists for GPU kernels on ragged lists: which particle, and which block of it, each program takes.

Everything is computed on the device; the only wait is for the lengths of the lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut for one class of particles: slices and shifts of a program, coefficients of a step, warps, stages."""

    slices: int
    shifts: int
    coefficients: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tasks:
    """The programs of one launch: particle [J] and number of its block [J] (blocks of shifts fastest), int32."""

    tile: Tile
    particle_J: Tensor
    block_J: Tensor


def smallest_class(size_B: Tensor, limits: tuple[int, ...]) -> Tensor:
    """Index of the first limit that is >= size, else of the last one; [B] int64."""
    return torch.bucketize(size_B, torch.tensor(limits[:-1], device=size_B.device))


def list_tasks(n_B: Tensor, m_B: Tensor, class_B: Tensor, tiles: list[Tile]) -> list[Tasks]:
    """Launches that cover n_B slices x m_B shifts of every particle, one for each tile that any particle needs.

    class_B: which of `tiles` each particle uses. Particles stay in order, so that programs running at one time share
    the images of a few particles in the cache.
    """
    blocks_CB = torch.stack([cdiv(n_B, tile.slices) * cdiv(m_B, tile.shifts) * (class_B == c) for c, tile in enumerate(tiles)])
    totals = blocks_CB.sum(1).tolist()
    particle_B = torch.arange(len(n_B), device=n_B.device)
    launches = []
    for tile, blocks_B, total in zip(tiles, blocks_CB, totals, strict=True):
        if total:
            particle_J = torch.repeat_interleave(particle_B, blocks_B, output_size=total)
            first_B = blocks_B.cumsum(0) - blocks_B
            block_J = torch.arange(total, device=n_B.device) - first_B[particle_J]
            launches.append(Tasks(tile, particle_J.int(), block_J.int()))
    return launches


def cdiv(size_B: Tensor, step: int) -> Tensor:
    """Number of blocks of `step` that hold `size`."""
    return torch.div(size_B + (step - 1), step, rounding_mode="floor")


def lengths(ptr_B1: Tensor) -> Tensor:
    """Lengths of the runs of a CSR list."""
    return ptr_B1[1:] - ptr_B1[:-1]
