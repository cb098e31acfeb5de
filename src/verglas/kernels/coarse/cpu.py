"""`coarse` on the CPU: two matrix products of torch in single precision, then the compiled passes of `significant` and `keep`."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.coarse.reference import Orientations
from verglas.kernels.keep.cpu import keep_cpu
from verglas.kernels.keep.reference import Kept
from verglas.kernels.significant.cpu import significant_cpu
from verglas.kernels.significant.reference import Significance


def coarse_cpu(
    images_BTL: Tensor, weight_BK: Tensor, log_offset_BT: Tensor, orientations: Orientations, fraction: float
) -> tuple[Kept, Significance]:
    """See README.md; scores and sums of products in float32."""
    (particles, shifts, _), count = images_BTL.shape, len(orientations.slices_OL)
    score_BTO = (images_BTL.float().flatten(0, 1) @ orientations.slices_OL.float().T).unflatten(0, (particles, shifts))
    score_BTO += (orientations.log_prior_O - 0.5 * (weight_BK.float() @ orientations.power.whole().float().T))[:, None]
    score_N = score_BTO.add_(log_offset_BT[:, :, None]).flatten()
    ptr_B1 = torch.arange(particles + 1)
    slice_N, shift_M = torch.arange(count).repeat(particles), torch.arange(shifts).repeat(particles)
    blocks = Blocks.build(ptr_B1 * count, slice_N, ptr_B1 * shifts, shift_M)
    found = significant_cpu(score_N, blocks.value_ptr_B1, fraction)
    return keep_cpu(score_N, blocks, found.threshold_B, by_shift=True), found
