"""`collect` on the CPU: Numba, float32, the same result whatever the number of threads.

A task owns some slices and a run of coefficients, and goes through all particles in order: nobody else writes there, so
every number is summed in the order of the particles. The shifted images of a particle, which many of its slices use, stay
in the second-level cache. A particle's slices are ascending, so those that a task owns are found by bisection.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.positions import FASTMATH
from verglas.kernels.ragged import Lists, Weighted, with_weight

f, u = np.float32, np.uintp
RUN = 2048  # coefficients of a task: whole pages of the rows, while the images in use fit the second-level cache
TASKS_PER_THREAD = 8


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _add_four(p, image, images, row, begin, end, out):
    """out[row] += sum of four weights * images, for coefficients begin..end.

    Rows are addressed in the whole arrays: making a view of each would take as long as a short row.
    """
    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
    i0, i1, i2, i3 = u(image[0]), u(image[1]), u(image[2]), u(image[3])
    for k in range(begin, end):
        out[row, k] += p0 * images[i0, k] + p1 * images[i1, k] + p2 * images[i2, k] + p3 * images[i3, k]


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _add_one(p, image, images, row, begin, end, out):
    for k in range(begin, end):
        out[row, k] += p * images[image, k]


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _collect(slice_ptr, slice_N, weighted, bound, images, weight, data, total):
    ptr, image_S, weight_S, sum_N = weighted
    n_k = weight.shape[1]
    parts = len(bound) - 1
    for task in numba.prange(parts * ((n_k + RUN - 1) // RUN)):
        part, begin = task % parts, task // parts * RUN
        end = min(begin + RUN, n_k)
        p, image = np.empty(4, np.float32), np.empty(4, np.int32)
        for i in range(len(weight)):
            own = slice_N[slice_ptr[i] : slice_ptr[i + 1]]
            first = slice_ptr[i] + np.searchsorted(own, bound[part])
            last = slice_ptr[i] + np.searchsorted(own, bound[part + 1])
            for n in range(first, last):
                row = u(slice_N[n])
                for s in range(ptr[n], ptr[n + 1], 4):
                    for j in range(4):  # where fewer are left, the last one again with weight 0
                        image[j] = image_S[min(s + j, ptr[n + 1] - 1)]
                        p[j] = weight_S[s + j] if s + j < ptr[n + 1] else f(0)
                    _add_four(p, image, images, row, u(begin), u(end), data)
                    _add_four(p, image, images, row, u(begin + n_k), u(end + n_k), data)
                if ptr[n] < ptr[n + 1]:
                    _add_one(sum_N[n], u(i), weight, row, u(begin), u(end), total)


def collect_cpu(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, blocks: Blocks, data_U2K: Tensor, total_UK: Tensor
) -> None:
    """See README.md; float32 (TypeError for others), the accumulators contiguous (ValueError: they are written in place)."""
    for tensor in (images, weight_BK, data_U2K, total_UK):
        if tensor.dtype != torch.float32:
            raise TypeError(f"the compiled kernel collects float32 transforms, got {tensor.dtype}")
    if not (data_U2K.is_contiguous() and total_UK.is_contiguous()):
        raise ValueError("the sums are written in place and must be contiguous")
    images, blocks = blocks.with_rows(images)
    lists = Lists.of(blocks)
    if not _ascending(lists):
        raise ValueError("the slices of a particle must be ascending")
    weighted = with_weight(posterior_N, lists)
    n_runs = max(1, -(-weight_BK.shape[1] // RUN))
    parts = -(-TASKS_PER_THREAD * numba.get_num_threads() // n_runs) if numba.get_num_threads() > 1 else 1
    with numba.parallel_chunksize(1):
        _collect(
            lists.slice_ptr, lists.slice_N, tuple(weighted), _bounds(lists, weighted, len(data_U2K), parts),
            images.contiguous().flatten(1).numpy(), weight_BK.contiguous().numpy(),
            data_U2K.view(len(data_U2K), -1).numpy(), total_UK.numpy(),
        )  # fmt: skip


def _bounds(lists: Lists, weighted: Weighted, n_slices: int, parts: int) -> np.ndarray:
    """First slice of each part and the end: parts of about equal work, int32 [parts + 1]."""
    work_N = np.diff(weighted.ptr_N1)
    before_U = np.cumsum(np.bincount(lists.slice_N, work_N + (work_N > 0), minlength=n_slices))
    inner = np.searchsorted(before_U, before_U[-1] * np.arange(1, parts) / parts)
    return np.concatenate([[0], inner, [n_slices]]).astype(np.int32)


def _ascending(lists: Lists) -> bool:
    """Whether the slices of every particle are in ascending order."""
    falls = np.flatnonzero(lists.slice_N[1:] < lists.slice_N[:-1]) + 1
    return bool(np.isin(falls, lists.slice_ptr).all())
