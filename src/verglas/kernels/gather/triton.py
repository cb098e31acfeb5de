"""`gather` on the GPU: one walk through memory, which limits it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 1024  # of one program


@triton.jit(do_not_specialize=["objects", "modes", "height", "width", "own"])
def _gather_kernel(image, corner, light, out, objects, modes, height, width, rows, columns, own, PIXELS: tl.constexpr):
    """own: pixels from one position's light to the next; 0: one light for all."""
    wave = tl.program_id(0)
    b, o, m = wave // (objects * modes), wave // modes % objects, wave % modes
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < rows * columns
    y = tl.load(corner + 2 * b) + pixel // columns
    x = tl.load(corner + 2 * b + 1) + pixel % columns
    seen = image + 2 * ((o * height + y) * width + x)
    lit = light + 2 * (tl.cast(b, tl.int64) * own + m * rows * columns + pixel)
    re, im = tl.load(seen, mask=inside), tl.load(seen + 1, mask=inside)
    light_re, light_im = tl.load(lit, mask=inside), tl.load(lit + 1, mask=inside)
    into = out + 2 * (tl.cast(wave, tl.int64) * rows * columns + pixel)
    tl.store(into, re * light_re - im * light_im, mask=inside)
    tl.store(into + 1, re * light_im + im * light_re, mask=inside)


def gather_triton(object_OYX: Tensor, corner_B2: Tensor, light_BMYX: Tensor) -> Tensor:
    """See README.md; complex64 (TypeError for others)."""
    if object_OYX.dtype != torch.complex64 or light_BMYX.dtype != torch.complex64:
        raise TypeError(f"the Triton kernel takes complex64, got {object_OYX.dtype} and {light_BMYX.dtype}")
    objects, height, width = object_OYX.shape
    modes, rows, columns = light_BMYX.shape[1:]
    out = torch.empty(len(corner_B2), objects, modes, rows, columns, dtype=torch.complex64, device=object_OYX.device)
    grid = (len(corner_B2) * objects * modes, triton.cdiv(rows * columns, PIXELS))
    own = modes * rows * columns if len(light_BMYX) > 1 else 0
    if out.numel():
        image, light = (torch.view_as_real(one.resolve_conj().contiguous()) for one in (object_OYX, light_BMYX))
        sizes = (objects, modes, height, width, rows, columns, own)
        _gather_kernel[grid](image, corner_B2.contiguous(), light, torch.view_as_real(out), *sizes, PIXELS)
    return out
