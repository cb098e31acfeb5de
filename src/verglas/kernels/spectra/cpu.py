"""`spectra` on the CPU: Numba, a particle per task, float32.

For each slice that has weight, the weighted sum of the shifted images is made for a run of coefficients, multiplied with
the slice and added to one number per coefficient; the shells are summed once per particle.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.collect.cpu import add_images
from verglas.kernels.positions import FASTMATH
from verglas.kernels.ragged import Lists, with_weight

f, u = np.float32, np.uintp
RUN = 512  # coefficients summed at a time


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _add_products(image, reference, total, cross, power):
    """cross += image * reference, power += total * reference^2, coefficient by coefficient."""
    for k in range(u(len(cross))):
        cross[k] += image[k] * reference[k]
        power[k] += total * reference[k] * reference[k]


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _spectra(slice_ptr, slice_N, weighted, shifted, weight, table, shell_K, cross_BS, power_BS):
    ptr, image_S, weight_S, sum_N = weighted
    n_k, n_shells = weight.shape[1], cross_BS.shape[1]
    for i in numba.prange(len(weight)):
        cross, power, image = np.zeros(n_k, np.float32), np.zeros(n_k, np.float32), np.empty(RUN, np.float32)
        for begin in range(0, n_k, RUN):
            end = min(begin + RUN, n_k)
            own = image[: end - begin]
            for n in range(slice_ptr[i], slice_ptr[i + 1]):
                if ptr[n] == ptr[n + 1]:
                    continue
                for plane in range(0, 2 * n_k, n_k):
                    own[:] = f(0)
                    add_images(weight_S[ptr[n] : ptr[n + 1]], image_S[ptr[n] : ptr[n + 1]], shifted[i],
                               begin + plane, end + plane, own)  # fmt: skip
                    reference = table[u(slice_N[n]), begin + plane : end + plane]
                    _add_products(own, reference, sum_N[n], cross[begin:end], power[begin:end])
        cross_BS[i], power_BS[i] = f(0), f(0)
        for k in range(n_k):
            if shell_K[k] < n_shells:
                cross_BS[i, shell_K[k]] += cross[k]
                power_BS[i, shell_K[k]] += weight[i, k] * power[k]


def spectra_cpu(
    posterior_N: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See README.md; float32 (TypeError for others: this kernel computes in single precision)."""
    for tensor in (shifted_BT2K, weight_BK, slices_U2K):
        if tensor.dtype != torch.float32:
            raise TypeError(f"the compiled kernel sums float32 transforms, got {tensor.dtype}")
    lists = Lists.of(blocks)
    cross_BS, power_BS = (torch.from_numpy(np.empty((len(weight_BK), n_shells), np.float32)) for _ in range(2))
    with numba.parallel_chunksize(1):
        _spectra(
            lists.slice_ptr, lists.slice_N, tuple(with_weight(posterior_N, lists)),
            shifted_BT2K.contiguous().flatten(2).numpy(), weight_BK.contiguous().numpy(),
            slices_U2K.contiguous().flatten(1).numpy(), shell_K.long().contiguous().numpy(), cross_BS.numpy(), power_BS.numpy(),
        )  # fmt: skip
    return cross_BS, power_BS
