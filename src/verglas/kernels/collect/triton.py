"""`collect` on the GPU: weights (slices x shifts) @ images (shifts x coefficients) on the tensor cores, then atomic adds.

* A program takes one particle and some patches of coefficients and runs through the particle's slices; the images of a patch
  are read once for all of them. Particles that share a slice meet in the table without a sort, and the shifts are summed
  before anything is written. What is written limits the speed: three float32 sums for each coefficient of each pair of
  particle and slice. Sums are not repeatable to the last bit.
* float16 images: the weights enter as two float16 halves (22 bits) relative to the largest weight of the slice.
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
def _collect_kernel(
    posterior, images, weight, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr, data_out, total_out,
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
        w = tl.load(weight + i * n_coefficients + k, mask=inside, other=0.0)
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
                if HALF:
                    re = tl.dot(low, re_MK, tl.dot(high, re_MK)) * unit[:, None]
                    im = tl.dot(low, im_MK, tl.dot(high, im_MK)) * unit[:, None]
                else:
                    re = tl.dot(high, re_MK, input_precision="tf32x3")
                    im = tl.dot(high, im_MK, input_precision="tf32x3")
                used = total > 0
                u = tl.load(slice_list + slice_0 + a, mask=used, other=0).to(tl.int64)
                mask = used[:, None] & inside[None, :]
                data_at = data_out + (u * row)[:, None] + k[None, :]
                tl.atomic_add(data_at, re, mask=mask, sem="relaxed")
                tl.atomic_add(data_at + n_coefficients, im, mask=mask, sem="relaxed")
                total_at = total_out + (u * n_coefficients)[:, None] + k[None, :]
                tl.atomic_add(total_at, total[:, None] * w[None, :], mask=mask, sem="relaxed")


def collect_triton(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, blocks: Blocks, data_U2K: Tensor, total_UK: Tensor
) -> None:
    """See `collect_reference`; images in float16 or float32, everything else in float32, tables contiguous."""
    if images.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"the Triton kernel reads float16 or float32 images, got {images.dtype}")
    for table in (data_U2K, total_UK):
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise TypeError(f"the Triton kernel adds to contiguous float32 tables, got {table.dtype}")
    posterior, weight = posterior_N.float().contiguous(), weight_BK.float().contiguous()
    images, blocks = blocks.with_rows(images.contiguous())
    n_coefficients = images.shape[2]
    at_once, patches = tile_of_weights(blocks, len(posterior)), patches_at_once(blocks.particles, n_coefficients)
    if blocks.particles:
        _collect_kernel[(blocks.particles, triton.cdiv(n_coefficients, COEFFICIENTS * patches))](
            posterior, images, weight, blocks.slice_N, blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1,
            blocks.value_ptr_B1, data_U2K, total_UK, n_coefficients, patches,
            SLICES=at_once[0], SHIFTS=at_once[1], COEFFICIENTS=COEFFICIENTS, HALF=images.dtype == torch.float16,
            num_warps=4, num_stages=1,
        )  # fmt: skip
