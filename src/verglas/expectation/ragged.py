"""Lists of different length per particle (CSR), on any device, without a loop over particles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks


@dataclass(frozen=True)
class Samples:
    """Chosen samples of B particles, sorted by particle. ptr_B1: CSR; orientation_N, shift_N: int64 grid indices."""

    ptr_B1: Tensor
    orientation_N: Tensor
    shift_N: Tensor

    @property
    def particle_N(self) -> Tensor:
        return owner(self.ptr_B1)


def owner(ptr_B1: Tensor) -> Tensor:
    """Which run each element belongs to: [0, 0, 1, 1, 1, ...], int64."""
    counts = ptr_B1[1:] - ptr_B1[:-1]
    return torch.repeat_interleave(torch.arange(len(counts), device=ptr_B1.device), counts)


def pointers(owner_N: Tensor, runs: int) -> Tensor:
    """CSR pointers [runs + 1] of a sorted list of owners."""
    counts = torch.bincount(owner_N, minlength=runs)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def factorise(samples: Samples, n_shifts: int) -> tuple[Blocks, Tensor, Tensor]:
    """The smallest Blocks that hold all samples: per particle its distinct orientations times its distinct shifts.

    Returns (blocks, orientations [U]: the distinct orientations of the whole batch, which slice_N points into, and
    the position of every sample among the samples of the blocks).
    """
    runs = len(samples.ptr_B1) - 1
    particle_N = samples.particle_N
    orientation_U, row_N = torch.unique(samples.orientation_N, return_inverse=True)
    slice_key, slice_at_N = torch.unique(particle_N * len(orientation_U) + row_N, return_inverse=True)
    shift_key, shift_at_N = torch.unique(particle_N * n_shifts + samples.shift_N, return_inverse=True)
    n_slices = max(len(orientation_U), 1)
    slice_ptr = pointers(torch.div(slice_key, n_slices, rounding_mode="floor"), runs)
    shift_ptr = pointers(torch.div(shift_key, n_shifts, rounding_mode="floor"), runs)
    blocks = Blocks.build(slice_ptr, slice_key % n_slices, shift_ptr, shift_key % n_shifts)
    shifts_B = shift_ptr[1:] - shift_ptr[:-1]
    at_N = (slice_at_N - slice_ptr[particle_N]) * shifts_B[particle_N] + shift_at_N - shift_ptr[particle_N]
    return blocks, orientation_U, blocks.value_ptr_B1[particle_N] + at_N


def children(blocks: Blocks, slices_each: int, shifts_each: int) -> Blocks:
    """Blocks of all children: slice u becomes u * slices_each + c, shift t becomes t * shifts_each + c."""
    device = blocks.slice_N.device
    slices = (blocks.slice_N[:, None] * slices_each + torch.arange(slices_each, device=device, dtype=torch.int32)).flatten()
    shifts = (blocks.shift_M[:, None] * shifts_each + torch.arange(shifts_each, device=device, dtype=torch.int32)).flatten()
    return Blocks.build(blocks.slice_ptr_B1 * slices_each, slices, blocks.shift_ptr_B1 * shifts_each, shifts)
