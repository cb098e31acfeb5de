"""`spectra` on the GPU: a program takes one particle and some patches of coefficients and runs through the particle's slices.

* Weights (slices x shifts) @ images (shifts x coefficients) on the tensor cores gives for each slice the image that its poses
  expect; times the slice that is the cross term, and |P|^2 is summed beside it, both in float32. The images of a patch are
  read once for all slices.
* float16: the weights enter as two float16 halves (22 bits) relative to the largest weight of their slice.
* Shells are summed as a product with the 0/1 matrix of coefficients and shells: no atomics, repeatable.
* Particles with more shifts than are taken at once go through them in several rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.tasks import COEFFICIENTS, load_weights, patches_at_once, tile_of_weights


@triton.jit(do_not_specialize=["patches"])
def _spectra_kernel(
    posterior, images, weight, slices, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr, cross_out, power_out,
    n_coefficients, patches,
    SLICES: tl.constexpr, SHIFTS: tl.constexpr, COEFFICIENTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    n, m = (tl.load(slice_ptr + i + 1) - slice_0).to(tl.int32), (tl.load(shift_ptr + i + 1) - shift_0).to(tl.int32)
    own = posterior + tl.load(value_ptr + i)
    row = 2 * tl.cast(n_coefficients, tl.int64)
    first_patch = tl.program_id(1) * patches
    for patch in range(first_patch, tl.minimum(first_patch + patches, tl.cdiv(n_coefficients, COEFFICIENTS))):
        k = patch * COEFFICIENTS + tl.arange(0, COEFFICIENTS)
        inside = k < n_coefficients
        cross = tl.zeros([SLICES, COEFFICIENTS], tl.float32)
        power = tl.zeros([SLICES, COEFFICIENTS], tl.float32)
        for first_shift in range(0, m, SHIFTS):
            t = first_shift + tl.arange(0, SHIFTS)
            image = tl.load(shift_list + shift_0 + t, mask=t < m, other=0).to(tl.int64)
            image_at = images + (image * row)[:, None] + k[None, :]
            image_mask = (t < m)[:, None] & inside[None, :]
            re_MK = tl.load(image_at, mask=image_mask, other=0.0)
            im_MK = tl.load(image_at + n_coefficients, mask=image_mask, other=0.0)
            for first in range(0, n, SLICES):
                a = first + tl.arange(0, SLICES)
                high, low, unit, total = load_weights(own, a, n, t, m, HALF)
                used = total > 0
                u = tl.load(slice_list + slice_0 + a, mask=used, other=0).to(tl.int64)
                slice_at = slices + (u * row)[:, None] + k[None, :]
                slice_mask = used[:, None] & inside[None, :]
                re = tl.load(slice_at, mask=slice_mask, other=0.0).to(tl.float32)
                im = tl.load(slice_at + n_coefficients, mask=slice_mask, other=0.0).to(tl.float32)
                if HALF:
                    expected_re, expected_im = tl.dot(low, re_MK, tl.dot(high, re_MK)), tl.dot(low, im_MK, tl.dot(high, im_MK))
                    cross += (expected_re * re + expected_im * im) * unit[:, None]
                else:
                    cross += tl.dot(high, re_MK, input_precision="tf32x3") * re
                    cross += tl.dot(high, im_MK, input_precision="tf32x3") * im
                power += (re * re + im * im) * total[:, None]
        at = i * n_coefficients + k
        w = tl.load(weight + at, mask=inside, other=0.0)
        tl.store(cross_out + at, tl.sum(cross, 0), mask=inside)
        tl.store(power_out + at, tl.sum(power, 0) * w, mask=inside)


def spectra_triton(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `spectra_reference`; images and slices both in float16 or both in float32, everything else in float32."""
    dtype = slices_U2K.dtype
    if dtype not in (torch.float16, torch.float32) or images.dtype != dtype:
        raise TypeError(f"images and slices must both be float16 or both float32, got {images.dtype} and {dtype}")
    images, blocks = blocks.with_rows(images.contiguous())
    posterior, slices = posterior_N.float().contiguous(), slices_U2K.contiguous()
    weight = weight_BK.float().contiguous()
    n_coefficients = images.shape[2]
    cross_and_power_2BK = torch.empty(2, blocks.particles, n_coefficients, device=slices.device)
    at_once, patches = tile_of_weights(blocks, len(posterior)), patches_at_once(blocks.particles, n_coefficients)
    if blocks.particles:
        _spectra_kernel[(blocks.particles, triton.cdiv(n_coefficients, COEFFICIENTS * patches))](
            posterior, images, weight, slices, blocks.slice_N, blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1,
            blocks.value_ptr_B1, *cross_and_power_2BK, n_coefficients, patches,
            SLICES=at_once[0], SHIFTS=at_once[1], COEFFICIENTS=COEFFICIENTS, HALF=dtype == torch.float16,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    in_shell_KS = (shell_K[:, None] == torch.arange(n_shells, device=shell_K.device)).float()
    cross_BS, power_BS = (cross_and_power_2BK.flatten(0, 1) @ in_shell_KS).unflatten(0, (2, -1))
    return cross_BS, power_BS
