"""`descend`, `follow` and `best_lengths` on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.descend.reference import LEAST, RIDGE

NUMBERS = 2048  # of one program: real and imaginary parts of half as many pixels
POSITIONS = 128  # that `best_lengths` takes at a time


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
    tl.store(curvature + pixel, tl.zeros_like(bottom), mask=inside & (number % 2 == 0))  # by a warp that has read it


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
