"""`project` on the GPU from packed float32 rows; `cells.py` does it from half precision, twice as fast.

Slices are visited sorted by direction: slices in flight at one time then cut nearly the same plane and share the cache
(benchmarks/NOTES.md, "Projection on the GPU").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.core.rows import RowTable

BLOCK, WARPS = 256, 8  # pixels and warps of a program


@triton.jit
def _spread_bits(v):
    """Zeros between the bits of a 10-bit integer."""
    v = (v | (v << 8)) & 0x00FF00FF
    v = (v | (v << 4)) & 0x0F0F0F0F
    v = (v | (v << 2)) & 0x33333333
    return (v | (v << 1)) & 0x55555555


@triton.jit
def _order_kernel(sampling, key, n_slices, BLOCK: tl.constexpr):
    """Sort key of each slice: place of its normal on a Morton curve over the octahedral map of directions."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = r < n_slices
    nx = tl.load(sampling + r * 9 + 2, mask=mask, other=0.0)
    ny = tl.load(sampling + r * 9 + 5, mask=mask, other=0.0)
    nz = tl.load(sampling + r * 9 + 8, mask=mask, other=1.0)
    turn = tl.where(nz < 0, -1.0, 1.0) / tl.maximum(tl.abs(nx) + tl.abs(ny) + tl.abs(nz), 1e-20)
    u, v = nx * turn, ny * turn
    a = tl.minimum(tl.maximum((u + v + 1) * 511.5, 0.0), 1023.0).to(tl.int32)
    b = tl.minimum(tl.maximum((u - v + 1) * 511.5, 0.0), 1023.0).to(tl.int32)
    tl.store(key + r, _spread_bits(a) | (_spread_bits(b) << 1), mask=mask)


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
def _voxel(values, address, inside):
    """(re, im) of one voxel."""
    at = tl.expand_dims(values + address * 2, -1) + tl.arange(0, 2)
    return tl.split(tl.load(at, mask=tl.expand_dims(inside, -1), other=0.0))


@triton.jit
def _project_kernel(
    values, start, sampling, order, coordinates, out, n_pixels, half, limit2, BLOCK: tl.constexpr
):  # fmt: skip
    patches = tl.cdiv(n_pixels, BLOCK)
    r = tl.load(order + tl.program_id(0) // patches)
    ax, bx, cx = load_axis(sampling, r, 0)
    ay, by, cy = load_axis(sampling, r, 1)
    az, bz, cz = load_axis(sampling, r, 2)
    edge = 2 * half + 1
    k = (tl.program_id(0) % patches) * BLOCK + tl.arange(0, BLOCK)
    mask = k < n_pixels
    kx = tl.load(coordinates + k, mask=mask, other=0.0)
    ky = tl.load(coordinates + n_pixels + k, mask=mask, other=0.0)
    kz = tl.load(coordinates + 2 * n_pixels + k, mask=mask, other=0.0)
    px, py, pz = ax * kx + bx * ky + cx * kz, ay * kx + by * ky + cy * kz, az * kx + bz * ky + cz * kz
    row, x, fx, fy, fz, turned, inside = locate(px, py, pz, half, edge, limit2, mask)
    re, im = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for corner in tl.static_range(4):
        dy, dz = corner % 2, corner // 2
        address = (tl.load(start + row + dy + dz * edge, mask=inside, other=0) + x).to(tl.int64)
        weight = (fy if dy == 1 else 1 - fy) * (fz if dz == 1 else 1 - fz)
        re0, im0 = _voxel(values, address, inside)
        re1, im1 = _voxel(values, address + 1, inside)
        re += weight * (re0 + fx * (re1 - re0))
        im += weight * (im0 + fx * (im1 - im0))
    out += r.to(tl.int64) * 2 * n_pixels + k
    tl.store(out, re, mask=mask, cache_modifier=".cs")  # streamed past the cache the volume needs
    tl.store(out + n_pixels, tl.where(turned, -im, im), mask=mask, cache_modifier=".cs")


def visiting_order(sampling_R33: Tensor) -> Tensor:
    """Order in which to visit slices, int32 [R]: neighbours in it are near in direction. sampling_R33: float32."""
    n_slices = len(sampling_R33)
    key_R = torch.empty(n_slices, dtype=torch.int32, device=sampling_R33.device)
    _order_kernel[(triton.cdiv(n_slices, 256),)](sampling_R33, key_R, n_slices, BLOCK=256)
    return torch.argsort(key_R).int()


def project_triton(values_V2: Tensor, rows: RowTable, sampling_R33: Tensor, coordinates_K3: Tensor) -> Tensor:
    """See `project_reference`; float32 only (`make_cells` takes float16 volumes)."""
    if values_V2.dtype != torch.float32:
        raise TypeError(f"the Triton kernel reads float32 volumes, got {values_V2.dtype}")
    n_slices, n_pixels = len(sampling_R33), len(coordinates_K3)
    out_R2K = torch.empty(n_slices, 2, n_pixels, dtype=torch.float32, device=values_V2.device)
    if n_slices * n_pixels == 0:
        return out_R2K
    sampling = sampling_R33.to(values_V2.device, torch.float32).contiguous()
    _project_kernel[(triton.cdiv(n_pixels, BLOCK) * n_slices,)](
        values_V2.detach().contiguous(), rows.start_ZY, sampling, visiting_order(sampling),
        coordinates_K3.to(torch.float32).T.contiguous(), out_R2K, n_pixels, rows.half, rows.limit2, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out_R2K
