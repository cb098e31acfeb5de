"""`spectra` as a physicist would write it; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks


def spectra_reference(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See README.md: (cross [B, S], power [B, S]) in the precision of `weight_BK`."""
    image_R2K, blocks = blocks.with_rows(images)
    dtype = weight_BK.dtype
    cross_BK, power_BK = torch.zeros_like(weight_BK), torch.zeros_like(weight_BK)
    for i in range(blocks.particles):
        slices, shifts, where = blocks.lists(i)
        p_NM = posterior_N[where].to(dtype).view(len(slices), len(shifts))
        reference_N2K = slices_U2K[slices].to(dtype)
        image_N2K = (p_NM @ image_R2K[shifts].to(dtype).flatten(1)).unflatten(1, (2, -1))
        cross_BK[i] = (image_N2K * reference_N2K).sum((0, 1))
        power_BK[i] = weight_BK[i] * (p_NM.sum(1) @ reference_N2K.square().sum(1))
    return sum_shells(cross_BK, shell_K, n_shells), sum_shells(power_BK, shell_K, n_shells)


def sum_shells(values_BK: Tensor, shell_K: Tensor, n_shells: int) -> Tensor:
    """[B, K] -> [B, n_shells]; coefficients of shells beyond are left out."""
    inside_K = shell_K < n_shells
    return values_BK.new_zeros(len(values_BK), n_shells).index_add_(1, shell_K[inside_K], values_BK[:, inside_K])
