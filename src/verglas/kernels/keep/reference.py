"""`keep` and `posterior` in torch, any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks, owner


@dataclass(frozen=True)
class Kept:
    """See README.md. blocks: compact; value_N: accepted log weights, -inf elsewhere; slice_at_N, shift_at_M: int64."""

    blocks: Blocks
    value_N: Tensor
    slice_at_N: Tensor
    shift_at_M: Tensor


def keep_reference(log_weight_N: Tensor, blocks: Blocks, threshold_B: Tensor, by_shift: bool = False) -> Kept:
    """See README.md."""
    threshold_B = threshold_B.to(log_weight_N)
    if by_shift:  # every particle has as many samples: no index per sample is needed
        accepted = (log_weight_N.view(blocks.particles, -1) >= threshold_B[:, None]).flatten().nonzero().squeeze(1)
    else:
        accepted = (log_weight_N >= threshold_B[owner(blocks.value_ptr_B1)]).nonzero().squeeze(1)
    particle, slice_at, shift_at = _entries(blocks, accepted, by_shift)
    slice_kept = _used(slice_at, len(blocks.slice_N))
    shift_kept = _used(shift_at, len(blocks.shift_M))
    slice_at_N, shift_at_M = slice_kept.nonzero().squeeze(1), shift_kept.nonzero().squeeze(1)
    slice_new, shift_new = slice_kept.long().cumsum(0) - 1, shift_kept.long().cumsum(0) - 1
    compact = Blocks.build(
        _pointers(blocks.slice_ptr_B1, slice_kept), blocks.slice_N[slice_at_N],
        _pointers(blocks.shift_ptr_B1, shift_kept), blocks.shift_M[shift_at_M],
    )  # fmt: skip
    a = slice_new[slice_at] - compact.slice_ptr_B1[particle]
    t = shift_new[shift_at] - compact.shift_ptr_B1[particle]
    shifts = (compact.shift_ptr_B1[1:] - compact.shift_ptr_B1[:-1])[particle]
    value_N = log_weight_N.new_full((compact.samples,), -math.inf)
    value_N[compact.value_ptr_B1[particle] + a * shifts + t] = log_weight_N[accepted]
    return Kept(compact, value_N, slice_at_N, shift_at_M)


def posterior_reference(value_N: Tensor, blocks: Blocks, log_sum_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights, sum per slice entry, sum per shift entry, entropy per particle); the sums in float64."""
    used = (value_N > -math.inf).nonzero().squeeze(1)
    particle, slice_at, shift_at = _entries(blocks, used, False)
    log_p = value_N[used].double() - log_sum_B[particle]
    p = torch.exp(log_p)

    def summed(values: Tensor, index: Tensor, count: int) -> Tensor:
        return values.new_zeros(count).index_add_(0, index, values)

    weight_N = torch.zeros_like(value_N)
    weight_N[used] = p.to(value_N)
    entropy_B = summed(-p * log_p, particle, blocks.particles)
    return weight_N, summed(p, slice_at, len(blocks.slice_N)), summed(p, shift_at, len(blocks.shift_M)), entropy_B


def _entries(blocks: Blocks, position: Tensor, by_shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(particle, slice entry, shift entry) of samples."""
    particle = torch.searchsorted(blocks.value_ptr_B1, position, right=True) - 1
    within = position - blocks.value_ptr_B1[particle]
    shifts = (blocks.shift_ptr_B1[1:] - blocks.shift_ptr_B1[:-1])[particle]
    if by_shift:
        slices = (blocks.slice_ptr_B1[1:] - blocks.slice_ptr_B1[:-1])[particle]
        t = torch.div(within, slices, rounding_mode="floor")
        a = within - t * slices
    else:
        a = torch.div(within, shifts, rounding_mode="floor")
        t = within - a * shifts
    return particle, blocks.slice_ptr_B1[particle] + a, blocks.shift_ptr_B1[particle] + t


def _used(index: Tensor, count: int) -> Tensor:
    used = torch.zeros(count, dtype=torch.bool, device=index.device)
    used[index] = True
    return used


def _pointers(ptr_B1: Tensor, kept: Tensor) -> Tensor:
    """CSR pointers of the kept entries."""
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.long().cumsum(0)])
    return before[ptr_B1]
