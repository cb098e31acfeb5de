"""`keep` and `posterior` on the CPU: Numba, one task per particle."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.keep.reference import Kept


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _mark(value, threshold, slice_ptr, shift_ptr, value_ptr, by_shift, slice_used, shift_used):
    for i in numba.prange(len(threshold)):
        n, m = slice_ptr[i + 1] - slice_ptr[i], shift_ptr[i + 1] - shift_ptr[i]
        rows, columns = (m, n) if by_shift else (n, m)
        row_used, row_first = (shift_used, shift_ptr[i]) if by_shift else (slice_used, slice_ptr[i])
        column_used, column_first = (slice_used, slice_ptr[i]) if by_shift else (shift_used, shift_ptr[i])
        least = threshold[i]
        for r in range(rows):
            first = value_ptr[i] + r * columns
            found = False
            for c in range(columns):
                if value[first + c] >= least:
                    found = True
                    column_used[column_first + c] = True
            if found:
                row_used[row_first + r] = True


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _fill(
    value, threshold, slice_ptr, shift_ptr, value_ptr, by_shift, new_slice_ptr, slice_at, new_shift_ptr, shift_at, new_ptr, out
):
    for i in numba.prange(len(threshold)):
        n, m = slice_ptr[i + 1] - slice_ptr[i], shift_ptr[i + 1] - shift_ptr[i]
        slice_stride, shift_stride = (1, n) if by_shift else (m, 1)
        at = new_ptr[i]
        for a in range(new_slice_ptr[i], new_slice_ptr[i + 1]):
            row = value_ptr[i] + (slice_at[a] - slice_ptr[i]) * slice_stride - shift_ptr[i] * shift_stride
            for t in range(new_shift_ptr[i], new_shift_ptr[i + 1]):
                v = value[row + shift_at[t] * shift_stride]
                out[at] = v if v >= threshold[i] else -math.inf
                at += 1


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _posterior(value, log_sum, slice_ptr, shift_ptr, value_ptr, weight, by_slice, by_shift, entropy):
    for i in numba.prange(len(entropy)):
        m = shift_ptr[i + 1] - shift_ptr[i]
        total = 0.0
        for a in range(slice_ptr[i], slice_ptr[i + 1]):
            first = value_ptr[i] + (a - slice_ptr[i]) * m
            row = 0.0
            for t in range(m):
                log_p = float(value[first + t]) - log_sum[i]
                if log_p > -math.inf:
                    p = math.exp(log_p)
                    weight[first + t] = p
                    row += p
                    by_shift[shift_ptr[i] + t] += p
                    total -= p * log_p
                else:
                    weight[first + t] = 0
            by_slice[a] = row
        entropy[i] = total


def keep_cpu(log_weight_N: Tensor, blocks: Blocks, threshold_B: Tensor, by_shift: bool = False) -> Kept:
    """See README.md."""
    value, threshold = log_weight_N.numpy(), threshold_B.to(log_weight_N).numpy()
    slice_ptr, shift_ptr, value_ptr = (p.numpy() for p in (blocks.slice_ptr_B1, blocks.shift_ptr_B1, blocks.value_ptr_B1))
    slice_used, shift_used = np.zeros(len(blocks.slice_N), np.bool_), np.zeros(len(blocks.shift_M), np.bool_)
    _mark(value, threshold, slice_ptr, shift_ptr, value_ptr, by_shift, slice_used, shift_used)
    slice_at, shift_at = np.flatnonzero(slice_used), np.flatnonzero(shift_used)
    new_slice_ptr, new_shift_ptr = np.searchsorted(slice_at, slice_ptr), np.searchsorted(shift_at, shift_ptr)
    compact = Blocks.build(
        torch.from_numpy(new_slice_ptr), torch.from_numpy(blocks.slice_N.numpy()[slice_at]),
        torch.from_numpy(new_shift_ptr), torch.from_numpy(blocks.shift_M.numpy()[shift_at]),
    )  # fmt: skip
    out = torch.empty(compact.samples, dtype=log_weight_N.dtype)
    _fill(
        value, threshold, slice_ptr, shift_ptr, value_ptr, by_shift, new_slice_ptr, slice_at, new_shift_ptr, shift_at,
        compact.value_ptr_B1.numpy(), out.numpy(),
    )  # fmt: skip
    return Kept(compact, out, torch.from_numpy(slice_at), torch.from_numpy(shift_at))


def posterior_cpu(value_N: Tensor, blocks: Blocks, log_sum_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See README.md."""
    weight_N = torch.empty_like(value_N)
    by_slice, by_shift = np.zeros(len(blocks.slice_N)), np.zeros(len(blocks.shift_M))
    entropy = np.zeros(blocks.particles)
    _posterior(
        value_N.numpy(), log_sum_B.double().numpy(), blocks.slice_ptr_B1.numpy(), blocks.shift_ptr_B1.numpy(),
        blocks.value_ptr_B1.numpy(), weight_N.numpy(), by_slice, by_shift, entropy,
    )  # fmt: skip
    return weight_N, torch.from_numpy(by_slice), torch.from_numpy(by_shift), torch.from_numpy(entropy)
