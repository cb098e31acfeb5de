"""`spectra` on the CPU: Numba, a particle per task, float32.

Each slice that has weight is multiplied with the weighted sum of the shifted images and added to one number per
coefficient, a run of coefficients at a time; the shells are summed once per particle.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.positions import FASTMATH
from verglas.kernels.ragged import Lists, with_weight

f, u = np.float32, np.uintp
RUN = 1024  # coefficients summed at a time


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _add_four(p, image, images, row, table, total, begin, end, cross, power):
    """cross += slice * sum of four weights * images, power += total * |slice|^2, for coefficients begin..end.

    Rows are addressed in the whole arrays: making a view of each would take as long as a short row.
    """
    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
    i0, i1, i2, i3 = u(image[0]), u(image[1]), u(image[2]), u(image[3])
    n_k = u(len(cross))
    for k in range(begin, end):
        n = k + n_k
        real, imaginary = table[row, k], table[row, n]
        image_real = p0 * images[i0, k] + p1 * images[i1, k] + p2 * images[i2, k] + p3 * images[i3, k]
        image_imaginary = p0 * images[i0, n] + p1 * images[i1, n] + p2 * images[i2, n] + p3 * images[i3, n]
        cross[k] += real * image_real + imaginary * image_imaginary
        power[k] += total * (real * real + imaginary * imaginary)


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _spectra(slice_ptr, slice_N, weighted, images, weight, table, shell_K, cross_BS, power_BS):
    ptr, image_S, weight_S, sum_N = weighted
    n_k, n_shells = weight.shape[1], cross_BS.shape[1]
    for i in numba.prange(len(weight)):
        cross, power = np.zeros(n_k, np.float32), np.zeros(n_k, np.float32)
        p, image = np.empty(4, np.float32), np.empty(4, np.int32)
        for begin in range(0, n_k, RUN):
            end = min(begin + RUN, n_k)
            for n in range(slice_ptr[i], slice_ptr[i + 1]):
                total = sum_N[n]
                for s in range(ptr[n], ptr[n + 1], 4):
                    for j in range(4):  # where fewer are left, the last one again with weight 0
                        image[j] = image_S[min(s + j, ptr[n + 1] - 1)]
                        p[j] = weight_S[s + j] if s + j < ptr[n + 1] else f(0)
                    _add_four(p, image, images, u(slice_N[n]), table, total, u(begin), u(end), cross, power)
                    total = f(0)  # the power of a slice counts once
        cross_S, power_S = np.zeros(n_shells), np.zeros(n_shells)  # hundreds of terms of one sign: float64
        for k in range(n_k):
            if shell_K[k] < n_shells:
                cross_S[shell_K[k]] += np.float64(cross[k])
                power_S[shell_K[k]] += np.float64(weight[i, k]) * np.float64(power[k])
        for s in range(n_shells):
            cross_BS[i, s], power_BS[i, s] = f(cross_S[s]), f(power_S[s])


def spectra_cpu(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See README.md; float32 (TypeError for others: this kernel computes in single precision)."""
    for tensor in (images, weight_BK, slices_U2K):
        if tensor.dtype != torch.float32:
            raise TypeError(f"the compiled kernel sums float32 transforms, got {tensor.dtype}")
    images, blocks = blocks.with_rows(images)
    lists = Lists.of(blocks)
    cross_BS, power_BS = (torch.from_numpy(np.empty((len(weight_BK), n_shells), np.float32)) for _ in range(2))
    with numba.parallel_chunksize(1):
        _spectra(
            lists.slice_ptr, lists.slice_N, tuple(with_weight(posterior_N, lists)),
            images.contiguous().flatten(1).numpy(), weight_BK.contiguous().numpy(),
            slices_U2K.contiguous().flatten(1).numpy(), shell_K.long().contiguous().numpy(), cross_BS.numpy(), power_BS.numpy(),
        )  # fmt: skip
    return cross_BS, power_BS
