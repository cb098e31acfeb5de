"""Lists of different length per particle (CSR), on any device, without a loop over particles."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks


def every(particles: int, slices: int, shifts: int, device: torch.device) -> Blocks:
    """Blocks in which every particle has all slices 0..slices-1 and all shifts 0..shifts-1."""
    ptr_B1 = torch.arange(particles + 1, device=device)
    slice_N = torch.arange(slices, device=device, dtype=torch.int32).repeat(particles)
    shift_M = torch.arange(shifts, device=device, dtype=torch.int32).repeat(particles)
    return Blocks.build(ptr_B1 * slices, slice_N, ptr_B1 * shifts, shift_M, particles * slices * shifts)


def at_all_shifts(ptr_B1: Tensor, slice_N: Tensor, shifts: int) -> Blocks:
    """Blocks in which particles have slices of their own (CSR), and all shifts 0..shifts-1."""
    whole = every(len(ptr_B1) - 1, 0, shifts, slice_N.device)
    return Blocks.build(ptr_B1, slice_N, whole.shift_ptr_B1, whole.shift_M, len(slice_N) * shifts)


def distinct(index_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(the distinct values of indices below `count`, ascending; position of each index among them), int64.

    By marking, without a sort, unless the indices are few among very many (fine local grids).
    """
    if count > 16 * len(index_N):
        values, place_N = torch.unique(index_N, return_inverse=True)
        return values, place_N
    used = torch.zeros(count, dtype=torch.bool, device=index_N.device)
    used.index_fill_(0, index_N, True)  # an assignment would send the number from the host and wait for the device
    place = used.long().cumsum(0) - 1
    return used.nonzero().squeeze(1), place[index_N]


def children(blocks: Blocks, slices_each: int, shifts_each: int) -> Blocks:
    """Blocks of all children: slice u becomes u * slices_each + c, shift t becomes t * shifts_each + c."""
    device = blocks.slice_N.device
    slices = (blocks.slice_N[:, None] * slices_each + torch.arange(slices_each, device=device, dtype=torch.int32)).flatten()
    shifts = (blocks.shift_M[:, None] * shifts_each + torch.arange(shifts_each, device=device, dtype=torch.int32)).flatten()
    count = None if blocks.count is None else blocks.count * slices_each * shifts_each
    return Blocks.build(blocks.slice_ptr_B1 * slices_each, slices, blocks.shift_ptr_B1 * shifts_each, shifts, count)
