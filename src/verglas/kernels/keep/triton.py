"""`keep` and `posterior` on the GPU. Two passes over the samples; one wait, for the lengths of the lists.

Which entries of the lists of slices and shifts are used is marked in one bit each, 32 to a word: slices first, then, from a
word of their own on, shifts. Counting bits tells the new number of every entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.keep.reference import Kept

STEP, WARPS = 1024, 4  # samples of a step
WORDS = 32  # of a program that lists entries
PARTS = 64  # at most so many programs share a particle
SLICES, SHIFTS = 32, 32  # of a step of `posterior`


@triton.jit
def _bits(word):
    """Number of bits set."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _rank(used, before, entry, mask):
    """How many used entries come before this one."""
    word = entry >> 5
    lower = (1 << (entry & 31).to(tl.int32)) - 1
    return tl.load(before + word, mask=mask, other=0) + _bits(tl.load(used + word, mask=mask, other=0) & lower)


@triton.jit
def _count_kernel(used, number, words, STEP: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, STEP)
    tl.store(number + at, _bits(tl.load(used + at, mask=at < words, other=0)).to(tl.int64), mask=at < words)


@triton.jit
def _pointer_kernel(used, before, slice_ptr, shift_ptr, new_slice_ptr, new_shift_ptr, shift_entry, length, STEP: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, STEP)
    mask = at < length
    first = tl.load(before + (shift_entry >> 5))
    tl.store(new_slice_ptr + at, _rank(used, before, tl.load(slice_ptr + at, mask=mask, other=0), mask), mask=mask)
    entry = tl.load(shift_ptr + at, mask=mask, other=0) + shift_entry
    tl.store(new_shift_ptr + at, _rank(used, before, entry, mask) - first, mask=mask)


@triton.jit
def _list_kernel(used, before, out, shift_entry, words, WORDS: tl.constexpr):
    """Used entries, ascending: of slices, then of shifts, both counted from 0."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    value = tl.load(used + word, mask=word < words, other=0)[:, None]
    rank = tl.load(before + word, mask=word < words, other=0)[:, None] + _bits(value & ((1 << bit) - 1)[None, :])
    entry = word.to(tl.int64)[:, None] * 32 + bit[None, :]
    entry = tl.where(entry < shift_entry, entry, entry - shift_entry)
    tl.store(out + rank, entry, mask=((value >> bit[None, :]) & 1) != 0)


@triton.jit
def _samples_kernel(
    value, place, start_B, count_B, threshold_B, slice_ptr, shift_ptr, used, shift_entry,
    before, new_slice_ptr, new_shift_ptr, new_value_ptr, out,
    STEP: tl.constexpr, PLACED: tl.constexpr, BY_SHIFT: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """Marks the entries of accepted samples (MARK), or writes the samples where they belong."""
    i = tl.program_id(0).to(tl.int64)
    start, count = tl.load(start_B + i), tl.load(count_B + i).to(tl.int32)
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    n, m = (tl.load(slice_ptr + i + 1) - slice_0).to(tl.int32), (tl.load(shift_ptr + i + 1) - shift_0).to(tl.int32)
    least = tl.load(threshold_B + i).to(tl.float32)
    new_slice, new_shift, new_value, new_m = slice_0, shift_0, start, m
    if not MARK:
        new_slice, new_shift = tl.load(new_slice_ptr + i), tl.load(new_shift_ptr + i)
        new_value, new_m = tl.load(new_value_ptr + i), (tl.load(new_shift_ptr + i + 1) - new_shift).to(tl.int32)
    for first in range(tl.program_id(1) * STEP, count, tl.num_programs(1) * STEP):
        at = first + tl.arange(0, STEP)
        s = tl.load(value + start + at, mask=at < count, other=float("nan"))
        take = s >= least
        if tl.max(take.to(tl.int32), 0) > 0:
            where = at
            if PLACED:
                where = tl.load(place + start + at, mask=take, other=0)
            major = where // tl.maximum(n if BY_SHIFT else m, 1)
            minor = where - major * (n if BY_SHIFT else m)
            a = slice_0 + (minor if BY_SHIFT else major)
            t = shift_0 + (major if BY_SHIFT else minor) + shift_entry
            if MARK:
                tl.atomic_or(used + (a >> 5), 1 << (a & 31).to(tl.int32), mask=take, sem="relaxed")
                tl.atomic_or(used + (t >> 5), 1 << (t & 31).to(tl.int32), mask=take, sem="relaxed")
            else:
                base = tl.load(before + (shift_entry >> 5))
                row, column = _rank(used, before, a, take) - new_slice, _rank(used, before, t, take) - base - new_shift
                tl.store(out + new_value + row * new_m + column, s, mask=take)


@dataclass(frozen=True)
class Samples:
    """Log weights of each particle: count_B of them from start_B on. place: their numbers, if they are not in order.

    threshold_B: which are accepted (float64); numbers run slice by slice or (by_shift) shift by shift. parts: programs of each.
    """

    value: Tensor
    place: Tensor | None
    start_B: Tensor
    count_B: Tensor
    threshold_B: Tensor
    by_shift: bool
    parts: int


def compact(samples: Samples, slice_ptr_B1: Tensor, shift_ptr_B1: Tensor, sizes: tuple[int, int], ask: Tensor) -> tuple[
    tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor, int
]:  # fmt: skip
    """((new slice, shift and value pointers), used slice entries, used shift entries, values, `ask`), as in README.md.

    sizes: (slice entries, shift entries) of the lists; ask: a number on the device that comes with the lengths, in one wait.
    """
    device, n = samples.value.device, len(slice_ptr_B1) - 1
    shift_entry = -(-sizes[0] // 32) * 32
    words = shift_entry // 32 + -(-sizes[1] // 32) + 1  # one more, so that the end of the lists has a word
    used = torch.zeros(words, dtype=torch.int32, device=device)
    number = torch.empty(words, dtype=torch.int64, device=device)
    pointers = torch.empty(2, n + 1, dtype=torch.int64, device=device)
    _pass(samples, slice_ptr_B1, shift_ptr_B1, used, shift_entry, None, None)
    _count_kernel[(triton.cdiv(words, STEP),)](used, number, words, STEP=STEP, num_warps=WARPS)
    before = number.cumsum(0) - number
    grid = (triton.cdiv(n + 1, STEP),)
    _pointer_kernel[grid](
        used, before, slice_ptr_B1, shift_ptr_B1, pointers[0], pointers[1], shift_entry, n + 1, STEP=STEP, num_warps=WARPS
    )
    value_ptr = torch.nn.functional.pad((pointers[0].diff() * pointers[1].diff()).cumsum(0), (1, 0))
    ends = torch.stack([pointers[0, -1], pointers[1, -1], value_ptr[-1], ask.long()])
    slices, shifts, values, asked = ends.tolist()  # the only wait
    entries = torch.empty(slices + shifts, dtype=torch.int64, device=device)
    _list_kernel[(triton.cdiv(words, WORDS),)](used, before, entries, shift_entry, words, WORDS=WORDS, num_warps=WARPS)
    out = torch.full((values,), -math.inf, device=device)
    lists = (pointers[0], pointers[1], value_ptr)
    _pass(samples, slice_ptr_B1, shift_ptr_B1, used, shift_entry, (before, *lists), out)
    return lists, entries[:slices], entries[slices:], out, asked


def _pass(
    samples: Samples, slice_ptr_B1: Tensor, shift_ptr_B1: Tensor, used: Tensor, shift_entry: int,
    lists: tuple[Tensor, ...] | None, out: Tensor | None,
) -> None:  # fmt: skip
    """One pass over the samples: marking, or (with lists) writing to `out`."""
    nothing = (used,) * 4 if lists is None else lists
    if len(samples.start_B):
        _samples_kernel[(len(samples.start_B), samples.parts)](
            samples.value, samples.value if samples.place is None else samples.place, samples.start_B, samples.count_B,
            samples.threshold_B, slice_ptr_B1, shift_ptr_B1, used, shift_entry, *nothing, samples.value if out is None else out,
            STEP=STEP, PLACED=samples.place is not None, BY_SHIFT=samples.by_shift, MARK=lists is None, num_warps=WARPS,
        )  # fmt: skip


def parts_of(samples: int, particles: int) -> int:
    """How many programs share a particle: a power of two."""
    return min(PARTS, triton.next_power_of_2(max(1, samples // max(1, particles) // (4 * STEP))))


def keep_triton(log_weight_N: Tensor, blocks: Blocks, threshold_B: Tensor, by_shift: bool = False) -> Kept:
    """See README.md; float32 (TypeError for others)."""
    _check(log_weight_N)
    value_N, starts = log_weight_N.contiguous(), blocks.value_ptr_B1
    parts = parts_of(len(value_N), blocks.particles)
    samples = Samples(value_N, None, starts[:-1], starts.diff(), threshold_B.double(), by_shift, parts)
    sizes = len(blocks.slice_N), len(blocks.shift_M)
    lists, slice_at, shift_at, kept_N, _ = compact(samples, blocks.slice_ptr_B1, blocks.shift_ptr_B1, sizes, starts[-1])
    new = Blocks(lists[0], blocks.slice_N[slice_at], lists[1], blocks.shift_M[shift_at], lists[2])
    return Kept(new, kept_N, slice_at, shift_at)


@triton.jit
def _posterior_kernel(
    value, slice_ptr, shift_ptr, value_ptr, log_sum_B, weight, by_slice, by_shift, entropy,
    SLICES: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    n, m = (tl.load(slice_ptr + i + 1) - slice_0).to(tl.int32), (tl.load(shift_ptr + i + 1) - shift_0).to(tl.int32)
    log_sum, start = tl.load(log_sum_B + i), tl.load(value_ptr + i)
    total = tl.zeros([SLICES], tl.float64)
    for begin in range(0, m, SHIFTS):
        t = begin + tl.arange(0, SHIFTS)
        of_shift = tl.zeros([SHIFTS], tl.float64)
        for first in range(tl.program_id(1) * SLICES, n, tl.num_programs(1) * SLICES):
            a = first + tl.arange(0, SLICES)
            mask = (a < n)[:, None] & (t < m)[None, :]
            at = start + a.to(tl.int64)[:, None] * m + t[None, :]
            log_p = tl.load(value + at, mask=mask, other=-float("inf")).to(tl.float64) - log_sum
            p = tl.where(log_p > -float("inf"), tl.exp(log_p), 0.0)
            tl.store(weight + at, p.to(tl.float32), mask=mask)
            of_shift += tl.sum(p, 0)
            total -= tl.sum(tl.where(p > 0, p * log_p, 0.0), 1)
            tl.atomic_add(by_slice + slice_0 + a, tl.sum(p, 1), mask=a < n, sem="relaxed")
        tl.atomic_add(by_shift + shift_0 + t, of_shift, mask=t < m, sem="relaxed")
    tl.atomic_add(entropy + i, tl.sum(total, 0), sem="relaxed")


def posterior_triton(value_N: Tensor, blocks: Blocks, log_sum_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See README.md; float32 values (TypeError for others)."""
    _check(value_N)
    weight_N, n = torch.empty_like(value_N), blocks.particles
    sizes = (len(blocks.slice_N), len(blocks.shift_M), n)
    by_slice, by_shift, entropy_B = torch.zeros(sum(sizes), dtype=torch.float64, device=value_N.device).split(sizes)
    if n:
        parts = min(PARTS, max(1, len(blocks.slice_N) // n // SLICES))
        _posterior_kernel[(n, parts)](
            value_N.contiguous(), blocks.slice_ptr_B1, blocks.shift_ptr_B1, blocks.value_ptr_B1, log_sum_B.double(),
            weight_N, by_slice, by_shift, entropy_B, SLICES=SLICES, SHIFTS=SHIFTS, num_warps=WARPS,
        )  # fmt: skip
    return weight_N, by_slice, by_shift, entropy_B


def _check(value_N: Tensor) -> None:
    if value_N.dtype != torch.float32:
        raise TypeError(f"the Triton kernels read float32 log weights, got {value_N.dtype}")
