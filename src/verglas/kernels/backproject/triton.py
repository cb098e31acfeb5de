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
from verglas.kernels.project.triton import load_axis, locate

BLOCK, WARPS = 128, 4
EVERY_COLUMN = 2**30


@triton.jit(do_not_specialize=["n_slices", "n_pixels", "half", "low", "high"])  # whatever they are: one kernel (`ready`)
def _backproject_kernel(
    accumulator, start, sampling, coordinates, data, weight, n_slices, n_pixels, half, limit2, low, high,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
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
    source = data + tl.cast(r, tl.int64) * 2 * n_pixels + k
    re = tl.load(source, mask=inside, other=0.0)
    im = tl.load(source + n_pixels, mask=inside, other=0.0)
    im = tl.where(turned, -im, im)
    wt = tl.zeros([BLOCK], tl.float32)
    if WEIGHTED:
        wt = tl.load(weight + tl.cast(r, tl.int64) * n_pixels + k, mask=inside, other=0.0)
    lane = tl.arange(0, 4)[None, :]
    value = tl.where(lane == 0, re[:, None], tl.where(lane == 1, im[:, None], tl.where(lane == 2, wt[:, None], 0.0)))
    for corner in tl.static_range(4):
        dy, dz = corner % 2, corner // 2
        address = tl.load(start + row + dy + dz * edge, mask=inside, other=0) + x
        w = (fy if dy == 1 else 1 - fy) * (fz if dz == 1 else 1 - fz)
        for dx in tl.static_range(2):
            part = w * (fx if dx == 1 else 1 - fx)
            target = accumulator + (address + dx).to(tl.int64)[:, None] * 4 + lane
            tl.atomic_add(target, part[:, None] * value, mask=inside[:, None], sem="relaxed")


def backproject_triton(
    accumulator_V4: Tensor,
    rows: RowTable,
    data_R2K: Tensor,
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
    sampling = sampling_R33.to(accumulator_V4.device, torch.float32).contiguous()
    data = data_R2K.to(torch.float32).contiguous()
    weight = data if weight_RK is None else weight_RK.to(torch.float32).contiguous()
    _backproject_kernel[(triton.cdiv(n_pixels, BLOCK) * n_slices,)](
        accumulator_V4, rows.start_ZY, sampling, coordinates_K3.to(torch.float32).T.contiguous(),
        data, weight, n_slices, n_pixels, rows.half, rows.limit2, *(columns or (0, EVERY_COLUMN)), WEIGHTED=weight_RK is not None,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def ready(device: torch.device, wide: bool) -> None:
    """Have the kernel for weighted slices compiled, of row tables of int32, or (wide) int64."""
    rows = packed_sphere(2.0, device)
    rows = replace(rows, start_ZY=rows.start_ZY.long()) if wide else rows
    nothing = torch.zeros(2, 2, 4, device=device)
    turns_R33 = torch.eye(3, device=device).repeat(2, 1, 1)
    coordinates_K3 = torch.zeros(4, 3, device=device)
    backproject_triton(torch.zeros(rows.count, 4, device=device), rows, nothing, nothing[:, 0], turns_R33, coordinates_K3)
