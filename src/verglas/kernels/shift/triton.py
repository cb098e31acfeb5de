"""`shift` on the GPU: limited by what it writes. A program keeps a few images in registers and runs through the shifts.

The phase factors are one small table for all particles, taken in float64 and read from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.shift.reference import turn_planes

IMAGES, COEFFICIENTS, SHIFTS, WARPS = 4, 512, 32, 4  # of one program


@triton.jit(do_not_specialize=["n_images", "n_shifts"])
def _shift_kernel(
    image, cosine, sine, out, n_images, n_shifts, n_coefficients,
    IMAGES: tl.constexpr, SHIFTS: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    k = tl.program_id(1) * COEFFICIENTS + tl.arange(0, COEFFICIENTS)
    first = tl.program_id(2) * SHIFTS
    inside = k < n_coefficients
    mask = (b < n_images)[:, None] & inside[None, :]
    row = 2 * tl.cast(n_coefficients, tl.int64)
    image_at = image + b.to(tl.int64)[:, None] * row + k[None, :]
    re = tl.load(image_at, mask=mask, other=0.0)
    im = tl.load(image_at + n_coefficients, mask=mask, other=0.0)
    out_at = out + b.to(tl.int64)[:, None] * (row * n_shifts) + k[None, :]
    for t in range(first, tl.minimum(first + SHIFTS, n_shifts)):
        turn = tl.cast(t, tl.int64) * n_coefficients + k
        c = tl.load(cosine + turn, mask=inside, other=0.0)[None, :]
        s = tl.load(sine + turn, mask=inside, other=0.0)[None, :]
        at = out_at + t * row
        tl.store(at, (re * c - im * s).to(out.dtype.element_ty), mask=mask)
        tl.store(at + n_coefficients, (re * s + im * c).to(out.dtype.element_ty), mask=mask)


def shift_triton(
    image_B2K: Tensor, shift_T2: Tensor, x_K: Tensor, y_K: Tensor, box: int, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `shift_reference`; images in float32, result in float32 or float16."""
    if image_B2K.dtype != torch.float32 or out_dtype not in (torch.float32, torch.float16):
        raise TypeError(f"the Triton kernel turns float32 into float32 or float16, got {image_B2K.dtype} to {out_dtype}")
    n_images, n_shifts, n_coefficients = len(image_B2K), len(shift_T2), len(x_K)
    out = torch.empty(n_images, n_shifts, 2, n_coefficients, dtype=out_dtype, device=image_B2K.device)
    if out.numel():
        planes = turn_planes(shift_T2, x_K, y_K, box)
        cos_TK, sin_TK = (plane.float().contiguous() for plane in planes)
        grid = (triton.cdiv(n_images, IMAGES), triton.cdiv(n_coefficients, COEFFICIENTS), triton.cdiv(n_shifts, SHIFTS))
        _shift_kernel[grid](
            image_B2K.contiguous(), cos_TK, sin_TK, out, n_images, n_shifts, n_coefficients,
            IMAGES=IMAGES, SHIFTS=SHIFTS, COEFFICIENTS=COEFFICIENTS, num_warps=WARPS,
        )  # fmt: skip
    return out
