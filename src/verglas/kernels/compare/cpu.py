"""`compare` on the CPU: blocked matrix products in Numba, float32, each with its own rows of the slice table.

A task is a particle and up to 64 of its slices. For a run of coefficients that keeps everything in the first two caches,
tiles of 4 slices x 4 shifts are summed in 16 vector registers: 8 loads for 16 products, rows read where they lie. That
runs as fast as copying the rows together and calling BLAS, without the copy.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks, Wanted
from verglas.kernels.positions import FASTMATH
from verglas.kernels.ragged import Lists, cut

f, u = np.float32, np.uintp
SLICES = 64  # slices of a task: the images are read from memory once for all of them
RUN = 1024  # coefficients summed at a time: 8 rows of 4 kB in the first-level cache, 84 shifts in the second
CHUNK = 4  # tasks handed to a thread at a time


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _tile(p0, p1, p2, p3, a0, a1, a2, a3, out):
    """out [4, 4] = inner products of four slices with four images. Written out so that all sums stay in registers."""
    c00 = c01 = c02 = c03 = c10 = c11 = c12 = c13 = f(0)
    c20 = c21 = c22 = c23 = c30 = c31 = c32 = c33 = f(0)
    for k in range(u(len(p0))):
        x0, x1, x2, x3 = p0[k], p1[k], p2[k], p3[k]
        y0, y1, y2, y3 = a0[k], a1[k], a2[k], a3[k]
        c00, c01, c02, c03 = c00 + x0 * y0, c01 + x0 * y1, c02 + x0 * y2, c03 + x0 * y3
        c10, c11, c12, c13 = c10 + x1 * y0, c11 + x1 * y1, c12 + x1 * y2, c13 + x1 * y3
        c20, c21, c22, c23 = c20 + x2 * y0, c21 + x2 * y1, c22 + x2 * y2, c23 + x2 * y3
        c30, c31, c32, c33 = c30 + x3 * y0, c31 + x3 * y1, c32 + x3 * y2, c33 + x3 * y3
    out[0, 0], out[0, 1], out[0, 2], out[0, 3] = c00, c01, c02, c03
    out[1, 0], out[1, 1], out[1, 2], out[1, 3] = c10, c11, c12, c13
    out[2, 0], out[2, 1], out[2, 2], out[2, 3] = c20, c21, c22, c23
    out[3, 0], out[3, 1], out[3, 2], out[3, 3] = c30, c31, c32, c33


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _half_power(p0, p1, p2, p3, weight, out):
    """out [4] = half the weighted power of four slices."""
    c0 = c1 = c2 = c3 = f(0)
    for k in range(u(len(p0))):
        w = weight[k]
        c0, c1 = c0 + w * p0[k] * p0[k], c1 + w * p1[k] * p1[k]
        c2, c3 = c2 + w * p2[k] * p2[k], c3 + w * p3[k] * p3[k]
    half = f(0.5)
    out[0], out[1], out[2], out[3] = half * c0, half * c1, half * c2, half * c3


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _add_run(images, weight, table, slices, shifts, begin, end, wanted, slices_each, first, score):
    """Add what coefficients begin..end contribute to score [len(slices), len(shifts)].

    wanted [parent slices, shifts / 4]: tiles to be computed, for slice `first` + a in row (first + a) / slices_each; empty: all.

    Where fewer than four rows are left, the last one fills the tile and what it gives is dropped.
    """
    last_slice, last_shift = len(slices) - 1, len(shifts) - 1
    cross, power = np.empty((4, 4), np.float32), np.empty(4, np.float32)
    for a in range(0, len(slices), 4):
        p0 = table[u(slices[a]), begin:end]
        p1 = table[u(slices[min(a + 1, last_slice)]), begin:end]
        p2 = table[u(slices[min(a + 2, last_slice)]), begin:end]
        p3 = table[u(slices[min(a + 3, last_slice)]), begin:end]
        _half_power(p0, p1, p2, p3, weight[begin:end], power)
        parent = (first + a) // slices_each
        for t in range(0, len(shifts), 4):
            if len(wanted) > 0 and not wanted[parent, t // 4]:
                continue
            y0 = images[u(shifts[t]), begin:end]
            y1 = images[u(shifts[min(t + 1, last_shift)]), begin:end]
            y2 = images[u(shifts[min(t + 2, last_shift)]), begin:end]
            y3 = images[u(shifts[min(t + 3, last_shift)]), begin:end]
            _tile(p0, p1, p2, p3, y0, y1, y2, y3, cross)
            for i in range(min(4, len(slices) - a)):
                for j in range(min(4, len(shifts) - t)):
                    score[a + i, t + j] += cross[i, j] - power[i]


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _compare(particle, first, lists, images, weight, table, step, kept, kept_ptr, each, score):
    slice_ptr, slice_N, shift_ptr, shift_M, value_ptr = lists
    n_k = weight.shape[1]
    for task in numba.prange(len(particle)):
        i = particle[task]
        begin = slice_ptr[i] + first[task]
        slices = slice_N[begin : min(begin + SLICES, slice_ptr[i + 1])]
        shifts = shift_M[shift_ptr[i] : shift_ptr[i + 1]]
        start = value_ptr[i] + first[task] * len(shifts)
        own = score[start : start + len(slices) * len(shifts)].reshape(len(slices), len(shifts))
        own[:] = f(0)
        both = np.empty(2 * n_k, np.float32)  # the weight of real and of imaginary parts
        both[:n_k], both[n_k:] = weight[i], weight[i]
        wanted = np.empty((0, 0), np.bool_)
        if len(kept) > 0:
            groups = len(shifts) // each[1]
            pairs = kept[kept_ptr[i] : kept_ptr[i + 1]].reshape(-1, groups)
            wanted = np.empty((len(pairs), len(shifts) // 4), np.bool_)
            for a in range(len(pairs)):
                for t in range(wanted.shape[1]):
                    wanted[a, t] = pairs[a, 4 * t // each[1]] > -np.inf
        for k in range(0, 2 * n_k, step):
            _add_run(images, both, table, slices, shifts, k, min(k + step, 2 * n_k), wanted, each[0], first[task], own)


def compare_cpu(
    images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, wanted: Wanted | None = None
) -> Tensor:
    """See README.md; float32 (TypeError for others: this kernel computes in single precision).

    Samples that are not wanted come out as 0 where a whole tile of 4 x 4 is children of one pair.
    """
    for tensor in (images, weight_BK, slices_U2K):
        if tensor.dtype != torch.float32:
            raise TypeError(f"the compiled kernel compares float32 transforms, got {tensor.dtype}")
    images, blocks = blocks.with_rows(images)
    score_N = torch.from_numpy(np.empty(blocks.samples, np.float32))
    lists = Lists.of(blocks)
    particle, first = cut(lists, SLICES)
    n_coefficients = 2 * weight_BK.shape[1]
    runs = max(1, -(-n_coefficients // RUN))
    step = 16 * max(1, -(-n_coefficients // (16 * runs)))  # runs of equal length, whole vectors
    kept, kept_ptr, each = np.empty(0, np.float32), np.zeros(1, np.int64), (1, 1)
    if wanted is not None and wanted.slices_each % 4 == 0 and wanted.shifts_each % 4 == 0:
        kept, kept_ptr = wanted.kept_N.float().numpy(), wanted.parents.value_ptr_B1.numpy()
        each = (wanted.slices_each, wanted.shifts_each)
    with numba.parallel_chunksize(CHUNK):
        _compare(
            particle, first, tuple(lists), images.contiguous().flatten(1).numpy(), weight_BK.contiguous().numpy(),
            slices_U2K.contiguous().flatten(1).numpy(), step, kept, kept_ptr, each, score_N.numpy(),
        )  # fmt: skip
    return score_N
