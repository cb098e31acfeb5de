"""`scatter` on the GPU: a program takes pixels of the window in a group of positions; light is summed in registers over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, GROUP = 256, 16  # pixels and positions of a program


@triton.jit(do_not_specialize=["batch", "objects", "modes", "height", "width", "own", "own_out"])
def _scatter_kernel(
    wave, corner, seen, light, image, out, batch, objects, modes, height, width, rows, columns, own, own_out,
    WITH_OBJECT: tl.constexpr, PIXELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """own: pixels from one position's light to the next; 0: one light for all. own_out: the same of `out`."""
    m, size = tl.program_id(2), rows * columns
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < size
    sum_re, sum_im = tl.zeros([PIXELS], tl.float32), tl.zeros([PIXELS], tl.float32)
    into = out + 2 * (m * size + pixel)
    for i in range(GROUP):
        b = tl.program_id(0) * GROUP + i
        here = inside & (b < batch)
        y = tl.load(corner + 2 * b, mask=b < batch, other=0) + pixel // columns
        x = tl.load(corner + 2 * b + 1, mask=b < batch, other=0) + pixel % columns
        lit = light + 2 * (tl.cast(b, tl.int64) * own + m * size + pixel)
        light_re, light_im = tl.load(lit, mask=here, other=0.0), tl.load(lit + 1, mask=here, other=0.0)
        for o in range(objects):
            part = wave + 2 * (((tl.cast(b, tl.int64) * objects + o) * modes + m) * size + pixel)
            re, im = tl.load(part, mask=here, other=0.0), tl.load(part + 1, mask=here, other=0.0)
            at = 2 * ((o * height + y) * width + x)
            passed_re, passed_im = tl.load(seen + at, mask=here, other=0.0), tl.load(seen + at + 1, mask=here, other=0.0)
            sum_re += passed_re * re + passed_im * im
            sum_im += passed_re * im - passed_im * re
            if WITH_OBJECT:
                tl.atomic_add(image + at, light_re * re + light_im * im, mask=here, sem="relaxed")
                tl.atomic_add(image + at + 1, light_re * im - light_im * re, mask=here, sem="relaxed")
        if own_out:
            tl.store(into + 2 * tl.cast(b, tl.int64) * own_out, sum_re, mask=here)
            tl.store(into + 2 * tl.cast(b, tl.int64) * own_out + 1, sum_im, mask=here)
            sum_re, sum_im = sum_re * 0, sum_im * 0
    if own_out == 0:
        tl.atomic_add(into, sum_re, mask=inside, sem="relaxed")
        tl.atomic_add(into + 1, sum_im, mask=inside, sem="relaxed")


def scatter_triton(
    exit_BOMYX: Tensor, corner_B2: Tensor, seen_OYX: Tensor, light_BMYX: Tensor, object_OYX: Tensor | None
) -> Tensor:
    """See README.md; complex64, the object contiguous (TypeError for others)."""
    given = [exit_BOMYX, seen_OYX, light_BMYX] + ([] if object_OYX is None else [object_OYX])
    if any(one.dtype != torch.complex64 for one in given) or (object_OYX is not None and not object_OYX.is_contiguous()):
        raise TypeError(f"the Triton kernel takes complex64, the object contiguous; got {[one.dtype for one in given]}")
    batch, objects, modes, rows, columns = exit_BOMYX.shape
    out = torch.zeros(light_BMYX.shape, dtype=torch.complex64, device=light_BMYX.device)
    wave, seen, light = (torch.view_as_real(one.resolve_conj().contiguous()) for one in given[:3])
    image = seen if object_OYX is None else torch.view_as_real(object_OYX)
    own = modes * rows * columns if len(light_BMYX) > 1 else 0
    if batch:
        grid = (triton.cdiv(batch, GROUP), triton.cdiv(rows * columns, PIXELS), modes)
        _scatter_kernel[grid](
            wave, corner_B2.contiguous(), seen, light, image, torch.view_as_real(out), batch, objects, modes, *seen_OYX.shape[1:],
            rows, columns, own, own, WITH_OBJECT=object_OYX is not None, PIXELS=PIXELS, GROUP=GROUP,
        )  # fmt: skip
    return out
