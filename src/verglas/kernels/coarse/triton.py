"""`coarse` on the GPU: scores are made once to know the largest of each part of a row, and of those parts that matter again.

A part is a row (particle and shift) in a group of GRAIN orientations. Two ways to the largest scores, whichever is faster
(`fuses`): a product that keeps its scores in registers (product.cu, Hopper), or the library's product into memory and one pass
over it. Parts that come near the particle's largest score are multiplied again and their scores listed; sums, threshold and
lists come from these. One wait, for the lengths of the lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.coarse import hopper
from verglas.kernels.coarse.operands import Operands
from verglas.kernels.coarse.reference import Orientations
from verglas.kernels.keep.reference import Kept
from verglas.kernels.keep.triton import Lists, Samples, compact, parts_of
from verglas.kernels.significant.reference import Significance
from verglas.kernels.significant.triton import log_rest, settle

FUSED_LENGTH = 16384  # longest rows that take the fused product (benchmarks/gpu_coarse.py times both ways)
LOWEST = tl.constexpr(-0x7F800001)  # -infinity as an ordered integer
LARGEST_WEIGHT = 2.0**10  # of a weight in its unit: half precision holds it
GROUP = 16  # tiles of rows of the fused product that share slices in the cache
GRAIN = 64  # orientations of a part; product.cu knows it
SCAN_COLUMNS, SCAN_WARPS, SCAN_STAGES = 2048, 8, 3  # of a program that reads scores
SCANNED = 24  # particles whose scores are in memory at a time: they pass through the cache
LEFT_OUT = 10.0  # parts are left out that, were all samples so large, would hold exp(-LEFT_OUT) of the sum
ROUNDING = 1.0  # largest difference of a score made twice, with much to spare
CAPACITY = 512  # listed parts of a particle; where there are more, they are listed again with lists of counted length
STEP = 1024  # weights of a step
FIND_ROWS = 4096  # of a program that looks for parts and makes their scores again, AGAIN_ROWS at a time
AGAIN_ROWS, AGAIN_STEP, AGAIN_WARPS, AGAIN_STAGES = 16, 64, 4, 4
SETTLE_STEP, SETTLE_WARPS = 2048, 8  # samples of a step


@dataclass(frozen=True)
class Parts:
    """Listed parts: count_B of each particle (int32), in lists with room for room_B (int32) from start_B (int64) on.

    value, place: [parts, GRAIN], score and number (shift O + orientation) of each sample. best_B: largest score of each particle,
    as an ordered integer.
    """

    best_B: Tensor
    count_B: Tensor
    start_B: Tensor
    room_B: Tensor
    value: Tensor
    place: Tensor


@triton.jit
def _ordered(value):
    """Integers in the order of floats; what is no number comes last."""
    bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(number):
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(weight, scale, k, n_pixels):
    """Weights in the scale of the powers; 0 where they are no numbers."""
    value = tl.load(weight + k, mask=k < n_pixels, other=0.0) * tl.load(scale + k, mask=k < n_pixels, other=0.0)
    return tl.where(value < float("inf"), value, 0.0)


@triton.jit(do_not_specialize=["n_pixels", "shifts"])
def _weight_kernel(
    weight, scale, mean, log_offset, halves, scale_B, offset_R, best_score_B, count_B, n_pixels, shifts,
    LARGEST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Weights of one particle as high, high and low halves in units of a power of two; the constant of its bias. What others
    count from, too."""
    b = tl.program_id(0).to(tl.int64)
    tl.store(best_score_B + b, LOWEST)
    tl.store(count_B + b, 0)
    weight += b * n_pixels
    halves += b * 3 * n_pixels
    constant, largest = tl.full([], 0.0, tl.float64), 0.0
    for first in range(0, n_pixels, STEP):
        k = first + tl.arange(0, STEP)
        value = tl.load(weight + k, mask=k < n_pixels, other=0.0).to(tl.float64)
        constant += tl.sum(value * tl.load(mean + k, mask=k < n_pixels, other=0.0).to(tl.float64), 0)
        largest = tl.maximum(largest, tl.max(_scaled(weight, scale, k, n_pixels), 0))
    unit = tl.exp2(tl.maximum(tl.ceil(tl.log2(largest / LARGEST)), -100.0))
    tl.store(scale_B + b, -0.5 * unit)
    for first in range(0, n_pixels, STEP):
        k = first + tl.arange(0, STEP)
        value = _scaled(weight, scale, k, n_pixels) / unit
        high = value.to(tl.float16)
        tl.store(halves + k, high, mask=k < n_pixels)
        tl.store(halves + n_pixels + k, high, mask=k < n_pixels)
        tl.store(halves + 2 * n_pixels + k, (value - high.to(tl.float32)).to(tl.float16), mask=k < n_pixels)
    for first in range(0, shifts, STEP):
        t = first + tl.arange(0, STEP)
        offset = tl.load(log_offset + b * shifts + t, mask=t < shifts, other=0.0) + (-0.5 * constant).to(tl.float32)
        tl.store(offset_R + b * shifts + t, offset, mask=t < shifts)


@triton.jit(do_not_specialize=["first_b", "n_rows", "n_slices", "n_groups", "n_shifts", "stride"])
def _scan_kernel(
    cross, norm, prior, scale_B, offset_R, top, best_score_B, first_b, n_rows, n_slices, n_groups, n_shifts, stride,
    COLUMNS: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """Largest scores of COLUMNS orientations of one particle, shift by shift; cross: [*, T, O], from particle `first_b` on."""
    here, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    b = first_b + here
    o = tile * COLUMNS + tl.arange(0, COLUMNS)
    g = tile * (COLUMNS // GRAIN) + tl.arange(0, COLUMNS // GRAIN)
    inside = o < n_slices
    bias = tl.load(norm + b * stride + o, mask=inside, other=0.0) * tl.load(scale_B + b)
    bias += tl.load(prior + o, mask=inside, other=-float("inf"))
    for t in range(0, n_shifts):
        s = tl.load(cross + (here * n_shifts + t) * n_slices + o, mask=inside, other=0.0) + bias
        s = tl.reshape(s, [COLUMNS // GRAIN, GRAIN])
        undefined = tl.max((s != s).to(tl.int32), 1) > 0
        largest = tl.where(undefined, float("nan"), tl.max(s, 1)) + tl.load(offset_R + b * n_shifts + t)
        tl.store(top + g.to(tl.int64) * n_rows + b * n_shifts + t, largest, mask=g < n_groups)
        tl.atomic_max(best_score_B + b, tl.max(tl.where(g < n_groups, _ordered(largest), LOWEST), 0), sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "n_slices", "n_shifts", "length", "stride"])
def _again_kernel(
    images, slices, norm, prior, scale_B, offset_R, top, best_score_B, start_B, room_B, count_B, found_row, found_part,
    value, place, n_rows, n_slices, n_shifts, length, stride, depth,
    GRAIN: tl.constexpr, FIND: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One group of orientations and FIND rows: parts within `depth` of their particle's largest score are listed, their scores
    made again, ROWS at a time."""
    if ALIGNED:
        length = tl.multiple_of(length, 8)
    g = tl.program_id(0)
    r = tl.program_id(1) * FIND + tl.arange(0, FIND)
    b = r // n_shifts
    best = _unordered(tl.load(best_score_B + b, mask=r < n_rows, other=LOWEST))
    least = tl.where((best > -float("inf")) & (best < float("inf")), best - depth, float("nan"))
    line = g.to(tl.int64) * n_rows
    near = tl.load(top + line + r, mask=r < n_rows, other=float("nan")) >= least
    part = tl.atomic_add(count_B + b, 1, mask=near, sem="relaxed")
    take = near & (part < tl.load(room_B + b, mask=near, other=0))
    one = take.to(tl.int32)
    found = tl.sum(one, 0)
    if found > 0:
        to = tl.program_id(1) * FIND + tl.cumsum(one, 0) - one
        tl.store(found_row + line + to, r, mask=take)
        tl.store(found_part + line + to, part + tl.load(start_B + b, mask=take, other=0).to(tl.int32), mask=take)
        tl.debug_barrier()
        o = g * GRAIN + tl.arange(0, GRAIN)
        slice_at = slices + o.to(tl.int64)[None, :] * length
        prior_o = tl.load(prior + o)
        for begin in range(0, found, ROWS):
            entry = begin + tl.arange(0, ROWS)
            inside = entry < found
            row = tl.load(found_row + line + tl.program_id(1) * FIND + entry, mask=inside, other=0)
            to_part = tl.load(found_part + line + tl.program_id(1) * FIND + entry, mask=inside, other=0)
            image_at = images + row.to(tl.int64)[:, None] * length
            score = tl.zeros([ROWS, GRAIN], tl.float32)
            for start in range(0, length, STEP):
                k = start + tl.arange(0, STEP)
                image = tl.load(image_at + k[None, :], mask=inside[:, None] & (k < length)[None, :], other=0.0)
                slice_ = tl.load(slice_at + k[:, None], mask=(o < n_slices)[None, :] & (k < length)[:, None], other=0.0)
                score = tl.dot(image, slice_, score)
            particle = row // n_shifts
            bias = tl.load(norm + particle.to(tl.int64)[:, None] * stride + o[None, :]) * tl.load(scale_B + particle)[:, None]
            score += bias + prior_o[None, :] + tl.load(offset_R + row)[:, None]
            at = to_part.to(tl.int64)[:, None] * GRAIN + tl.arange(0, GRAIN)[None, :]
            tl.store(value + at, score, mask=inside[:, None])
            where = (row - particle * n_shifts)[:, None] * n_slices + o[None, :]
            tl.store(place + at, where, mask=inside[:, None])


@triton.jit(do_not_specialize=["n_particles", "samples"])
def _settle_kernel(
    value, place, start_B, count_B, room_B, best_score_B, n_particles, samples, rest, log_rest,
    kept_B, first_B, max_B, log_sum_B, threshold_B, best_B, accepted_B, missing_B, GRAIN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What `significant` says of one particle, from its listed parts; samples that may be significant are closed up."""
    b = tl.program_id(0).to(tl.int64)
    first_value = tl.load(start_B + b) * GRAIN
    listed, top = tl.load(count_B + b), _unordered(tl.load(best_score_B + b))
    missing = listed > tl.load(room_B + b)
    tl.store(missing_B + b, missing.to(tl.int32))
    c = tl.where(missing, 0, listed * GRAIN)
    value += first_value
    place += first_value
    if c > 0:
        top = -float("inf")
        for first in range(0, c, STEP):
            at = first + tl.arange(0, STEP)
            top = tl.maximum(top, tl.max(tl.load(value + at, mask=at < c, other=-float("inf")), 0))
    total, best = tl.full([], 0.0, tl.float64), 0x7FFFFFFF
    for first in range(0, c, STEP):
        at = first + tl.arange(0, STEP)
        s = tl.load(value + at, mask=at < c, other=-float("inf"))
        total += tl.sum(tl.exp(s - top).to(tl.float64), 0)
        where = tl.load(place + at, mask=at < c, other=0)
        best = tl.minimum(best, tl.min(tl.where((s == top) & (at < c), where, 0x7FFFFFFF), 0))
    kept, log_sum, threshold, accepted = settle(value, place, c, samples, top, total, rest, log_rest, STEP, True)
    run = b * samples
    nothing = tl.where(top == -float("inf"), run, n_particles * samples)
    tl.store(best_B + b, tl.where(best < 0x7FFFFFFF, run + best, nothing))
    tl.store(kept_B + b, kept)
    tl.store(first_B + b, first_value)
    tl.store(max_B + b, top.to(tl.float64))
    tl.store(log_sum_B + b, log_sum)
    tl.store(threshold_B + b, threshold.to(tl.float64))
    tl.store(accepted_B + b, accepted)


def operands_of(
    images_BTL: Tensor, weight_BK: Tensor, log_offset_BT: Tensor, orientations: Orientations
) -> tuple[Operands, Tensor, Tensor]:
    """(operands; the lowest ordered integer and 0 for each particle, int32). One small kernel and one product of the library."""
    (particles, shifts, _), device, power = images_BTL.shape, images_BTL.device, orientations.power
    n_pixels = len(power.scale_K)
    halves = torch.empty(particles, 3 * n_pixels, dtype=torch.float16, device=device)
    scale_B, offset_R = torch.empty(particles, device=device), torch.empty(particles * shifts, device=device)
    best_B, count_B = (torch.empty(particles, dtype=torch.int32, device=device) for _ in range(2))
    if particles:
        _weight_kernel[(particles,)](
            weight_BK.float().contiguous(), power.scale_K, power.mean_K, log_offset_BT.float().contiguous(), halves, scale_B,
            offset_R, best_B, count_B, n_pixels, shifts, LARGEST=LARGEST_WEIGHT, STEP=STEP,
        )  # fmt: skip
    norm_BO = product(halves, power.halves)  # low times low is left out: 2^-22 of the largest
    images_RL, slices_OL = images_BTL.contiguous().flatten(0, 1), orientations.slices_OL.contiguous()
    return Operands(images_RL, slices_OL, shifts, norm_BO, scale_B, orientations.padded_prior, offset_R), best_B, count_B


@lru_cache(maxsize=32)
def multiples(count: int, each: int, device: torch.device) -> Tensor:
    """0, each, 2 each, ... (int64); nobody changes them."""
    return torch.arange(count, device=device) * each


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T [M, N] of float16 with float32 sums."""
    if a_MK.device.type == "cuda":
        return torch.mm(a_MK, b_NK.T, out_dtype=torch.float32)
    return a_MK.float() @ b_NK.float().T  # for Triton's interpreter


def fuses(images_BTL: Tensor) -> bool:
    """Whether such images take the fused product (measured: benchmarks/gpu_coarse.py)."""
    return images_BTL.shape[2] <= FUSED_LENGTH and hopper.can_fuse(images_BTL)


def tops(operands: Operands, best_B: Tensor, fused: bool) -> Tensor:
    """Largest score of each row in each group of GRAIN orientations, [G, R] float32; raises best_B to those of particles."""
    (rows, _), count, shifts = operands.images_RL.shape, len(operands.slices_OL), operands.shifts
    groups = triton.cdiv(count, GRAIN)
    top_GR = torch.empty(groups, rows, device=operands.images_RL.device)
    if fused:
        hopper.fused_tops(operands, top_GR, best_B, GROUP)
        return top_GR
    for first in range(0, rows // shifts, SCANNED):
        cross_RO = product(operands.images_RL[first * shifts : (first + SCANNED) * shifts], operands.slices_OL)
        _scan_kernel[(triton.cdiv(count, SCAN_COLUMNS), len(cross_RO) // shifts)](
            cross_RO, operands.norm_BO, operands.prior_O, operands.scale_B, operands.offset_R, top_GR, best_B, first, rows, count,
            groups, shifts, operands.norm_BO.shape[1], COLUMNS=SCAN_COLUMNS, GRAIN=GRAIN, num_warps=SCAN_WARPS,
            num_stages=SCAN_STAGES,
        )  # fmt: skip
    return top_GR


def coarse_triton(
    images_BTL: Tensor, weight_BK: Tensor, log_offset_BT: Tensor, orientations: Orientations, fraction: float
) -> tuple[Kept, Significance]:
    """See README.md; images and slices in float16 (TypeError for others)."""
    if images_BTL.dtype != torch.float16 or orientations.slices_OL.dtype != torch.float16:
        raise TypeError(f"the Triton kernels multiply float16, got {images_BTL.dtype} and {orientations.slices_OL.dtype}")
    operands, best_B, count_B = operands_of(images_BTL, weight_BK, log_offset_BT, orientations)
    top_GR, device = tops(operands, best_B, fuses(images_BTL)), images_BTL.device
    particles, groups, shifts, count = len(images_BTL), len(top_GR), operands.shifts, len(operands.slices_OL)
    depth = ROUNDING + math.log(count * shifts) + max(-log_rest(fraction), LEFT_OUT)
    each = min(CAPACITY, groups * shifts)
    room = particles * each
    start_B, room_B = multiples(particles, each, device), torch.full_like(count_B, each)
    while True:
        value, place = torch.empty(room, GRAIN, device=device), torch.empty(room, GRAIN, dtype=torch.int32, device=device)
        parts = Parts(best_B, count_B, start_B, room_B, value, place)
        score_again(operands, top_GR, parts, depth)
        kept, found, missing = reduce_parts(parts, (count, shifts), fraction)
        if not missing:
            return kept, found
        start_B, room_B, room = count_B.long().cumsum(0) - count_B, count_B.clone(), int(count_B.sum())
        count_B.zero_()


def score_again(operands: Operands, top_GR: Tensor, parts: Parts, depth: float) -> None:
    """Fill the lists with the scores of parts within `depth` of the largest."""
    (groups, rows), length = top_GR.shape, operands.images_RL.shape[1]
    found_row, found_part = (torch.empty_like(top_GR, dtype=torch.int32) for _ in range(2))
    _again_kernel[(groups, triton.cdiv(rows, FIND_ROWS))](
        operands.images_RL, operands.slices_OL, operands.norm_BO, operands.prior_O, operands.scale_B, operands.offset_R, top_GR,
        parts.best_B, parts.start_B, parts.room_B, parts.count_B, found_row, found_part, parts.value, parts.place, rows,
        len(operands.slices_OL), operands.shifts, length, operands.norm_BO.shape[1], depth, GRAIN=GRAIN, FIND=FIND_ROWS,
        ROWS=AGAIN_ROWS, STEP=AGAIN_STEP, ALIGNED=length % 8 == 0, num_warps=AGAIN_WARPS, num_stages=AGAIN_STAGES,
    )  # fmt: skip


def reduce_parts(parts: Parts, sizes: tuple[int, int], fraction: float) -> tuple[Kept, Significance, int]:
    """(samples, significance, number of particles whose lists were too short: nothing is right then). sizes: slices, shifts."""
    (count, shifts), particles, device = sizes, len(parts.best_B), parts.best_B.device
    kept_B, missing_B = (torch.empty(particles, dtype=torch.int32, device=device) for _ in range(2))
    first_B, best_B, accepted_B = (torch.empty(particles, dtype=torch.int64, device=device) for _ in range(3))
    max_B, log_sum_B, threshold_B = (torch.empty(particles, dtype=torch.float64, device=device) for _ in range(3))
    if particles:
        _settle_kernel[(particles,)](
            parts.value, parts.place, parts.start_B, parts.count_B, parts.room_B, parts.best_B, particles, count * shifts,
            1 - fraction, log_rest(fraction), kept_B, first_B, max_B, log_sum_B, threshold_B, best_B, accepted_B, missing_B,
            GRAIN=GRAIN, STEP=SETTLE_STEP, num_warps=SETTLE_WARPS,
        )  # fmt: skip
    samples = Samples(parts.value, parts.place, first_B, kept_B, threshold_B, True, parts_of(CAPACITY * GRAIN, 1))
    ptr = multiples(particles + 1, count, device), multiples(particles + 1, shifts, device)
    kept, missing = compact(samples, Lists(*ptr, (particles * count, particles * shifts), None, None), missing_B)
    return kept, Significance(max_B, log_sum_B, best_B, threshold_B, accepted_B), missing
