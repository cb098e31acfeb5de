"""`compare` as a physicist would write it; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks


def compare_reference(images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks) -> Tensor:
    """See README.md; in the precision of `weight_BK`."""
    image_R2K, blocks = blocks.with_rows(images)
    dtype = weight_BK.dtype
    score = torch.empty(blocks.samples, dtype=dtype, device=weight_BK.device)
    for i in range(blocks.particles):
        slices, shifts, where = blocks.lists(i)
        reference_N2K = slices_U2K[slices].to(dtype)
        cross_NM = reference_N2K.flatten(1) @ image_R2K[shifts].to(dtype).flatten(1).T
        power_N = reference_N2K.square().sum(1) @ weight_BK[i]
        score[where] = (cross_NM - 0.5 * power_N[:, None]).flatten()
    return score
