"""`dose`, `descend`, `follow` and `best_lengths` on the CPU: Numba, one walk over the arrays."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from verglas.kernels.descend.reference import best_lengths_reference


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _dose(power, corner, scale, out):
    """A thread owns rows of `out`."""
    for y in numba.prange(len(out)):
        out[y] = 0
        for b in range(len(corner)):
            row, first = y - corner[b, 0], corner[b, 1]
            if 0 <= row < len(power):
                for x in range(power.shape[1]):
                    out[y, first + x] += scale[b] * power[row, x]


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _descend(value, gradient, curvature, most, damping, length, least, into_value):
    for y in numba.prange(gradient.shape[1]):
        for plane in range(gradient.shape[0]):
            for x in range(gradient.shape[2]):
                bottom = max(2 * (1 - damping) * curvature[y, x] + 2 * damping * most, least)
                step = gradient[plane, y, x] * (-length / bottom)
                if into_value:
                    value[plane, y, x] += step
                    gradient[plane, y, x] = 0
                else:
                    gradient[plane, y, x] = step


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _follow(value, step, factor):
    for y in numba.prange(value.shape[1]):
        for plane in range(value.shape[0]):
            for x in range(value.shape[2]):
                value[plane, y, x] += step[plane, y, x] * factor
                step[plane, y, x] = 0


def dose_cpu(light_MYX: Tensor, corner_B2: Tensor, scale_B: Tensor, into_YX: Tensor) -> Tensor:
    """See README.md; `into` contiguous."""
    power = light_MYX.abs().square().sum(0).numpy()
    _dose(power, corner_B2.contiguous().numpy(), scale_B.contiguous().numpy(), into_YX.numpy())
    return into_YX.amax()


def descend_cpu(
    value_PYX: Tensor | None, gradient_PYX: Tensor, curvature_YX: Tensor, most: Tensor, damping: float, length: float
) -> None:
    """See README.md; contiguous."""
    gradient, curvature = gradient_PYX.numpy(), curvature_YX.numpy()
    value = gradient if value_PYX is None else value_PYX.numpy()
    real = curvature.dtype.type
    numbers = (real(float(most)), real(damping), real(length), np.finfo(real).tiny)
    _descend(value, gradient, curvature, *numbers, value_PYX is not None)


def follow_cpu(value_PYX: Tensor, step_PYX: Tensor, factor: Tensor) -> None:
    """See README.md; contiguous."""
    _follow(value_PYX.numpy(), step_PYX.numpy(), value_PYX.real.numpy().dtype.type(float(factor)))


def best_lengths_cpu(product_B5: Tensor) -> Tensor:
    """See README.md: few numbers, the definition serves."""
    return best_lengths_reference(product_B5)
