"""In which order slices are cut on the GPU: patch by patch, patches near each other in the volume one after the other.

Slices sorted by direction share voxels only with their neighbours, and those of random directions with none: their planes soon
part. But many planes cross at any place, and patches of whichever slices that meet there find its voxels in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.project.triton import load_axis

PIXELS = 128  # of a patch: consecutive coefficients, which are neighbours in a list along a Morton curve
BITS = 5  # of a place along each axis; those of three axes fit the 16 bits that are sorted


@triton.jit
def positions(sampling, coordinates, r, k, n_pixels, mask):
    """Positions (x, y, z) in the volume of pixels k of slices r, of shapes that broadcast; the centre where mask is off.

    Rounded in one fixed way: the compiler computes positions twice, in two layouts, and a voxel found from one goes with the
    fractions of the other. Left free to contract, they may differ across a voxel boundary.
    """
    kx = tl.load(coordinates + k, mask=mask, other=0.0)
    ky = tl.load(coordinates + n_pixels + k, mask=mask, other=0.0)
    kz = tl.load(coordinates + 2 * n_pixels + k, mask=mask, other=0.0)
    ax, bx, cx = load_axis(sampling, r, 0)
    ay, by, cy = load_axis(sampling, r, 1)
    az, bz, cz = load_axis(sampling, r, 2)
    px = tl.fma(cx, kz, tl.fma(ax, kx, bx * ky))
    py = tl.fma(cy, kz, tl.fma(ay, kx, by * ky))
    return px, py, tl.fma(cz, kz, tl.fma(az, kx, bz * ky))


@triton.jit
def _spread_bits(v):
    """Two zeros between the bits of a 5-bit integer."""
    v = (v | (v << 8)) & 0x100F
    v = (v | (v << 4)) & 0x10C3
    return (v | (v << 2)) & 0x1249


@triton.jit(do_not_specialize=["n_patches", "n_pixels"])
def _place_kernel(
    sampling, coordinates, place, n_patches, n_pixels, half, steps, PIXELS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Place of the middle pixel of each patch on a Morton curve through the half volume. steps: of the curve per voxel."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = j < n_patches
    each = tl.cdiv(n_pixels, PIXELS)
    r = tl.where(mask, j // each, 0)
    k = tl.minimum((j % each) * PIXELS + PIXELS // 2, n_pixels - 1)
    px, py, pz = positions(sampling, coordinates, r, k, n_pixels, mask)
    last: tl.constexpr = 2**BITS - 1
    turn = tl.where(px < 0, -1.0, 1.0)
    x = tl.minimum(px * turn * steps, last).to(tl.int32)
    y = tl.minimum(tl.maximum((py * turn + half) * steps, 0.0), last).to(tl.int32)
    z = tl.minimum(tl.maximum((pz * turn + half) * steps, 0.0), last).to(tl.int32)
    curve = _spread_bits(y) | (_spread_bits(z) << 1) | (_spread_bits(x) << 2)
    tl.store(place + j, curve.to(tl.int16), mask=mask)


def patch_order(sampling_R33: Tensor, coordinates_3K: Tensor, half: int) -> Tensor:
    """Patches in the order in which they are best cut, int64 [J]: patch p of slice r is number r * ceil(K / PIXELS) + p.

    sampling_R33, coordinates_3K: float32, contiguous; half: of the volume's row table.
    """
    n_pixels = coordinates_3K.shape[1]
    n_patches = len(sampling_R33) * triton.cdiv(n_pixels, PIXELS)
    place_J = torch.empty(n_patches, dtype=torch.int16, device=sampling_R33.device)
    steps = 2**BITS / (2 * half + 1)
    _place_kernel[(triton.cdiv(n_patches, 256),)](
        sampling_R33, coordinates_3K, place_J, n_patches, n_pixels, half, steps, PIXELS=PIXELS, BITS=BITS, BLOCK=256
    )
    return torch.argsort(place_J, stable=True)  # neighbours among the slices given stay neighbours
