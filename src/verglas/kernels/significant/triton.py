"""`significant` on the GPU: two passes over the samples, then one over the few candidates; nothing is sorted, nothing waits.

A sample below (1 - fraction) sum / n cannot be significant, so once the sum of a run is known only what lies above is listed,
in no order. The threshold is then found by bisection over the bits of a float, some twenty sums over the candidates.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.significant.reference import Significance

STEP, WARPS = 1024, 4  # samples of a step
PARTS = 64  # at most so many programs share a run
MARGIN = 1e-3  # of the bound of candidates: far above what rounding may do to it


@triton.jit
def _of_parts(top_BP, sum_BP, i, PARTS: tl.constexpr):
    """(largest, sum of exponentials relative to it in float64) of a run from those of its parts; NaN if any is."""
    p = tl.arange(0, PARTS)
    top_P, sum_P = tl.load(top_BP + i * PARTS + p), tl.load(sum_BP + i * PARTS + p)
    top = tl.max(top_P, 0)
    top = tl.where(tl.max((top_P != top_P).to(tl.int32), 0) > 0, float("nan"), top)
    total = tl.sum(sum_P * tl.exp((top_P - tl.where(top > -float("inf"), top, 0.0)).to(tl.float64)), 0)
    return top, total


@triton.jit(do_not_specialize=["length"])
def _sum_kernel(log_weight, ptr, top_BP, sum_BP, count, best, length, STEP: tl.constexpr):
    """Largest value and sum of each part of a run; and what the next kernel counts from."""
    i, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    start = tl.load(ptr + i)
    n = (tl.load(ptr + i + 1) - start).to(tl.int32)
    if part == 0:
        tl.store(count + i, 0)
        tl.store(best + i, length)
    top, total, undefined = -float("inf"), tl.full([], 0.0, tl.float64), 0
    for first in range(part * STEP, n, parts * STEP):
        at = first + tl.arange(0, STEP)
        value = tl.load(log_weight + start + at, mask=at < n, other=-float("inf"))
        undefined |= tl.max((value != value).to(tl.int32), 0)
        larger = tl.maximum(top, tl.max(value, 0))
        base = tl.where(larger > -float("inf"), larger, 0.0)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(value - base).to(tl.float64), 0)
        top = larger
    tl.store(top_BP + i * parts + part, tl.where(undefined > 0, float("nan"), top))
    tl.store(sum_BP + i * parts + part, total)


@triton.jit
def _list_kernel(
    log_weight, ptr, top_BP, sum_BP, candidate, count, best, top_B, total_B, log_rest, STEP: tl.constexpr, PARTS: tl.constexpr
):
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(ptr + i)
    n = (tl.load(ptr + i + 1) - start).to(tl.int32)
    top, total = _of_parts(top_BP, sum_BP, i, PARTS)
    if part == 0:
        tl.store(top_B + i, top)
        tl.store(total_B + i, total)
    usable = (top > -float("inf")) & (top < float("inf"))
    least = tl.where(usable, top + tl.log(total).to(tl.float32) + log_rest - tl.log(n.to(tl.float32)), float("inf"))
    for first in range(part * STEP, n, PARTS * STEP):
        at = first + tl.arange(0, STEP)
        value = tl.load(log_weight + start + at, mask=at < n, other=float("nan"))
        position = tl.min(tl.where(value == top, at, n), 0)
        if position < n:
            tl.atomic_min(best + i, start + position, sem="relaxed")
        one = (value >= least).to(tl.int32)
        found = tl.sum(one, 0)
        if found > 0:
            entry = tl.atomic_add(count + i, found, sem="relaxed") + tl.cumsum(one, 0) - one
            tl.store(candidate + start + entry, value, mask=value >= least)


@triton.jit
def _ordered(value):
    """Integers in the order of floats."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _unordered(number):
    bits = number.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bisect(candidate, c, low, high, top, target, STEP: tl.constexpr):
    """Largest number between low and high - 1 such that the weights from it on exceed the target; low if none does."""
    while high - low > 1:
        middle = low + (high - low) // 2
        least = _unordered(middle)
        total = tl.full([], 0.0, tl.float64)
        for first in range(0, c, STEP):
            at = first + tl.arange(0, STEP)
            value = tl.load(candidate + at, mask=at < c, other=-float("inf"))
            total += tl.sum(tl.where(value >= least, tl.exp(value - top), 0.0).to(tl.float64), 0)
        enough = total > target
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low


@triton.jit
def settle(candidate, place, c, samples, top, total, rest, log_rest, STEP: tl.constexpr, PLACED: tl.constexpr):
    """(kept candidates, log_sum, threshold, accepted samples) of a run from its c candidates, which may hold more than needed:
    they (and places) are closed up to those kept. rest: share of the mass that may be left out."""
    usable = (top > -float("inf")) & (top < float("inf"))
    log_sum = tl.where(usable, top.to(tl.float64) + tl.log(total), top.to(tl.float64))
    least = tl.where(usable, log_sum.to(tl.float32) + log_rest - tl.log(samples.to(tl.float32)), float("inf"))
    kept = 0
    for first in range(0, c, STEP):
        at = first + tl.arange(0, STEP)
        value = tl.load(candidate + at, mask=at < c, other=float("nan"))
        one = (value >= least).to(tl.int32)
        to = kept + tl.cumsum(one, 0) - one
        if PLACED:
            where = tl.load(place + at, mask=at < c, other=0)
            tl.debug_barrier()  # what is overwritten has been read
            tl.store(place + to, where, mask=value >= least)
        tl.debug_barrier()
        tl.store(candidate + to, value, mask=value >= least)
        kept += tl.sum(one, 0)
    tl.debug_barrier()
    threshold, accepted = tl.full([], float("inf"), tl.float32), kept
    if usable & (kept > 0):
        target = total - total * rest
        low = _bisect(candidate, kept, _ordered(least), _ordered(top) + 1, top, target, STEP)
        from_here = _unordered(low)
        accepted = 0
        for first in range(0, kept, STEP):
            at = first + tl.arange(0, STEP)
            value = tl.load(candidate + at, mask=at < kept, other=float("nan"))
            take = value >= from_here
            threshold = tl.minimum(threshold, tl.min(tl.where(take, value, float("inf")), 0))
            accepted += tl.sum(take.to(tl.int32), 0)
    return kept, log_sum, threshold, accepted


@triton.jit
def _threshold_kernel(
    candidate, ptr, count_B, top_B, total_B, rest, log_rest, max_B, log_sum_B, threshold_B, accepted_B, STEP: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    start = tl.load(ptr + i)
    samples, c = tl.load(ptr + i + 1) - start, tl.load(count_B + i)
    top, total = tl.load(top_B + i), tl.load(total_B + i)
    candidate += start
    _, log_sum, threshold, accepted = settle(candidate, candidate, c, samples, top, total, rest, log_rest, STEP, False)
    tl.store(max_B + i, top.to(tl.float64))
    tl.store(log_sum_B + i, log_sum)
    tl.store(threshold_B + i, threshold.to(tl.float64))
    tl.store(accepted_B + i, accepted)


def log_rest(fraction: float) -> float:
    """Log of the share of the mass that may be left out, less a margin for rounding."""
    return math.log1p(-fraction) - MARGIN


def parts_of(samples: int, runs: int) -> int:
    """How many programs share a run: a power of two."""
    return min(PARTS, triton.next_power_of_2(max(1, samples // max(1, runs) // (4 * STEP))))


def significant_triton(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float) -> Significance:
    """See README.md; float32 in (TypeError for others), floats in float64 and positions in int64 out."""
    if log_weight_N.dtype != torch.float32:
        raise TypeError(f"the Triton kernel reads float32 log weights, got {log_weight_N.dtype}")
    log_weight, n, device = log_weight_N.contiguous(), len(ptr_B1) - 1, log_weight_N.device
    parts = parts_of(len(log_weight), n)
    top_BP = torch.empty(n, parts, device=device)
    sum_BP = torch.empty(n, parts, dtype=torch.float64, device=device)
    candidate, top_B = torch.empty_like(log_weight), torch.empty(n, device=device)
    count_B = torch.empty(n, dtype=torch.int32, device=device)
    total_B, max_B, log_sum_B, threshold_B = (torch.empty(n, dtype=torch.float64, device=device) for _ in range(4))
    best_B, accepted_B = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(2))
    if n:
        _sum_kernel[(n, parts)](
            log_weight, ptr_B1, top_BP, sum_BP, count_B, best_B, len(log_weight), STEP=STEP, num_warps=WARPS
        )
        _list_kernel[(n, parts)](
            log_weight, ptr_B1, top_BP, sum_BP, candidate, count_B, best_B, top_B, total_B, log_rest(fraction),
            STEP=STEP, PARTS=parts, num_warps=WARPS,
        )  # fmt: skip
        _threshold_kernel[(n,)](
            candidate, ptr_B1, count_B, top_B, total_B, 1 - fraction, log_rest(fraction), max_B, log_sum_B, threshold_B,
            accepted_B, STEP=STEP, num_warps=WARPS,
        )  # fmt: skip
    return Significance(max_B, log_sum_B, best_B, threshold_B, accepted_B)
