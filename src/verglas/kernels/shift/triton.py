"""`shift` on the GPU: limited by what it writes. A program keeps a few images in registers and runs through the shifts.

The phase factors are one small table for all particles, taken in float64 and read from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks, owner
from verglas.kernels.shift.reference import turn_planes

IMAGES, COEFFICIENTS, SHIFTS, WARPS = 4, 512, 32, 4  # of one program
ROWS = 8  # shifted images of one program that goes through lists: they are of one or two particles


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


@triton.jit(do_not_specialize=["n_rows"])
def _shift_listed_kernel(
    image, cosine, sine, image_of, shift_of, out, n_rows, n_coefficients, ROWS: tl.constexpr, COEFFICIENTS: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    k = tl.program_id(1) * COEFFICIENTS + tl.arange(0, COEFFICIENTS)
    inside = k < n_coefficients
    row = 2 * tl.cast(n_coefficients, tl.int64)
    for m in range(first, tl.minimum(first + ROWS, n_rows)):
        image_at = image + tl.load(image_of + m).to(tl.int64) * row + k
        turn = tl.load(shift_of + m).to(tl.int64) * n_coefficients + k
        re, im = tl.load(image_at, mask=inside, other=0.0), tl.load(image_at + n_coefficients, mask=inside, other=0.0)
        c, s = tl.load(cosine + turn, mask=inside, other=0.0), tl.load(sine + turn, mask=inside, other=0.0)
        at = out + tl.cast(m, tl.int64) * row + k
        tl.store(at, (re * c - im * s).to(out.dtype.element_ty), mask=inside)
        tl.store(at + n_coefficients, (re * s + im * c).to(out.dtype.element_ty), mask=inside)


def shift_triton(
    image_B2K: Tensor, shift_T2: Tensor, x_K: Tensor, y_K: Tensor, box: int, out_dtype: torch.dtype = torch.float32,
    lists: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """See `shift_reference`; images in float32, result in float32 or float16."""
    if image_B2K.dtype != torch.float32 or out_dtype not in (torch.float32, torch.float16):
        raise TypeError(f"the Triton kernel turns float32 into float32 or float16, got {image_B2K.dtype} to {out_dtype}")
    n_images, n_shifts, n_coefficients = len(image_B2K), len(shift_T2), len(x_K)
    leading = (n_images, n_shifts) if lists is None else (len(lists.shift_M),)
    out = torch.empty(*leading, 2, n_coefficients, dtype=out_dtype, device=image_B2K.device)
    if not out.numel():
        return out
    cos_TK, sin_TK = (plane.float().contiguous() for plane in turn_planes(shift_T2, x_K, y_K, box))
    if lists is not None:
        image_M = owner(lists.shift_ptr_B1, len(out)).int()
        _shift_listed_kernel[(triton.cdiv(len(out), ROWS), triton.cdiv(n_coefficients, COEFFICIENTS))](
            image_B2K.contiguous(), cos_TK, sin_TK, image_M, lists.shift_M, out, len(out), n_coefficients,
            ROWS=ROWS, COEFFICIENTS=COEFFICIENTS, num_warps=WARPS,
        )  # fmt: skip
    else:
        grid = (triton.cdiv(n_images, IMAGES), triton.cdiv(n_coefficients, COEFFICIENTS), triton.cdiv(n_shifts, SHIFTS))
        _shift_kernel[grid](
            image_B2K.contiguous(), cos_TK, sin_TK, out, n_images, n_shifts, n_coefficients,
            IMAGES=IMAGES, SHIFTS=SHIFTS, COEFFICIENTS=COEFFICIENTS, num_warps=WARPS,
        )  # fmt: skip
    return out
