"""`project` on the GPU. What it does about memory traffic, which is what limits it (benchmarks/NOTES.md, "Projection"):

* The volume is one 32-bit word per voxel (float16 re, im) or one 64-bit word (float32), rows along x.
* It may be stored in three copies whose rows run along x, y and z; each slice reads the copy whose rows lie most nearly
  in its plane, so that a 32-byte sector serves more of its samples (2.0 sectors per sample instead of 2.9).
* Slices are visited copy by copy and sorted by direction: slices in flight at one time cut nearly the same plane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.core.rows import RowTable

# Pixels and warps of a program for slices of at least so many pixels (measured: NOTES.md).
TILES = ((4096, 512, 16), (0, 256, 8))


@triton.jit
def _spread_bits(v):
    """Zeros between the bits of a 10-bit integer."""
    v = (v | (v << 8)) & 0x00FF00FF
    v = (v | (v << 4)) & 0x0F0F0F0F
    v = (v | (v << 2)) & 0x33333333
    return (v | (v << 1)) & 0x55555555


@triton.jit
def _order_kernel(sampling, key, n_slices, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Sort key of each slice: copy, then place of its normal on a Morton curve over the octahedral map of directions."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = r < n_slices
    nx = tl.load(sampling + r * 9 + 2, mask=mask, other=0.0)
    ny = tl.load(sampling + r * 9 + 5, mask=mask, other=0.0)
    nz = tl.load(sampling + r * 9 + 8, mask=mask, other=1.0)
    turn = tl.where(nz < 0, -1.0, 1.0) / tl.maximum(tl.abs(nx) + tl.abs(ny) + tl.abs(nz), 1e-20)
    u, v = nx * turn, ny * turn
    a = tl.minimum(tl.maximum((u + v + 1) * 511.5, 0.0), 1023.0).to(tl.int32)
    b = tl.minimum(tl.maximum((u - v + 1) * 511.5, 0.0), 1023.0).to(tl.int32)
    code = _spread_bits(a) | (_spread_bits(b) << 1)
    if COPIES == 3:
        nx, ny, nz = tl.abs(nx), tl.abs(ny), tl.abs(nz)
        copy = tl.where((nx <= ny) & (nx <= nz), 0, tl.where(ny <= nz, 1, 2))
        code = code | (copy << 20)
    tl.store(key + r, code, mask=mask)


@triton.jit
def _unpack(word, HALF: tl.constexpr):
    """(re, im) in float32 of one voxel word."""
    if HALF:
        re = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        im = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        re = (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        im = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return re, im


@triton.jit
def _row(words, address, fx, inside, HALF: tl.constexpr):
    """Linear interpolation along x in one row of the volume."""
    re0, im0 = _unpack(tl.load(words + address, mask=inside, other=0), HALF)
    re1, im1 = _unpack(tl.load(words + address + 1, mask=inside, other=0), HALF)
    return re0 + fx * (re1 - re0), im0 + fx * (im1 - im0)


@triton.jit
def load_axis(sampling, r, axis):
    """The three elements of row `axis` of the sampling matrix of slice r."""
    s = sampling + r * 9 + axis * 3
    return tl.load(s), tl.load(s + 1), tl.load(s + 2)


@triton.jit
def locate(px, py, pz, half, edge, limit2, mask):
    """Voxel row, x, fractions of positions; whether turned into the stored half; whether inside the radius."""
    inside = mask & (px * px + py * py + pz * pz <= limit2)
    turned = px < 0
    px = tl.abs(px)
    py = tl.where(turned, -py, py)
    pz = tl.where(turned, -pz, pz)
    x, y, z = tl.floor(px), tl.floor(py), tl.floor(pz)
    row = (z.to(tl.int32) + half) * edge + y.to(tl.int32) + half
    return row, x.to(tl.int32), px - x, py - y, pz - z, turned, inside


@triton.jit
def _project_kernel(
    words, start, sampling, order, key, coordinates, out, n_pixels, n_voxels, half, limit2, scale,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patches = tl.cdiv(n_pixels, BLOCK)
    patch, place = tl.program_id(0) % patches, tl.program_id(0) // patches
    r = tl.load(order + place)
    copy = tl.load(key + r) >> 20  # this copy's rows run along axis `copy`
    words += copy.to(tl.int64) * n_voxels
    ax, bx, cx = load_axis(sampling, r, copy)
    ay, by, cy = load_axis(sampling, r, (copy + 1) % 3)
    az, bz, cz = load_axis(sampling, r, (copy + 2) % 3)
    edge = 2 * half + 1
    out += r.to(tl.int64) * 2 * n_pixels
    k = patch * BLOCK + tl.arange(0, BLOCK)
    mask = k < n_pixels
    kx = tl.load(coordinates + k, mask=mask, other=0.0)
    ky = tl.load(coordinates + n_pixels + k, mask=mask, other=0.0)
    kz = tl.load(coordinates + 2 * n_pixels + k, mask=mask, other=0.0)
    px, py, pz = ax * kx + bx * ky + cx * kz, ay * kx + by * ky + cy * kz, az * kx + bz * ky + cz * kz
    row, x, fx, fy, fz, turned, inside = locate(px, py, pz, half, edge, limit2, mask)
    re, im = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for corner in tl.static_range(4):
        dy, dz = corner % 2, corner // 2
        address = tl.load(start + row + dy + dz * edge, mask=inside, other=0) + x
        weight = (fy if dy == 1 else 1 - fy) * (fz if dz == 1 else 1 - fz)
        row_re, row_im = _row(words, address, fx, inside, HALF)
        re += weight * row_re
        im += weight * row_im
    tl.store(out + k, re * scale, mask=mask, cache_modifier=".cs")  # streamed past the cache the volume needs
    tl.store(out + n_pixels + k, tl.where(turned, -im, im) * scale, mask=mask, cache_modifier=".cs")


def visiting_order(sampling_R33: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """(order [R] int32, key [R] int32) in which to visit slices; key >> 20 is the copy of the volume each reads."""
    n_slices = len(sampling_R33)
    key_R = torch.empty(n_slices, dtype=torch.int32, device=sampling_R33.device)
    _order_kernel[(triton.cdiv(n_slices, 256),)](sampling_R33, key_R, n_slices, COPIES=copies, BLOCK=256)
    if copies == 1:
        key_R &= 0xFFFFF
    return torch.argsort(key_R).int(), key_R


def project_triton(
    values_CV2: Tensor, rows: RowTable, sampling_R33: Tensor, coordinates_K3: Tensor, scale: float = 1.0
) -> Tensor:
    """See `project_reference`; values in float32 or float16 (then `scale` undoes the scaling of the stored values).

    values_CV2: [V, 2], or [3, V, 2] with the axes of the copies in the orders (x, y, z), (y, z, x), (z, x, y).
    """
    if values_CV2.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"the Triton kernel reads float16 or float32 volumes, got {values_CV2.dtype}")
    half_precision = values_CV2.dtype == torch.float16
    words = values_CV2.detach().contiguous().view(torch.int32 if half_precision else torch.int64)
    n_slices, n_pixels = len(sampling_R33), len(coordinates_K3)
    out_R2K = torch.empty(n_slices, 2, n_pixels, dtype=torch.float32, device=values_CV2.device)
    if n_slices == 0:
        return out_R2K
    sampling = sampling_R33.to(values_CV2.device, torch.float32).contiguous()
    order_R, key_R = visiting_order(sampling, 3 if values_CV2.ndim == 3 else 1)
    block, warps = next((block, warps) for least, block, warps in TILES if n_pixels >= least)
    _project_kernel[(triton.cdiv(n_pixels, block) * n_slices,)](
        words, rows.start_ZY, sampling, order_R, key_R, coordinates_K3.to(torch.float32).T.contiguous(), out_R2K,
        n_pixels, rows.count, rows.half, rows.limit2, scale, HALF=half_precision, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out_R2K
