"""`keep` and `posterior` on the GPU. Two passes over the samples; one wait, for the lengths of the lists.

Which entries of the lists of slices and shifts are used is marked in one bit each, 32 to a word: the slices of all particles,
each from a word of its own on, then the shifts. Counting bits tells the new number of every entry.
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
WORDS = 32  # of a step that lists entries
PARTS = 64  # at most so many programs share a particle
USUAL = 128, 32, 1024  # slices, shifts and samples of a particle that there is room for before they are counted
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
def _word(ptr, i, base):
    """First word of the list of particle i: lists share no word, so a particle may take one more than its entries fill."""
    return base + (tl.load(ptr + i) >> 5) + i


@triton.jit
def _rank(used, before, word_0, entry, mask):
    """How many used entries of a particle come before this one."""
    word = word_0 + (entry >> 5)
    lower = (1 << (entry & 31)) - 1
    return tl.load(before + word, mask=mask, other=0) + _bits(tl.load(used + word, mask=mask, other=0) & lower)


@triton.jit(do_not_specialize=["base", "n"])
def _count_kernel(used, before, slice_ptr, shift_ptr, base, size, n, STEP: tl.constexpr):
    """Used slices (program 0 of a particle) or shifts (1): how many before each word, and in all."""
    i, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ptr = slice_ptr if which == 0 else shift_ptr
    word_0 = _word(ptr, i, tl.where(which == 0, 0, base))
    words = tl.cdiv((tl.load(ptr + i + 1) - tl.load(ptr + i)).to(tl.int32), 32)
    total = 0
    for first in range(0, words, STEP):
        at = first + tl.arange(0, STEP)
        number = _bits(tl.load(used + word_0 + at, mask=at < words, other=0))
        tl.store(before + word_0 + at, total + tl.cumsum(number, 0) - number, mask=at < words)
        total += tl.sum(number, 0)
    tl.store(size + which * n + i, total)


@triton.jit(do_not_specialize=["n", "stride"])
def _pointer_kernel(size, ask, pointers, n, stride, STEP: tl.constexpr):
    """Pointers [n + 1] of slices, of shifts, of samples, and running sums of `ask`, `stride` apart."""
    length = n + 1
    slices, shifts = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    values, asked = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for first in range(0, length, STEP):
        at = first + tl.arange(0, STEP)
        inside = at < n
        a = tl.load(size + at, mask=inside, other=0).to(tl.int64)
        t = tl.load(size + n + at, mask=inside, other=0).to(tl.int64)
        q = tl.load(ask + at, mask=inside, other=0).to(tl.int64)
        v = a * t
        tl.store(pointers + at, slices + tl.cumsum(a, 0) - a, mask=at < length)
        tl.store(pointers + stride + at, shifts + tl.cumsum(t, 0) - t, mask=at < length)
        tl.store(pointers + 2 * stride + at, values + tl.cumsum(v, 0) - v, mask=at < length)
        tl.store(pointers + 3 * stride + at, asked + tl.cumsum(q, 0) - q, mask=at < length)
        slices += tl.sum(a, 0)
        shifts += tl.sum(t, 0)
        values += tl.sum(v, 0)
        asked += tl.sum(q, 0)


@triton.jit(do_not_specialize=["base", "stride", "slice_room", "shift_room"])
def _list_kernel(
    used, before, slice_ptr, shift_ptr, pointers, base, stride, slice_room, shift_room, slice_N, shift_M, entry, number,
    WORDS: tl.constexpr, NUMBERED: tl.constexpr,
):  # fmt: skip
    """Used entries of a particle, ascending, and what the lists hold there (themselves, if not NUMBERED): slices, then shifts, as
    many as there is room for."""
    i, which = tl.program_id(0).to(tl.int64), tl.program_id(1) % 2
    part, parts = tl.program_id(1) // 2, tl.num_programs(1) // 2
    ptr = slice_ptr if which == 0 else shift_ptr
    table = slice_N if which == 0 else shift_M
    word_0, entry_0 = _word(ptr, i, tl.where(which == 0, 0, base)), tl.load(ptr + i)
    words = tl.cdiv((tl.load(ptr + i + 1) - entry_0).to(tl.int32), 32)
    first_out = tl.load(pointers + which * stride + i)
    room, start = tl.where(which == 0, slice_room, shift_room), tl.where(which == 0, 0, slice_room)
    bit = tl.arange(0, 32)
    for first in range(part * WORDS, words, parts * WORDS):
        word = first + tl.arange(0, WORDS)
        value = tl.load(used + word_0 + word, mask=word < words, other=0)
        if tl.max((value != 0).to(tl.int32), 0) > 0:
            rank = tl.load(before + word_0 + word, mask=word < words, other=0)[:, None] + first_out
            rank += _bits(value[:, None] & ((1 << bit) - 1)[None, :])
            take = (((value[:, None] >> bit[None, :]) & 1) != 0) & (rank < room)
            of_particle = word[:, None] * 32 + bit[None, :]
            tl.store(entry + start + rank, entry_0 + of_particle, mask=take)
            if NUMBERED:
                of_particle = tl.load(table + entry_0 + of_particle, mask=take, other=0)
            tl.store(number + start + rank, of_particle, mask=take)


@triton.jit(do_not_specialize=["base", "stride", "room"])
def _samples_kernel(
    value, place, start_B, count_B, threshold_B, slice_ptr, shift_ptr, used, base, before, pointers, out, stride, room,
    STEP: tl.constexpr, PLACED: tl.constexpr, BY_SHIFT: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """Marks the entries of accepted samples (MARK), or writes the samples where they belong, if there is room."""
    i = tl.program_id(0).to(tl.int64)
    start = tl.load(start_B + i)
    count = (tl.load(count_B + i) if PLACED else tl.load(start_B + i + 1) - start).to(tl.int32)
    slices = (tl.load(slice_ptr + i + 1) - tl.load(slice_ptr + i)).to(tl.int32)
    shifts = (tl.load(shift_ptr + i + 1) - tl.load(shift_ptr + i)).to(tl.int32)
    slice_word, shift_word = _word(slice_ptr, i, 0), _word(shift_ptr, i, base)
    least = tl.load(threshold_B + i).to(tl.float32)
    new_value, new_shifts = start, shifts
    if not MARK:
        new_value = tl.load(pointers + 2 * stride + i)
        new_shifts = (tl.load(pointers + stride + i + 1) - tl.load(pointers + stride + i)).to(tl.int32)
    for first in range(tl.program_id(1) * STEP, count, tl.num_programs(1) * STEP):
        at = first + tl.arange(0, STEP)
        s = tl.load(value + start + at, mask=at < count, other=float("nan"))
        take = s >= least
        if tl.max(take.to(tl.int32), 0) > 0:
            where = at
            if PLACED:
                where = tl.load(place + start + at, mask=take, other=0)
            major = where // tl.maximum(slices if BY_SHIFT else shifts, 1)
            minor = where - major * (slices if BY_SHIFT else shifts)
            a = minor if BY_SHIFT else major
            t = major if BY_SHIFT else minor
            if MARK:
                tl.atomic_or(used + slice_word + (a >> 5), 1 << (a & 31), mask=take, sem="relaxed")
                tl.atomic_or(used + shift_word + (t >> 5), 1 << (t & 31), mask=take, sem="relaxed")
            else:
                row, column = _rank(used, before, slice_word, a, take), _rank(used, before, shift_word, t, take)
                to = new_value + row.to(tl.int64) * new_shifts + column
                tl.store(out + to, s, mask=take & (to < room))


@dataclass(frozen=True)
class Samples:
    """Log weights of the particles, from start_B on: all, up to the next one's; or count_B (int32) with their numbers in `place`.

    threshold_B: which are accepted (float64); numbers run slice by slice or (by_shift) shift by shift. parts: programs of each.
    """

    value: Tensor
    place: Tensor | None
    start_B: Tensor
    count_B: Tensor | None
    threshold_B: Tensor
    by_shift: bool
    parts: int


@dataclass(frozen=True)
class Lists:
    """What samples are of: pointers [B + 1] of slices and shifts, how many there are in all, and their lists (None: all particles
    have the same, numbered from 0)."""

    slice_ptr_B1: Tensor
    shift_ptr_B1: Tensor
    sizes: tuple[int, int]
    slice_N: Tensor | None
    shift_M: Tensor | None


@dataclass(frozen=True)
class Marks:
    """Used entries, a bit each: slices, then, from word `base` on, shifts. before: used ones before each word, of its particle;
    pointers: of `_pointer_kernel`."""

    used: Tensor
    before: Tensor
    base: int
    pointers: Tensor


def compact(samples: Samples, lists: Lists, ask_B: Tensor | None = None) -> tuple[Kept, int]:
    """(what README.md says, sum of `ask_B`). ask_B: numbers on the device whose sum comes with the lengths, in one wait.

    Everything is launched before the lengths are known, with room that nearly always does: the device works while the host waits.
    """
    device, n = samples.value.device, len(lists.slice_ptr_B1) - 1
    base = lists.sizes[0] // 32 + n + 1  # first word of the shifts
    used = torch.zeros(base + lists.sizes[1] // 32 + n + 1, dtype=torch.int32, device=device)
    size_2B = torch.empty(2, n, dtype=torch.int32, device=device)
    pointers = torch.empty(4, n + 1 + (n + 1) % 2, dtype=torch.int64, device=device)  # lists stay aligned to 16 bytes
    marks = Marks(used, torch.empty_like(used), base, pointers)
    if n:
        _pass(samples, lists, marks, None)
        _count_kernel[(n, 2)](
            used, marks.before, lists.slice_ptr_B1, lists.shift_ptr_B1, base, size_2B, n, STEP=STEP, num_warps=WARPS
        )
    asks = size_2B if ask_B is None else ask_B
    _pointer_kernel[(1,)](size_2B, asks, pointers, n, pointers.shape[1], STEP=STEP, num_warps=WARPS)
    rooms = [-(-n * each // 4) * 4 for each in USUAL]
    made = _written(samples, lists, marks, rooms)
    slices, shifts, values, asked = pointers[:, n].tolist()  # the only wait
    if any(length > room for length, room in zip((slices, shifts, values), rooms, strict=True)):
        rooms = [-(-slices // 4) * 4, shifts, values]
        made = _written(samples, lists, marks, rooms)
    (entry, number, out), first_shift = made, rooms[0]
    slice_ptr_B1, shift_ptr_B1, value_ptr_B1 = pointers[:3, : n + 1].unbind()
    slice_part, shift_part = slice(slices), slice(first_shift, first_shift + shifts)
    blocks = Blocks(slice_ptr_B1, number[slice_part], shift_ptr_B1, number[shift_part], value_ptr_B1, values)
    return Kept(blocks, out[:values], entry[slice_part], entry[shift_part]), asked


def _written(samples: Samples, lists: Lists, marks: Marks, rooms: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(used entries, their numbers: of slices, then of shifts from the end of their room on; values) as far as there is room."""
    n, device, (slice_room, shift_room, values) = len(lists.slice_ptr_B1) - 1, samples.value.device, rooms
    entry, number = (torch.empty(slice_room + shift_room, dtype=kind, device=device) for kind in (torch.int64, torch.int32))
    out = torch.full((values,), -math.inf, device=device)
    if n:
        numbered = lists.slice_N is not None
        tables = (lists.slice_N, lists.shift_M) if numbered else (number, number)
        _list_kernel[(n, 2 * min(PARTS, max(1, lists.sizes[0] // (n * 128 * WORDS))))](
            marks.used, marks.before, lists.slice_ptr_B1, lists.shift_ptr_B1, marks.pointers, marks.base, marks.pointers.shape[1],
            slice_room, shift_room, *tables, entry, number, WORDS=WORDS, NUMBERED=numbered, num_warps=WARPS,
        )  # fmt: skip
        _pass(samples, lists, marks, out)
    return entry, number, out


def _pass(samples: Samples, lists: Lists, marks: Marks, out: Tensor | None) -> None:
    """One pass over the samples: marking, or writing to `out`."""
    placed, value, pointers = samples.place is not None, samples.value, marks.pointers
    place, count_B = (samples.place, samples.count_B) if placed else (marks.used, marks.used)
    _samples_kernel[(len(lists.slice_ptr_B1) - 1, samples.parts)](
        value, place, samples.start_B, count_B, samples.threshold_B, lists.slice_ptr_B1, lists.shift_ptr_B1, marks.used,
        marks.base, marks.before, pointers, value if out is None else out, pointers.shape[1], 0 if out is None else len(out),
        STEP=STEP, PLACED=placed, BY_SHIFT=samples.by_shift, MARK=out is None, num_warps=WARPS,
    )  # fmt: skip


def parts_of(samples: int, particles: int) -> int:
    """How many programs share a particle: a power of two."""
    return min(PARTS, triton.next_power_of_2(max(1, samples // max(1, particles) // (4 * STEP))))


def keep_triton(log_weight_N: Tensor, blocks: Blocks, threshold_B: Tensor, by_shift: bool = False) -> Kept:
    """See README.md; float32 (TypeError for others)."""
    _check(log_weight_N)
    parts = parts_of(len(log_weight_N), blocks.particles)
    samples = Samples(log_weight_N.contiguous(), None, blocks.value_ptr_B1, None, threshold_B.double(), by_shift, parts)
    sizes = len(blocks.slice_N), len(blocks.shift_M)
    return compact(samples, Lists(blocks.slice_ptr_B1, blocks.shift_ptr_B1, sizes, blocks.slice_N, blocks.shift_M))[0]


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
