"""`farfield` on the CPU: torch's transforms, and between them Numba's loops over pixels instead of walks through memory."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor
from torch.fft import fft2, ifft2

from verglas.kernels.along import FLOOR
from verglas.kernels.along.cpu import along_cpu as misfit_along
from verglas.kernels.farfield import Counted, Gradient, Lit, Step
from verglas.kernels.farfield.reference import counts_of, light_of, unmoved
from verglas.kernels.gather.cpu import gather_cpu
from verglas.kernels.scatter.cpu import scatter_cpu


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _slopes(wave, counts, weight, scale, background, offset, poisson, floor, out):
    """wave [B, M, P] *= slope; out [B, 3]: loss, mismatch, counted."""
    for b in numba.prange(len(wave)):
        loss_sum = mismatch = counted = 0.0
        for p in range(wave.shape[2]):
            power = 0.0
            for m in range(wave.shape[1]):
                power += wave[b, m, p].real ** 2 + wave[b, m, p].imag ** 2
            intensity, n, good = scale[b] * power + background[p], np.float64(counts[b, p]), weight[p]
            apart = math.sqrt(max(intensity, 0.0)) - math.sqrt(n)
            mismatch += good * apart * apart
            counted += good * n
            if poisson:
                now = max(intensity, floor)
                loss_sum += good * (now - n + (n * math.log(n / now) if n > 0 else 0.0))
                slope = 1.0 - n / now
            else:
                root, wanted = math.sqrt(max(intensity + offset, floor)), math.sqrt(n + offset)
                loss_sum += good * (root - wanted) ** 2
                slope = 1.0 - wanted / root
            factor = weight.dtype.type(2.0 * scale[b] * good * slope)
            for m in range(wave.shape[1]):
                wave[b, m, p] *= factor
        out[b, 0], out[b, 1], out[b, 2] = loss_sum, mismatch, counted


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _coefficients(waves, scale, background, out):
    """out [D, B, P]: scale |waves[0] + t waves[1] + t^2 waves[2]|^2 + background, modes summed; waves [W, B, M, P]."""
    for b in numba.prange(waves.shape[1]):
        for p in range(waves.shape[3]):
            for i in range(waves.shape[0]):
                for j in range(waves.shape[0]):
                    total = 0.0
                    for m in range(waves.shape[2]):
                        first, second = waves[i, b, m, p], waves[j, b, m, p]
                        total += first.real * second.real + first.imag * second.imag
                    out[i + j, b, p] += scale[b] * total
            out[0, b, p] += background[p]


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _object_over_light(image, corner, scale, out):
    """out [rows, columns] += scale |object|^2 of the windows at corners."""
    for y in numba.prange(len(out)):
        for b in range(len(corner)):
            for x in range(out.shape[1]):
                one = image[corner[b, 0] + y, corner[b, 1] + x]
                out[y, x] += scale[b] * (one.real * one.real + one.imag * one.imag)


def farfield_cpu(
    lit: Lit, counted: Counted, object_gradient_YX: Tensor | None, with_light: bool, light_curvature_YX: Tensor | None
) -> Gradient:
    """See README.md; float32 or float64."""
    exit_BMYX, sums_3 = _exit_gradient(lit, counted)
    into = None if object_gradient_YX is None else object_gradient_YX[None]
    light_BMYX = light_of(lit.light_MYX, lit)
    of_light = scatter_cpu(exit_BMYX[:, None], lit.corner_B2, lit.object_YX[None], light_BMYX, into)
    if light_curvature_YX is not None:
        image, corner = lit.object_YX.contiguous().numpy(), lit.corner_B2.contiguous().numpy()
        _object_over_light(image, corner, counted.scale_N[counted.rows_B].numpy(), light_curvature_YX.numpy())
    return Gradient(sums_3, unmoved(of_light, lit) if with_light else None, exit_BMYX)


def _exit_gradient(lit: Lit, counted: Counted) -> tuple[Tensor, Tensor]:
    """([B, M, Y, X] gradient of the exit waves, [3] sums)."""
    wave_BMYX = _at_detector(lit.object_YX, light_of(lit.light_MYX, lit), lit.corner_B2)
    out_B3 = np.empty((len(wave_BMYX), 3))
    noise, scale_B = counted.noise, counted.scale_N[counted.rows_B]
    arrays = (counts_of(counted).flatten(1), counted.weight_YX.flatten(), scale_B, counted.background_YX.flatten())
    counts, weight, scale, background = (one.contiguous().numpy() for one in arrays)
    wave = wave_BMYX.flatten(2).numpy()
    _slopes(wave, counts, weight, scale, background, float(noise.offset), noise.poisson, FLOOR, out_B3)
    return ifft2(wave_BMYX, norm="ortho"), torch.from_numpy(out_B3.sum(0))


def products_cpu(lit: Lit, step: Step, counted: Counted, exit_BMYX: Tensor | None) -> Tensor:
    """See README.md; float32 or float64."""
    parts = [gather_cpu(step.object_YX[None], lit.corner_B2, light_of(lit.light_MYX, lit))[:, 0]]
    if step.light_MYX is not None:
        parts.append(gather_cpu(lit.object_YX[None], lit.corner_B2, light_of(step.light_MYX, lit))[:, 0])
    parts.append(_exit_gradient(lit, counted)[0] if exit_BMYX is None else exit_BMYX)
    number_PBN = torch.stack([torch.view_as_real(one).flatten(1) for one in parts])
    gram_BPP = torch.einsum("pbn,qbn->bpq", number_PBN, number_PBN).double()
    out_B5 = torch.zeros(len(lit.corner_B2), 5, dtype=torch.float64)
    pairs = ((0, 0), (1, 1), (0, 1), (0, 2), (1, 2)) if len(parts) == 3 else ((0, 0), None, None, (0, 1), None)
    for number, pair in enumerate(pairs):
        if pair is not None:
            out_B5[:, number] = gram_BPP[:, pair[0], pair[1]]
    return out_B5


def along_cpu(lit: Lit, step: Step, counted: Counted, length_K: Tensor) -> Tensor:
    """See README.md; float32 or float64."""
    given = (coefficients_cpu(lit, step, counted), counts_of(counted), counted.weight_YX)
    return torch.stack([misfit_along(*given, t, counted.noise) for t in length_K.tolist()])


def coefficients_cpu(lit: Lit, step: Step, counted: Counted) -> Tensor:
    """[D, B, Y, X] of the predicted counts along a step."""
    light_BMYX = light_of(lit.light_MYX, lit)
    waves = [_at_detector(one_YX, light_BMYX, lit.corner_B2) for one_YX in (lit.object_YX, step.object_YX)]
    if step.light_MYX is not None:
        change_BMYX = light_of(step.light_MYX, lit)
        waves[1] += _at_detector(lit.object_YX, change_BMYX, lit.corner_B2)
        waves.append(_at_detector(step.object_YX, change_BMYX, lit.corner_B2))
    out = torch.zeros(2 * len(waves) - 1, len(lit.corner_B2), *counted.weight_YX.shape, dtype=counted.weight_YX.dtype)
    scale_B, background_P = counted.scale_N[counted.rows_B], counted.background_YX.contiguous().flatten()
    _coefficients(torch.stack(waves).flatten(3).numpy(), scale_B.numpy(), background_P.numpy(), out.flatten(2).numpy())
    return out


def _at_detector(object_YX: Tensor, light_BMYX: Tensor, corner_B2: Tensor) -> Tensor:
    return fft2(gather_cpu(object_YX[None], corner_B2, light_BMYX)[:, 0], norm="ortho")
