"""`shift` on the CPU: Numba, float32, one pass. The phases are the same for all images and made once, in float64."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.shift.reference import turn_planes

u = np.uintp
RUN = 1024  # coefficients at a time: the phases of 84 shifts of them (688 kB) stay in the second-level cache


# Every product is rounded (no fastmath): a process that compiles this function and one that finds it in Numba's cache may run
# two different copies of it, whose last digits differ if products and sums may be fused.
@numba.njit(cache=True, boundscheck=False)
def _turn(real, imaginary, cos, sin, real_out, imaginary_out):
    for k in range(u(len(real))):
        real_out[k] = real[k] * cos[k] - imaginary[k] * sin[k]
        imaginary_out[k] = real[k] * sin[k] + imaginary[k] * cos[k]


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _shift(image, cos, sin, out):
    n_k = image.shape[2]
    for i in numba.prange(len(image)):
        for begin in range(0, n_k, RUN):
            end = min(begin + RUN, n_k)
            for t in range(len(cos)):
                _turn(image[i, 0, begin:end], image[i, 1, begin:end], cos[t, begin:end], sin[t, begin:end],
                      out[i, t, 0, begin:end], out[i, t, 1, begin:end])  # fmt: skip


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _shift_listed(image, cos, sin, ptr, shift, out):
    n_k = image.shape[2]
    for i in numba.prange(len(image)):
        for begin in range(0, n_k, RUN):
            end = min(begin + RUN, n_k)
            for m in range(ptr[i], ptr[i + 1]):
                t = u(shift[m])
                _turn(image[i, 0, begin:end], image[i, 1, begin:end], cos[t, begin:end], sin[t, begin:end],
                      out[m, 0, begin:end], out[m, 1, begin:end])  # fmt: skip


def shift_cpu(
    image_B2K: Tensor, shift_T2: Tensor, x_K: Tensor, y_K: Tensor, box: int, out_dtype: torch.dtype = torch.float32,
    lists: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """See README.md; float32 in and out (TypeError for others: this kernel computes in single precision)."""
    for dtype in (image_B2K.dtype, out_dtype):
        if dtype != torch.float32:
            raise TypeError(f"the compiled kernel shifts float32 transforms, got {dtype}")
    cos_TK, sin_TK = (part.float().contiguous().numpy() for part in turn_planes(shift_T2, x_K, y_K, box))
    image = image_B2K.contiguous().numpy()
    if lists is not None:
        out_M2K = torch.from_numpy(np.empty((len(lists.shift_M), 2, len(x_K)), np.float32))
        _shift_listed(image, cos_TK, sin_TK, lists.shift_ptr_B1.numpy(), lists.shift_M.numpy(), out_M2K.numpy())
        return out_M2K
    out_BT2K = torch.from_numpy(np.empty((len(image_B2K), len(cos_TK), 2, len(x_K)), np.float32))
    _shift(image, cos_TK, sin_TK, out_BT2K.numpy())
    return out_BT2K
