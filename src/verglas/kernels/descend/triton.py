"""`dose`, `descend`, `follow` and `best_lengths` on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.descend.reference import LEAST, RIDGE

NUMBERS = 2048  # of one program: real and imaginary parts of half as many pixels
POSITIONS = 128  # that `best_lengths` takes at a time
TILE = (64, 64)  # px of a program of `dose`; smaller ones look through more positions than they add up


@triton.jit(do_not_specialize=["batch", "modes", "height", "width"])
def _dose_kernel(
    light, corner, scale, into, most, batch, modes, height, width, rows, columns, TILE_Y: tl.constexpr, TILE_X: tl.constexpr
):  # fmt: skip
    """Every program goes through all positions and takes those that meet its tile, in their order."""
    top, left = tl.program_id(0) * TILE_Y, tl.program_id(1) * TILE_X
    y, x = top + tl.arange(0, TILE_Y), left + tl.arange(0, TILE_X)
    total = tl.zeros([TILE_Y, TILE_X], tl.float32)
    for b in range(batch):
        row, column = tl.cast(tl.load(corner + 2 * b), tl.int32), tl.cast(tl.load(corner + 2 * b + 1), tl.int32)
        if (row < top + TILE_Y) & (row + rows > top) & (column < left + TILE_X) & (column + columns > left):
            down, right = (y - row)[:, None], (x - column)[None, :]
            lit = (down >= 0) & (down < rows) & (right >= 0) & (right < columns)
            bright = tl.load(scale + b)
            for m in range(modes):
                at = light + 2 * ((m * rows + down) * columns + right)
                real, imaginary = tl.load(at, mask=lit, other=0.0), tl.load(at + 1, mask=lit, other=0.0)
                total += bright * (real * real + imaginary * imaginary)
    pixel = tl.cast(y, tl.int64)[:, None] * width + x[None, :]
    tl.store(into + pixel, total, mask=(y < height)[:, None] & (x < width)[None, :])
    tl.atomic_max(most, tl.max(tl.max(total, 1), 0), sem="relaxed")


@triton.jit(do_not_specialize=["planes", "damping", "length"])
def _descend_kernel(
    value, gradient, curvature, most, damping, length, planes, pixels,
    INTO: tl.constexpr, TINY: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    start = tl.cast(tl.program_id(0), tl.int64) * NUMBERS
    number = start + tl.arange(0, NUMBERS)
    pixel = start // 2 + tl.arange(0, NUMBERS) // 2
    inside = pixel < pixels
    bottom = 2 * (1 - damping) * tl.load(curvature + pixel, mask=inside, other=1.0) + 2 * damping * tl.load(most)
    factor = -length / tl.maximum(bottom, TINY)
    apart = 2 * tl.cast(pixels, tl.int64)
    for plane in range(planes):
        here = plane * apart + number
        step = tl.load(gradient + here, mask=inside, other=0.0) * factor
        if INTO:
            tl.store(value + here, tl.load(value + here, mask=inside, other=0.0) + step, mask=inside)
            step = tl.zeros_like(step)
        tl.store(gradient + here, step, mask=inside)


@triton.jit
def _follow_kernel(value, step, factor, numbers, NUMBERS: tl.constexpr):
    number = tl.cast(tl.program_id(0), tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = number < numbers
    change = tl.load(step + number, mask=inside, other=0.0) * tl.cast(tl.load(factor), tl.float32)
    tl.store(value + number, tl.load(value + number, mask=inside, other=0.0) + change, mask=inside)
    tl.store(step + number, tl.zeros_like(change), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _lengths_kernel(product, out, count, RIDGE: tl.constexpr, LEAST: tl.constexpr, POSITIONS: tl.constexpr):
    of_object = tl.zeros([POSITIONS], tl.float64)
    weights = tl.zeros([POSITIONS], tl.float64)
    of_probe = tl.zeros([POSITIONS], tl.float64)
    for start in range(0, count, POSITIONS):
        b = start + tl.arange(0, POSITIONS)
        here = b < count
        weight = tl.load(product + 5 * b, mask=here, other=0.0)
        aa = weight * (1 + RIDGE)
        pp = tl.load(product + 5 * b + 1, mask=here, other=0.0) * (1 + RIDGE)
        ap = tl.load(product + 5 * b + 2, mask=here, other=0.0)
        ac = tl.load(product + 5 * b + 3, mask=here, other=0.0) * -0.5
        pc = tl.load(product + 5 * b + 4, mask=here, other=0.0) * -0.5
        determinant = tl.maximum(aa * pp - ap * ap, LEAST)
        s = tl.where(pp > 0, (pp * ac - ap * pc) / determinant, ac / tl.maximum(aa, LEAST))
        of_object += s * weight
        weights += weight
        of_probe += tl.where(pp > 0, (aa * pc - ap * ac) / determinant, 0.0)
    tl.store(out, tl.sum(of_object))
    tl.store(out + 1, tl.sum(weights))
    tl.store(out + 2, tl.sum(of_probe))
    tl.store(out + 3, tl.cast(count, tl.float64))


def dose_triton(light_MYX: Tensor, corner_B2: Tensor, scale_B: Tensor, into_YX: Tensor) -> Tensor:
    """See README.md; complex64 and float32, contiguous (TypeError for others)."""
    _check(light_MYX)
    modes, rows, columns = light_MYX.shape
    height, width = into_YX.shape
    most = into_YX.new_zeros(())
    grid = (triton.cdiv(height, TILE[0]), triton.cdiv(width, TILE[1]))
    light, corner_B2 = torch.view_as_real(light_MYX), corner_B2.contiguous()
    _dose_kernel[grid](light, corner_B2, scale_B, into_YX, most, len(corner_B2), modes, height, width, rows, columns, *TILE)
    return most


def descend_triton(
    value_PYX: Tensor | None, gradient_PYX: Tensor, curvature_YX: Tensor, most: Tensor, damping: float, length: float
) -> None:
    """See README.md; complex64 and float32, contiguous (TypeError for others)."""
    _check(gradient_PYX, *(() if value_PYX is None else (value_PYX,)))
    gradient = torch.view_as_real(gradient_PYX)
    value = gradient if value_PYX is None else torch.view_as_real(value_PYX)
    planes, pixels, tiny = len(gradient_PYX), curvature_YX.numel(), torch.finfo(torch.float32).tiny
    grid = (triton.cdiv(2 * pixels, NUMBERS),)
    _descend_kernel[grid](
        value, gradient, curvature_YX, most, damping, length, planes, pixels, value_PYX is not None, tiny, NUMBERS
    )


def follow_triton(value_PYX: Tensor, step_PYX: Tensor, factor: Tensor) -> None:
    """See README.md; complex64, contiguous (TypeError for others)."""
    _check(value_PYX, step_PYX)
    numbers = 2 * value_PYX.numel()
    grid = (triton.cdiv(numbers, NUMBERS),)
    _follow_kernel[grid](torch.view_as_real(value_PYX), torch.view_as_real(step_PYX), factor, numbers, NUMBERS)


def best_lengths_triton(product_B5: Tensor) -> Tensor:
    """See README.md; float64, contiguous."""
    out_4 = product_B5.new_empty(4)
    _lengths_kernel[(1,)](product_B5, out_4, len(product_B5), RIDGE, LEAST, POSITIONS)
    return out_4


def _check(*several: Tensor) -> None:
    if any(one.dtype != torch.complex64 or not one.is_contiguous() for one in several):
        raise TypeError(f"contiguous complex64, got {[one.dtype for one in several]}: they are changed in place")
