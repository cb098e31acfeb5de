"""Polynomials in the length t of a step, as lists of coefficient arrays: [a, b, c] is a + b t + c t^2.

Whatever a step x + t dx changes is a polynomial in t, and so are their products, the waves, and the intensities. A list of one
array is a value that does not depend on t: the plain prediction is the case of no step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Polynomial = list[Tensor]


def times(a: Sequence[Tensor], b: Sequence[Tensor]) -> Polynomial:
    """The product; arrays are multiplied element by element."""
    out: list[Tensor | None] = [None] * (len(a) + len(b) - 1)
    for i, factor in enumerate(a):
        for j, other in enumerate(b):
            before = out[i + j]
            out[i + j] = factor * other if before is None else before.addcmul_(factor, other)
    return [one for one in out if one is not None]


def plus(a: Sequence[Tensor], b: Sequence[Tensor]) -> Polynomial:
    """The sum of two polynomials of any degrees."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return [one + shorter[i] if i < len(shorter) else one for i, one in enumerate(longer)]


def power(wave: Sequence[Tensor], over: tuple[int, ...]) -> Polynomial:
    """|wave|^2, real, summed over the axes `over`; twice the degree.

    Of two coefficients: |A|^2 + 2 Re(A* B) t + |B|^2 t^2.
    """
    planes = [torch.view_as_real(one) for one in wave]
    out: list[Tensor | None] = [None] * (2 * len(wave) - 1)
    axes = (*over, -1)
    for i, first in enumerate(planes):
        for j in range(i, len(planes)):
            term = (first * planes[j]).sum(axes) * (1 if i == j else 2)
            before = out[i + j]
            out[i + j] = term if before is None else before + term
    return [one for one in out if one is not None]


def value(coefficients: Sequence[Tensor], step: float) -> Tensor:
    """The polynomial at t = step (Horner)."""
    total = coefficients[-1]
    for one in reversed(coefficients[:-1]):
        total = total * step + one
    return total
