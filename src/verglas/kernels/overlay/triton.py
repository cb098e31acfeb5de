"""`overlay` on the GPU: one atomic addition for each real and imaginary part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 1024  # of one program: real and imaginary parts of half as many pixels


@triton.jit(do_not_specialize=["planes", "height", "width"])
def _overlay_kernel(patch, corner, image, planes, height, width, rows, columns, NUMBERS: tl.constexpr):
    window = tl.program_id(0)
    b, plane = window // planes, window % planes
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    pixel, part = number // 2, number % 2
    inside = pixel < rows * columns
    y = tl.load(corner + 2 * b) + pixel // columns
    x = tl.load(corner + 2 * b + 1) + pixel % columns
    added = tl.load(patch + 2 * tl.cast(window, tl.int64) * rows * columns + number, mask=inside)
    tl.atomic_add(image + 2 * ((plane * height + y) * width + x) + part, added, mask=inside, sem="relaxed")


def overlay_triton(patch_BOLYX: Tensor, corner_B2: Tensor, object_OLYX: Tensor) -> Tensor:
    """See README.md; complex64, the object contiguous (TypeError for others)."""
    if patch_BOLYX.dtype != torch.complex64 or object_OLYX.dtype != torch.complex64:
        raise TypeError(f"the Triton kernel adds complex64, got {patch_BOLYX.dtype} to {object_OLYX.dtype}")
    if not object_OLYX.is_contiguous():
        raise TypeError("the object must be contiguous: it is changed in place")
    batch, modes, slices, rows, columns = patch_BOLYX.shape
    grid = (batch * modes * slices, triton.cdiv(2 * rows * columns, NUMBERS))
    if patch_BOLYX.numel():
        patch, image = torch.view_as_real(patch_BOLYX.contiguous()), torch.view_as_real(object_OLYX)
        height, width = object_OLYX.shape[2:]
        _overlay_kernel[grid](patch, corner_B2.contiguous(), image, modes * slices, height, width, rows, columns, NUMBERS)
    return object_OLYX
