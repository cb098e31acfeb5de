"""`backproject` on the GPU: scatter with 16-byte atomics, one (re, im, weight, 0) word per voxel.

Float atomics are not repeatable to the last bit; the caller flushes into a wider accumulator before single precision
stalls (maximization/accumulate.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels.backproject.apart import Apart
from verglas.kernels.project.triton import load_axis, locate

BLOCK, WARPS = 128, 4
EVERY_COLUMN = 2**30


@triton.jit(do_not_specialize=["n_slices", "n_pixels", "half", "low", "high"])  # whatever they are: one kernel (`ready`)
def _backproject_kernel(
    accumulator, weights, start, sampling, coordinates, data, weight, n_slices, n_pixels, half, limit2, low, high,
    DATA: tl.constexpr, WEIGHTED: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) % n_slices  # slices in the order given: sorting them cost more than it brought (NOTES.md)
    k = (tl.program_id(0) // n_slices) * BLOCK + tl.arange(0, BLOCK)
    mask = k < n_pixels
    kx = tl.load(coordinates + k, mask=mask, other=0.0)
    ky = tl.load(coordinates + n_pixels + k, mask=mask, other=0.0)
    kz = tl.load(coordinates + 2 * n_pixels + k, mask=mask, other=0.0)
    edge = 2 * half + 1
    ax, bx, cx = load_axis(sampling, r, 0)
    ay, by, cy = load_axis(sampling, r, 1)
    az, bz, cz = load_axis(sampling, r, 2)
    px, py, pz = ax * kx + bx * ky + cx * kz, ay * kx + by * ky + cy * kz, az * kx + bz * ky + cz * kz
    row, x, fx, fy, fz, turned, inside = locate(px, py, pz, half, edge, limit2, mask)
    inside = inside & (x >= low) & (x < high)
    re, im = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if DATA:
        source = data + tl.cast(r, tl.int64) * 2 * n_pixels + k
        re = tl.load(source, mask=inside, other=0.0)
        im = tl.load(source + n_pixels, mask=inside, other=0.0)
        im = tl.where(turned, -im, im)
    wt = tl.zeros([BLOCK], tl.float32)
    if WEIGHTED:
        wt = tl.load(weight + tl.cast(r, tl.int64) * n_pixels + k, mask=inside, other=0.0)
    words: tl.constexpr = 2 if APART else 4  # of a voxel
    lane = tl.arange(0, words)[None, :]
    value = tl.where(lane == 0, re[:, None], tl.where(lane == 1, im[:, None], tl.where(lane == 2, wt[:, None], 0.0)))
    for corner in tl.static_range(4):
        dy, dz = corner % 2, corner // 2
        address = tl.load(start + row + dy + dz * edge, mask=inside, other=0) + x
        w = (fy if dy == 1 else 1 - fy) * (fz if dz == 1 else 1 - fz)
        for dx in tl.static_range(2):
            part = w * (fx if dx == 1 else 1 - fx)
            voxel = (address + dx).to(tl.int64)
            if DATA or not APART:
                target = accumulator + voxel[:, None] * words + lane
                tl.atomic_add(target, part[:, None] * value, mask=inside[:, None], sem="relaxed")
            if WEIGHTED and APART:
                tl.atomic_add(weights + voxel, part * wt, mask=inside, sem="relaxed")


def backproject_triton(
    accumulator_V4: Tensor | Apart,
    rows: RowTable,
    data_R2K: Tensor | None,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
    columns: tuple[int, int] | None = None,
) -> None:
    """See `backproject_reference`; accumulator, data and weights in float32."""
    n_slices, n_pixels = len(sampling_R33), len(coordinates_K3)
    if accumulator_V4.dtype != torch.float32:
        raise TypeError(f"the Triton kernel adds in float32, got an accumulator of {accumulator_V4.dtype}")
    if n_slices == 0:
        return
    if isinstance(accumulator_V4, Apart):
        sums, weights = accumulator_V4.data_V2, accumulator_V4.weight_V
        data_R2K, weight_RK = None if sums is None else data_R2K, None if weights is None else weight_RK
    else:
        sums, weights = accumulator_V4, None
    sampling = sampling_R33.to(accumulator_V4.device, torch.float32).contiguous()
    data, weight = (None if one is None else one.to(torch.float32).contiguous() for one in (data_R2K, weight_RK))
    _backproject_kernel[(triton.cdiv(n_pixels, BLOCK) * n_slices,)](
        *(sampling if one is None else one for one in (sums, weights)),  # what is not there is not touched
        rows.start_ZY, sampling, coordinates_K3.to(torch.float32).T.contiguous(),
        *(sampling if one is None else one for one in (data, weight)), n_slices, n_pixels, rows.half, rows.limit2,
        *(columns or (0, EVERY_COLUMN)), DATA=data is not None, WEIGHTED=weight is not None,
        APART=isinstance(accumulator_V4, Apart), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def ready(device: torch.device, wide: bool) -> None:
    """Have the kernel for weighted slices compiled, of row tables of int32, or (wide) int64."""
    rows = packed_sphere(2.0, device)
    rows = replace(rows, start_ZY=rows.start_ZY.long()) if wide else rows
    nothing = torch.zeros(2, 2, 4, device=device)
    turns_R33 = torch.eye(3, device=device).repeat(2, 1, 1)
    coordinates_K3 = torch.zeros(4, 3, device=device)
    backproject_triton(torch.zeros(rows.count, 4, device=device), rows, nothing, nothing[:, 0], turns_R33, coordinates_K3)
