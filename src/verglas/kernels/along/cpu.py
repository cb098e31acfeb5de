"""`along` on the CPU: Numba, one loop over pixels; sums in float64, in the order of the pixels whatever the threads."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.along import FLOOR, NoiseOfPixels


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _along(coefficients, counts, weight, step, offset, poisson, floor, out):
    degree = coefficients.shape[0] - 1
    for b in numba.prange(counts.shape[0]):
        loss_sum = first_sum = second_sum = 0.0
        for p in range(counts.shape[1]):
            now = np.float64(coefficients[degree, b, p])
            first = second = 0.0
            for d in range(degree - 1, -1, -1):
                second = second * step + 2.0 * first
                first = first * step + now
                now = now * step + coefficients[d, b, p]
            n = np.float64(counts[b, p])
            if poisson:
                now = max(now, floor)
                loss = now - n + (n * math.log(n / now) if n > 0 else 0.0)
                slope, bend = 1.0 - n / now, n / (now * now)
            else:
                root, wanted = math.sqrt(max(now + offset, floor)), math.sqrt(n + offset)
                loss = (root - wanted) * (root - wanted)
                slope, bend = 1.0 - wanted / root, wanted / (2.0 * root * root * root)
            loss_sum += weight[p] * loss
            first_sum += weight[p] * slope * first
            second_sum += weight[p] * (bend * first * first + slope * second)
        out[b, 0], out[b, 1], out[b, 2] = loss_sum, first_sum, second_sum


def along_cpu(coefficients_DBYX: Tensor, counts_BYX: Tensor, weight_YX: Tensor, step: float, noise: NoiseOfPixels) -> Tensor:
    """See README.md; float32 or float64 in, computed in float64."""
    out = np.empty((len(counts_BYX), 3))
    arrays = (coefficients_DBYX.flatten(2), counts_BYX.flatten(1), weight_YX.flatten())
    coefficients, counts, weight = (one.contiguous().numpy() for one in arrays)
    _along(coefficients, counts, weight, float(step), float(noise.offset), noise.poisson, FLOOR, out)
    return torch.from_numpy(out.sum(0))
