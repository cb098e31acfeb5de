"""`project` on the GPU from a half-precision volume in which each voxel is stored together with its neighbours.

What limits a gather is memory traffic, counted in 32-byte sectors out of the L2 cache and in loads (benchmarks/NOTES.md,
"Projection on the GPU"). A cell holds the 8 voxels of trilinear interpolation (re, im in float16: 32 bytes, one sector) or,
at half the memory, the 4 of x = 0 (16 bytes; those of x = 1 are the next cell). A sample is then two 16-byte loads.

Cells of a plane z form a rectangle, so that its address takes one small table: cell (z, y, x) is number
plane_Z2[z, 0] + y * plane_Z2[z, 1] + x, with z counted from -half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.project.patches import PIXELS, patch_order, positions

EIGHT_UP_TO = 2**29  # bytes: beyond, cells of 4 take half the memory and 1.15 times as long
PATCHES, WARPS = 1, 4  # of a program
LARGEST_HALF = tl.constexpr(65504.0)


@dataclass(frozen=True)
class Cells:
    """words: int32 [cells, 4 or 8], a voxel (float16 re, im) each, y fastest, then z, then x; plane_Z2: see above.

    limit2: largest |p|^2 sampled; the volume is `scale` times what is stored.
    """

    words: Tensor
    plane_Z2: Tensor
    half: int
    limit2: float
    scale: float


@triton.jit
def _make_kernel(
    voxels, start, length, plane, rows_of_plane, out, edge, half, CORNERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    z, y = tl.program_id(0) // edge, tl.program_id(0) % edge - half
    width = tl.load(plane + 2 * z + 1)
    width = tl.where(tl.abs(y) <= tl.load(rows_of_plane + z), width, 0)
    begin = (tl.load(plane + 2 * z) + y * width).to(tl.int64)
    for first in range(0, width, BLOCK):
        x = first + tl.arange(0, BLOCK)
        for corner in tl.static_range(CORNERS):
            dy, dz, dx = corner % 2, (corner // 2) % 2, corner // 4
            row = tl.minimum(z + dz, edge - 1) * edge + tl.minimum(y + half + dy, edge - 1)
            voxel = tl.load(voxels + tl.load(start + row) + x + dx, mask=x + dx < tl.load(length + row), other=0)
            tl.store(out + (begin + x) * CORNERS + corner, voxel, mask=x < width)


def make_cells(values_V2: Tensor, rows: RowTable, scale: float, corners: int | None = None) -> Cells:
    """Cells of a packed float16 volume. corners: 4 or 8 voxels in each; by default 8 up to `EIGHT_UP_TO` bytes."""
    width_Z = rows.length_ZY.amax(1).long()
    rows_Z = torch.div((rows.length_ZY > 0).sum(1), 2, rounding_mode="floor")  # y runs from -rows to rows
    size_Z = torch.where(width_Z > 0, (2 * rows_Z + 1) * width_Z, 0)
    plane_Z2 = torch.stack([size_Z.cumsum(0) - size_Z + rows_Z * width_Z, width_Z], 1)
    cells = int(size_Z.sum())
    plane_Z2 = plane_Z2.int() if cells < 2**31 else plane_Z2
    corners = corners or (8 if 32 * cells <= EIGHT_UP_TO else 4)
    words = torch.empty(cells, corners, dtype=torch.int32, device=values_V2.device)
    voxels = values_V2.contiguous().view(torch.int32)
    _make_kernel[(rows.edge**2,)](
        voxels, rows.start_ZY, rows.length_ZY, plane_Z2, rows_Z.int(), words, rows.edge, rows.half, CORNERS=corners, BLOCK=128
    )
    return Cells(words, plane_Z2, rows.half, rows.limit2, scale)


@triton.jit
def _unpack(word):
    """(re, im) in float32 of one voxel."""
    re = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    im = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return re, im


@triton.jit
def _blend(near, far, gx, fy, fz):
    """Trilinear interpolation: near, far [..., 4] at the two x (y fastest, then z), fractions [...]."""
    v = near + tl.expand_dims(gx, -1) * (far - near)
    low, high = tl.split(tl.reshape(v, v.shape[:-1] + [2, 2]))  # y = 0, y = 1  # noqa: RUF005
    bottom, top = tl.split(low + tl.expand_dims(fy, -1) * (high - low))
    return bottom + fz * (top - bottom)


@triton.jit
def interpolate(words, plane, px, py, pz, half, limit2, mask, CORNERS: tl.constexpr):
    """(re, im) of the volume as stored, at positions of any shape; 0 beyond the radius and where mask is off."""
    inside = mask & (px * px + py * py + pz * pz <= limit2)
    turned = px < 0
    px = tl.abs(px)
    py = tl.where(turned, -py, py)
    pz = tl.where(turned, -pz, pz)
    x, y, z = tl.floor(px), tl.floor(py), tl.floor(pz)
    at = tl.expand_dims(plane + tl.where(inside, z.to(tl.int32) + half, half) * 2, -1) + tl.arange(0, 2)
    first, width = tl.split(tl.load(at))
    cell = tl.where(inside, first + y.to(tl.int32) * width + x.to(tl.int32), 0).to(tl.int64)
    at = words + tl.expand_dims(cell * CORNERS, -1) + tl.arange(0, 4)
    near_re, near_im = _unpack(tl.load(at))
    far_re, far_im = _unpack(tl.load(at + 4))  # of this cell, or (4 corners) the next one
    re = _blend(near_re, far_re, px - x, py - y, pz - z)
    im = _blend(near_im, far_im, px - x, py - y, pz - z)
    return tl.where(inside, re, 0.0), tl.where(inside, tl.where(turned, -im, im), 0.0)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """In the precision of the result; float16 is clamped, so that no product with 0 gives NaN."""
    if dtype == tl.float16:
        value = tl.minimum(tl.maximum(value, -LARGEST_HALF), LARGEST_HALF)
    return value.to(dtype)


@triton.jit(do_not_specialize=["n_patches"])
def _project_cells_kernel(
    words, plane, sampling, order, coordinates, factor, out, n_patches, n_pixels, half, limit2,
    CORNERS: tl.constexpr, PATCHES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    patch = tl.load(order + at, mask=at < n_patches, other=0).to(tl.int32)
    each = tl.cdiv(n_pixels, PIXELS)
    r = (patch // each)[:, None]
    k = ((patch % each) * PIXELS)[:, None] + tl.arange(0, PIXELS)[None, :]
    mask = (at < n_patches)[:, None] & (k < n_pixels)
    px, py, pz = positions(sampling, coordinates, r, k, n_pixels, mask)
    re, im = interpolate(words, plane, px, py, pz, half, limit2, mask, CORNERS)
    f = tl.load(factor + k, mask=mask, other=0.0)
    out += r.to(tl.int64) * 2 * n_pixels + k
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out, rounded(re * f, dtype), mask=mask, cache_modifier=".cs")  # streamed past the cache the volume needs
    tl.store(out + n_pixels, rounded(im * f, dtype), mask=mask, cache_modifier=".cs")


def project_cells(
    cells: Cells, sampling_R33: Tensor, coordinates_K3: Tensor, factor_K: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Slices [R, 2, K] times factor_K (default 1), as `project_reference` defines them.

    out: contiguous, float32 or float16 (what is beyond its range becomes its largest), filled and returned; by default new,
    float32. TypeError if it is not so.
    """
    n_slices, n_pixels = len(sampling_R33), len(coordinates_K3)
    device = cells.words.device
    out_R2K = torch.empty(n_slices, 2, n_pixels, dtype=torch.float32, device=device) if out is None else out
    if not out_R2K.is_contiguous() or out_R2K.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"slices are written to contiguous float16 or float32, got {out_R2K.dtype} of strides {out_R2K.stride()}")
    if n_slices * n_pixels == 0:
        return out_R2K
    sampling = sampling_R33.to(device, torch.float32).contiguous()
    coordinates_3K = coordinates_K3.to(torch.float32).T.contiguous()
    order_J = patch_order(sampling, coordinates_3K, cells.half)
    _project_cells_kernel[(triton.cdiv(len(order_J), PATCHES),)](
        cells.words, cells.plane_Z2, sampling, order_J, coordinates_3K, scaled(factor_K, cells.scale, n_pixels, device), out_R2K,
        len(order_J), n_pixels, cells.half, cells.limit2, CORNERS=cells.words.shape[1], PATCHES=PATCHES, PIXELS=PIXELS,
        num_warps=WARPS,
    )  # fmt: skip
    return out_R2K


def scaled(factor_K: Tensor | None, scale: float, n_pixels: int, device: torch.device) -> Tensor:
    """What turns stored values into results, float32 [K]."""
    if factor_K is None:
        return torch.full((n_pixels,), scale, dtype=torch.float32, device=device)
    return (factor_K.to(device, torch.float32) * scale).contiguous()
