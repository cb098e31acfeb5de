"""`significant` on the CPU: Numba, a particle per task, sums in float64.

One pass puts the weights into narrow bins of their logarithm; the bin in which the sum crosses the fraction is then
sorted, and nothing else. Samples more than 60 below the largest are left out: a billion of them hold less than
1e-17 of the sum, which float64 does not show.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.positions import FASTMATH
from verglas.kernels.significant.reference import Significance

DEPTH = 60.0  # natural logarithm
BINS = 4096
PER_UNIT = BINS / DEPTH
RUN = 256  # samples at a time
HALVING, PER_HALVING = math.log(2), 1 / math.log(2)
POWERS = 0.5 ** np.arange(DEPTH * PER_HALVING + 2)


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _largest(run):
    """(largest, position of the first that large); NaN if any is. No position: len(run)."""
    largest, undefined = run.dtype.type(-np.inf), False
    for value in run:
        largest = value if value > largest else largest
        undefined |= value != value
    if undefined:
        return run.dtype.type(np.nan), len(run)
    for n in range(len(run)):
        if run[n] == largest:
            return largest, n
    return largest, len(run)


@numba.njit(fastmath=FASTMATH, cache=True, boundscheck=False)
def _exponentials(run, largest, below, halvings, mantissa):
    """Distances from the largest (DEPTH at most) and exp(-distance) = mantissa / 2^halvings; no branches: it vectorises."""
    for n in range(np.uintp(len(run))):
        d = min(largest - np.float64(run[n]), DEPTH)
        h = np.floor(d * PER_HALVING + 0.5)
        r = h * HALVING - d  # |r| < 0.35: the series is good to 1e-17
        low = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720))))))
        high = 1 / 5040 + r * (1 / 40320 + r * (1 / 362880 + r * (1 / 3628800 + r * (1 / 39916800 + r * (1 / 479001600)))))
        r3 = r * r * r
        below[n], halvings[n], mantissa[n] = d, np.int32(h), low + r3 * r3 * r * high


@numba.njit(cache=True, boundscheck=False)
def _fill_bins(run, largest, sum_C, count_C):
    """Sum and number of the weights exp(run - largest), by distance from the largest."""
    below, halvings, mantissa = np.empty(RUN), np.empty(RUN, np.int32), np.empty(RUN)
    for begin in range(0, len(run), RUN):
        part = run[begin : begin + RUN]
        _exponentials(part, largest, below, halvings, mantissa)
        for n in range(np.uintp(len(part))):
            if below[n] < DEPTH:
                c = np.uintp(below[n] * PER_UNIT)
                sum_C[c] += mantissa[n] * POWERS[np.uintp(halvings[n])]
                count_C[c] += 1


@numba.njit(cache=True, boundscheck=False)
def _cross(run, largest, sum_C, count_C, target):
    """(threshold, how many reach it): from the top down, the value with which the sum exceeds the target."""
    crossing = np.flatnonzero(count_C)[-1]  # where rounding keeps the sum from the target: everything
    before, above = 0.0, 0
    for c in range(crossing):
        if before + sum_C[c] > target:
            crossing = c
            break
        before, above = before + sum_C[c], above + count_C[c]
    value_N, n = np.empty(count_C[crossing]), 0
    for value in run:
        below = largest - np.float64(value)
        if below < DEPTH and np.uintp(below * PER_UNIT) == np.uintp(crossing):
            value_N[n] = value
            n += 1
    value_N = np.sort(value_N)[::-1]
    for n in range(len(value_N)):
        before += math.exp(value_N[n] - largest)
        if before > target:
            break
    while n + 1 < len(value_N) and value_N[n + 1] == value_N[n]:
        n += 1
    return value_N[n], above + n + 1


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _significant(log_weight, ptr, fraction, max_B, log_sum_B, best_B, threshold_B, count_B):
    for i in numba.prange(len(max_B)):
        run = log_weight[ptr[i] : ptr[i + 1]]
        largest, best = _largest(run)
        max_B[i] = log_sum_B[i] = largest
        best_B[i] = ptr[i] + best if best < len(run) else len(log_weight)
        threshold_B[i], count_B[i] = np.inf, (run == np.inf).sum()
        if np.isfinite(largest):
            sum_C, count_C = np.zeros(BINS), np.zeros(BINS, np.int64)
            _fill_bins(run, np.float64(largest), sum_C, count_C)
            total = sum_C.sum()
            log_sum_B[i] = np.float64(largest) + math.log(total)
            threshold_B[i], count_B[i] = _cross(run, np.float64(largest), sum_C, count_C, fraction * total)


def significant_cpu(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float) -> Significance:
    """See README.md; float32 or float64 in, floats in float64 and positions in int64 out."""
    n = len(ptr_B1) - 1
    max_B, log_sum_B, threshold_B = (np.empty(n) for _ in range(3))
    best_B, count_B = np.empty(n, np.int64), np.empty(n, np.int64)
    with numba.parallel_chunksize(1):
        _significant(
            log_weight_N.contiguous().numpy(), ptr_B1.contiguous().numpy(), float(fraction),
            max_B, log_sum_B, best_B, threshold_B, count_B,
        )  # fmt: skip
    return Significance(*(torch.from_numpy(array) for array in (max_B, log_sum_B, best_B, threshold_B, count_B)))
