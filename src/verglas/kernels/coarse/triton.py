"""`coarse` on the GPU: scores are reduced as they are made, to candidates and sums; all that follows works on candidates.

Two ways to the scores, whichever is faster (`fuses`): a product that keeps them in registers (product.cu, Hopper), or the
library's product into memory and one pass over it. A sample below (1 - fraction) sum / samples is never significant;
`bound` holds, for each particle, the log of the largest sum over a part of a row so far, which is no more than the whole. It only
rises: who reads an old one lists more than needed, nothing is lost. One wait, for the lengths of the lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.coarse import hopper
from verglas.kernels.coarse.reference import Orientations, split_halves
from verglas.kernels.keep.reference import Kept
from verglas.kernels.keep.triton import Samples, compact, parts_of
from verglas.kernels.significant.reference import Significance
from verglas.kernels.significant.triton import MARGIN, log_rest, thresholds

FUSED_LENGTH = 16384  # longest rows that take the fused product: 81 % of the library's rate at 12,854, benchmarks/NOTES.md
GROUP = 16  # tiles of rows of the fused product that share slices in the cache
SCAN_COLUMNS, SCAN_WARPS, SCAN_STAGES = 2048, 8, 3  # of a program that reads scores
SCANNED = 24  # particles whose scores are in memory at a time: they pass through the cache
DEPTH = 30.0  # a part of a row that nowhere comes so near the sum is left out of it: 1e6 such samples hold 1e-7 of it
CAPACITY = 2**15  # candidates of a particle; where there are more, everything is done again with lists of counted length
LARGEST_WEIGHT = 2.0**10  # of a weight in its unit: half precision holds it


@dataclass(frozen=True)
class Candidates:
    """Samples that may be significant, in lists of room_B from start_B on (int64, int32), count_B of them (more than fit: again).

    value: log weight; place: shift O + orientation; bound_B: below the log of the particle's sum; top, sum: [tiles, B T], of
    the rows of each tile of orientations, largest log weight and sum of exponentials relative to it.
    """

    start_B: Tensor
    room_B: Tensor
    count_B: Tensor
    value: Tensor
    place: Tensor
    bound_B: Tensor
    top: Tensor
    sum: Tensor


@triton.jit(do_not_specialize=["first_b", "n_particles", "n_slices", "n_shifts"])
def _scan_kernel(
    cross, bias, offset_R, bound, count, start_B, room_B, value, place, row_top, row_sum,
    first_b, n_particles, n_slices, n_shifts, stride, depth, share, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program takes COLUMNS orientations of one particle, shift by shift; cross: [*, T, O], from particle `first_b` on."""
    here, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    b = first_b + here
    o = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = o < n_slices
    of_particle = tl.load(bias + b * stride + o, mask=inside, other=-float("inf"))
    start, room = tl.load(start_B + b), tl.load(room_B + b)
    # What other programs may be writing is read by atomics alone: these give all threads of this one the same number, where a
    # load may not, and threads that then disagree about a branch destroy each other's work.
    known = tl.atomic_max(bound + b, -float("inf"), sem="relaxed")
    row_0 = tile.to(tl.int64) * n_particles * n_shifts + b * n_shifts
    for t in range(0, n_shifts):
        s = tl.load(cross + (here * n_shifts + t) * n_slices + o, mask=inside, other=0.0) + of_particle
        offset = tl.load(offset_R + b * n_shifts + t)
        largest = tl.max(s, 0)
        top = largest + offset
        total = 0.0
        if not (top <= known - depth):  # NaN is near
            total = tl.sum(tl.exp(s - tl.where(largest > -float("inf"), largest, 0.0)), 0)
            log_sum = top + tl.log(total)
            if log_sum > known:
                known = tl.maximum(log_sum, tl.atomic_max(bound + b, log_sum, sem="relaxed"))
            if top >= known + share:
                take = s >= known + share - offset
                one = take.to(tl.int32)
                entry = tl.atomic_add(count + b, tl.sum(one, 0), sem="relaxed") + tl.cumsum(one, 0) - one
                fits = take & (entry < room)
                tl.store(value + start + entry, s + offset, mask=fits)
                tl.store(place + start + entry, t * n_slices + o, mask=fits)
        tl.store(row_top + row_0 + t, top)
        tl.store(row_sum + row_0 + t, total)


@triton.jit(do_not_specialize=["n_rows", "n_shifts", "entries"])
def _finish_kernel(row_top, row_sum, top_B, total_B, n_rows, n_shifts, entries, STEP: tl.constexpr):
    """Largest value and sum of a particle from those of its rows in all tiles; NaN if any row has no number."""
    b = tl.program_id(0).to(tl.int64)
    top, undefined = -float("inf"), 0
    for first in range(0, entries, STEP):
        e = first + tl.arange(0, STEP)
        at = (e // n_shifts).to(tl.int64) * n_rows + b * n_shifts + e % n_shifts
        value = tl.load(row_top + at, mask=e < entries, other=-float("inf"))
        undefined |= tl.max((value != value).to(tl.int32), 0)
        top = tl.maximum(top, tl.max(value, 0))
    base = tl.where(top > -float("inf"), top, 0.0)
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, entries, STEP):
        e = first + tl.arange(0, STEP)
        at = (e // n_shifts).to(tl.int64) * n_rows + b * n_shifts + e % n_shifts
        value = tl.load(row_top + at, mask=e < entries, other=-float("inf"))
        part = tl.load(row_sum + at, mask=e < entries, other=0.0)
        total += tl.sum((tl.where(part > 0, part, 0.0) * tl.exp(value - base)).to(tl.float64), 0)
    tl.store(top_B + b, tl.where(undefined > 0, float("nan"), top))
    tl.store(total_B + b, total)


@triton.jit
def _best_kernel(value, place, start_B, count_B, top_B, best_B, STEP: tl.constexpr):
    """Smallest place of the largest candidate; unchanged if none is that large."""
    b = tl.program_id(0).to(tl.int64)
    start, count, top = tl.load(start_B + b), tl.load(count_B + b), tl.load(top_B + b)
    best = tl.load(best_B + b)
    for first in range(0, count, STEP):
        at = first + tl.arange(0, STEP)
        s = tl.load(value + start + at, mask=at < count, other=float("nan"))
        where = tl.load(place + start + at, mask=at < count, other=0)
        best = tl.minimum(best, tl.min(tl.where(s == top, where, 0x7FFFFFFF), 0))
    tl.store(best_B + b, best)


def biases(weight_BK: Tensor, orientations: Orientations) -> tuple[Tensor, Tensor]:
    """(log prior - 1/2 norm of each particle and slice, float32 [B, O'], but for a constant of each particle; that constant [B]).

    Columns O' > O are -inf. Weights that are no numbers make the constant none.
    """
    power, weight = orientations.power, weight_BK.float()
    constant_B = -0.5 * (weight.double() @ power.mean_K.double())
    scaled_BK = torch.nan_to_num(weight * power.scale_K)
    unit_B1 = torch.exp2(torch.ceil(torch.log2(scaled_BK.amax(1, keepdim=True) / LARGEST_WEIGHT)).clamp_min(-100))
    high, low = split_halves(scaled_BK / unit_B1)
    norm_BO = product(torch.cat([high, high, low], 1), power.halves)  # low times low is left out: 2^-22 of the largest
    missing = len(power.halves) - power.count
    prior = torch.nn.functional.pad(orientations.log_prior_O.float(), (0, missing), value=-math.inf)
    return torch.addcmul(prior, norm_BO, -0.5 * unit_B1, out=norm_BO), constant_B.float()


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T [M, N] of float16 with float32 sums."""
    if a_MK.device.type == "cuda":
        return torch.mm(a_MK, b_NK.T, out_dtype=torch.float32)
    return a_MK.float() @ b_NK.float().T  # for Triton's interpreter


def empty_lists(room_B: Tensor, room: int, rows: int, tiles: int, bound_B: Tensor) -> Candidates:
    """Lists of these lengths, `room` in all."""
    device = room_B.device
    start_B = room_B.long().cumsum(0) - room_B
    top, total = torch.empty(2, tiles, rows, device=device).unbind()
    value, place = torch.empty(room, device=device), torch.empty(room, dtype=torch.int32, device=device)
    return Candidates(start_B, room_B.int(), torch.zeros_like(room_B, dtype=torch.int32), value, place, bound_B, top, total)


def fuses(images_BTL: Tensor) -> bool:
    """Whether such images take the fused product (measured: benchmarks/gpu_coarse.py)."""
    return images_BTL.shape[2] <= FUSED_LENGTH and hopper.can_fuse(images_BTL)


def fill(
    images_BTL: Tensor, log_offset_R: Tensor, slices_OL: Tensor, bias_BO: Tensor, lists: Candidates, share: float
) -> None:
    """Fill the lists. share: log of what a candidate must at least hold of the sum."""
    out = (
        log_offset_R, lists.bound_B, lists.count_B, lists.start_B, lists.room_B, lists.value, lists.place, lists.top, lists.sum
    )  # fmt: skip
    if fuses(images_BTL):
        hopper.fused_product(images_BTL, slices_OL, bias_BO, out, GROUP, (DEPTH, share))
        return
    (particles, shifts, _), count = images_BTL.shape, len(slices_OL)
    for first in range(0, particles, SCANNED):
        cross_RO = product(images_BTL[first : first + SCANNED].flatten(0, 1), slices_OL)
        _scan_kernel[(triton.cdiv(count, SCAN_COLUMNS), len(cross_RO) // shifts)](
            cross_RO, bias_BO, *out, first, particles, count, shifts, bias_BO.shape[1], DEPTH, share,
            COLUMNS=SCAN_COLUMNS, num_warps=SCAN_WARPS, num_stages=SCAN_STAGES,
        )  # fmt: skip


def coarse_triton(
    images_BTL: Tensor, weight_BK: Tensor, log_offset_BT: Tensor, orientations: Orientations, fraction: float
) -> tuple[Kept, Significance]:
    """See README.md; images and slices in float16 (TypeError for others)."""
    if images_BTL.dtype != torch.float16 or orientations.slices_OL.dtype != torch.float16:
        raise TypeError(f"the Triton kernels multiply float16, got {images_BTL.dtype} and {orientations.slices_OL.dtype}")
    images, slices_OL = images_BTL.contiguous(), orientations.slices_OL.contiguous()
    (particles, shifts, _), count, device = images.shape, len(slices_OL), images.device
    bias_BO, constant_B = biases(weight_BK, orientations)
    log_offset_R = (log_offset_BT.float() + constant_B[:, None]).flatten()
    tiles = triton.cdiv(count, hopper.COLUMNS if fuses(images) else SCAN_COLUMNS)
    each, bound_B = min(CAPACITY, count * shifts), torch.full((particles,), -torch.inf, device=device)
    room_B, room = torch.full((particles,), each, dtype=torch.int32, device=device), particles * each
    share = log_rest(fraction) - math.log(count * shifts)
    while True:
        lists = empty_lists(room_B, room, particles * shifts, tiles, bound_B)
        fill(images, log_offset_R, slices_OL, bias_BO, lists, share)
        found, kept, missing = reduce_lists(lists, shifts, count, fraction)
        if not missing:
            return kept, found
        room_B, room, bound_B = lists.count_B, missing, (found.log_sum_B - MARGIN).float()


def reduce_lists(lists: Candidates, shifts: int, count: int, fraction: float) -> tuple[Significance, Kept, int]:
    """What the candidates come to; the room that all lists need, if some were too short (then only sums are right), else 0."""
    (particles,), (tiles, rows), device = lists.count_B.shape, lists.top.shape, lists.top.device
    top_B, total_B = torch.empty(particles, device=device), torch.empty(particles, dtype=torch.float64, device=device)
    if particles:
        _finish_kernel[(particles,)](lists.top, lists.sum, top_B, total_B, rows, shifts, tiles * shifts, STEP=1024)
    samples_B = torch.full((particles,), count * shifts, dtype=torch.int64, device=device)
    listed_B = torch.minimum(lists.count_B, lists.room_B)
    kept_B, log_sum_B, threshold_B, accepted_B = thresholds(
        lists.value, lists.place, lists.start_B, listed_B, samples_B, top_B, total_B, fraction
    )
    needed = torch.where((lists.count_B > lists.room_B).any(), lists.count_B.long().sum(), 0)
    samples = Samples(lists.value, lists.place, lists.start_B, kept_B, threshold_B, True, parts_of(CAPACITY, 1))
    slice_ptr_B1, shift_ptr_B1 = (torch.arange(particles + 1, device=device) * each for each in (count, shifts))
    sizes = particles * count, rows
    pointers, slice_at, shift_at, value_N, missing = compact(samples, slice_ptr_B1, shift_ptr_B1, sizes, needed)
    blocks = Blocks(pointers[0], (slice_at % count).int(), pointers[1], (shift_at % shifts).int(), pointers[2])
    best_B = _best(lists, kept_B, top_B, count * shifts)
    found = Significance(top_B.double(), log_sum_B, best_B, threshold_B, accepted_B)
    return found, Kept(blocks, value_N, slice_at, shift_at), missing


def _best(lists: Candidates, kept_B: Tensor, top_B: Tensor, samples: int) -> Tensor:
    """Number of each particle's best sample, as `significant` counts them."""
    best_B, run_B = torch.full_like(kept_B, 2**31 - 1), torch.arange(len(kept_B), device=kept_B.device) * samples
    if len(kept_B):
        _best_kernel[(len(kept_B),)](lists.value, lists.place, lists.start_B, kept_B, top_B, best_B, STEP=1024)
    nothing_B = torch.where(top_B == -torch.inf, run_B, len(kept_B) * samples)
    return torch.where(best_B < samples, run_B + best_B, nothing_B)
