"""`farfield` by transforms of whole arrays; any device, any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fft import fft2, fftfreq, ifft2

from verglas.kernels.along.reference import along_reference as misfit_along
from verglas.kernels.farfield import Counted, Gradient, Lit, Step
from verglas.kernels.gather.reference import gather_reference
from verglas.kernels.patches.reference import patches_reference
from verglas.kernels.scatter.reference import scatter_reference


def farfield_reference(
    lit: Lit, counted: Counted, object_gradient_YX: Tensor | None, with_light: bool, light_curvature_YX: Tensor | None
) -> Gradient:
    """See README.md."""
    exit_BMYX, sums_3 = exit_gradient(lit, counted)
    into = None if object_gradient_YX is None else object_gradient_YX[None]
    light_BMYX = light_of(lit.light_MYX, lit)
    of_light = scatter_reference(exit_BMYX[:, None], lit.corner_B2, lit.object_YX[None], light_BMYX, into)
    if light_curvature_YX is not None:
        rows, columns = light_curvature_YX.shape
        patch_BYX = patches_reference(lit.object_YX[None, None], lit.corner_B2, (rows, columns))[:, 0, 0]
        light_curvature_YX.add_((counted.scale_N[counted.rows_B, None, None] * patch_BYX.abs().square()).sum(0))
    return Gradient(sums_3, unmoved(of_light, lit) if with_light else None, exit_BMYX)


def exit_gradient(lit: Lit, counted: Counted) -> tuple[Tensor, Tensor]:
    """([B, M, Y, X] gradient of the exit waves, [3] sums)."""
    wave_BMYX = at_detector(lit.object_YX, light_of(lit.light_MYX, lit), lit.corner_B2)
    counts_BYX, scale_B11, noise = counts_of(counted), counted.scale_N[counted.rows_B, None, None], counted.noise
    intensity_BYX = scale_B11 * wave_BMYX.abs().square().sum(1) + counted.background_YX
    slope_BYX = 2 * scale_B11 * noise.slope(intensity_BYX, counts_BYX) * counted.weight_YX
    apart_BYX = (intensity_BYX.clamp_min(0).sqrt() - counts_BYX.sqrt()).square()
    terms = (noise.loss(intensity_BYX, counts_BYX), apart_BYX, counts_BYX)
    sums_3 = torch.stack([(term * counted.weight_YX).sum(dtype=torch.float64) for term in terms])
    return ifft2(slope_BYX[:, None] * wave_BMYX, norm="ortho"), sums_3


def products_reference(lit: Lit, step: Step, counted: Counted, exit_BMYX: Tensor | None) -> Tensor:
    """See README.md."""
    c = exit_gradient(lit, counted)[0] if exit_BMYX is None else exit_BMYX
    a = gather_reference(step.object_YX[None], lit.corner_B2, light_of(lit.light_MYX, lit))[:, 0]
    p = torch.zeros_like(a)
    if step.light_MYX is not None:
        p = gather_reference(lit.object_YX[None], lit.corner_B2, light_of(step.light_MYX, lit))[:, 0]
    pairs = ((a, a), (p, p), (a, p), (a, c), (p, c))
    return torch.stack([(one.conj() * other).real.sum((1, 2, 3), dtype=torch.float64) for one, other in pairs], 1)


def along_reference(lit: Lit, step: Step, counted: Counted, length_K: Tensor) -> Tensor:
    """See README.md."""
    light_BMYX = light_of(lit.light_MYX, lit)
    waves = [at_detector(one_YX, light_BMYX, lit.corner_B2) for one_YX in (lit.object_YX, step.object_YX)]
    if step.light_MYX is not None:
        change_BMYX = light_of(step.light_MYX, lit)
        waves[1] = waves[1] + at_detector(lit.object_YX, change_BMYX, lit.corner_B2)
        waves.append(at_detector(step.object_YX, change_BMYX, lit.corner_B2))
    scale_B11 = counted.scale_N[counted.rows_B, None, None]
    coefficients = [torch.zeros_like(counted.background_YX) for _ in range(2 * len(waves) - 1)]
    for i, first in enumerate(waves):
        for j, second in enumerate(waves):
            coefficients[i + j] = coefficients[i + j] + scale_B11 * (first.conj() * second).real.sum(1)
    coefficients[0] = coefficients[0] + counted.background_YX
    stacked, counts_BYX = torch.stack(coefficients), counts_of(counted)
    return torch.stack([misfit_along(stacked, counts_BYX, counted.weight_YX, t, counted.noise) for t in length_K.tolist()])


def light_of(light_MYX: Tensor, lit: Lit) -> Tensor:
    """[1 or B, M, Y, X] light at the positions, moved by their fractions."""
    if lit.fraction_B2 is None:
        return light_MYX[None]
    return ifft2(light_MYX * ramp(lit, light_MYX), norm="ortho")


def unmoved(light_BMYX: Tensor, lit: Lit) -> Tensor:
    """[M, Y, X]: the adjoint of `light_of`."""
    if lit.fraction_B2 is None:
        return light_BMYX[0]
    return (fft2(light_BMYX, norm="ortho") * ramp(lit, light_BMYX).conj()).sum(0)


def ramp(lit: Lit, like: Tensor) -> Tensor:
    """[B, 1, Y, X] exp(-2 pi i k.fraction), taken in float64."""
    assert lit.fraction_B2 is not None
    frequency = [fftfreq(edge, dtype=torch.float64, device=like.device) for edge in like.shape[-2:]]
    row_BY, column_BX = (torch.exp(-2j * math.pi * k * lit.fraction_B2[:, i, None]) for i, k in enumerate(frequency))
    return (row_BY[:, None, :, None] * column_BX[:, None, None, :]).to(like.dtype)


def at_detector(object_YX: Tensor, light_BMYX: Tensor, corner_B2: Tensor) -> Tensor:
    """[B, M, Y, X] waves."""
    return fft2(gather_reference(object_YX[None], corner_B2, light_BMYX)[:, 0], norm="ortho")


def counts_of(counted: Counted) -> Tensor:
    """[B, Y, X] in the precision of the weights."""
    some_BYX = counted.counts_NYX[counted.rows_B]
    if some_BYX.dtype == torch.int16:
        some_BYX = some_BYX.view(torch.uint16)
    return torch.nan_to_num(some_BYX.to(counted.weight_YX.dtype), 0.0, 0.0, 0.0) * counted.weight_YX
