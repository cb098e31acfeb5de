"""`patches` on the GPU: a copy, limited by memory. A complex64 number travels as one word of 8 bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 1024  # of one program


@triton.jit(do_not_specialize=["planes", "height", "width"])
def _patches_kernel(image, corner, out, planes, height, width, rows, columns, PIXELS: tl.constexpr):
    window = tl.program_id(0)
    b, plane = window // planes, window % planes
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < rows * columns
    y = tl.load(corner + 2 * b) + pixel // columns
    x = tl.load(corner + 2 * b + 1) + pixel % columns
    word = tl.load(image + (plane * height + y) * width + x, mask=inside)
    tl.store(out + tl.cast(window, tl.int64) * rows * columns + pixel, word, mask=inside)


def patches_triton(object_OLYX: Tensor, corner_B2: Tensor, shape: tuple[int, int]) -> Tensor:
    """See README.md; complex64 (TypeError for others)."""
    if object_OLYX.dtype != torch.complex64:
        raise TypeError(f"the Triton kernel copies complex64, got {object_OLYX.dtype}")
    modes, slices, height, width = object_OLYX.shape
    out = torch.empty(len(corner_B2), modes, slices, *shape, dtype=torch.complex64, device=object_OLYX.device)
    grid = (len(corner_B2) * modes * slices, triton.cdiv(shape[0] * shape[1], PIXELS))
    if out.numel():
        words = object_OLYX.contiguous().view(torch.int64)
        _patches_kernel[grid](words, corner_B2.contiguous(), out.view(torch.int64), modes * slices, height, width, *shape, PIXELS)
    return out
