"""Scores of samples: products and correlations that give them, how many count, where in the lists one of them stands."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.compare import compare
from verglas.kernels.significant import Significance


def correlations(images: Tensor, weight_BK: Tensor, table: Tensor, blocks: Blocks) -> Tensor:
    """Re sum P* X / sqrt(sum W |P|^2) of the samples of the blocks, of which images and table are as `compare` wants them."""
    cross_N = compare(images, torch.zeros_like(weight_BK), table, blocks)
    power_N = compare(torch.zeros_like(images), weight_BK, table, blocks) * -2
    return cross_N * power_N.clamp_min(1e-30).rsqrt()


def at_most(most: int, score_BN: Tensor, found: Significance) -> Significance:
    """With the threshold raised so that no particle has more than about `most` significant samples (equal scores aside)."""
    if most >= score_BN.shape[1]:
        return found
    least_B = score_BN.topk(most, dim=1).values[:, -1].double()
    return replace(
        found, threshold_B=torch.maximum(found.threshold_B, least_B), count_B=found.count_B.clamp_max(most)
    )  # fmt: skip


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T [M, N] with sums and result in single precision at least, whatever the operands' precision."""
    if a_MK.dtype == torch.float16:
        return torch.mm(a_MK, b_NK.T, out_dtype=torch.float32)
    return a_MK @ b_NK.T


def locate_samples(blocks: Blocks, position_B: Tensor) -> tuple[Tensor, Tensor]:
    """(slice_N entry, shift_M entry) of one sample of each particle, given by its position."""
    within_B = position_B - blocks.value_ptr_B1[:-1]
    shifts_B = blocks.shift_ptr_B1.diff()
    a_B = torch.div(within_B, shifts_B, rounding_mode="floor")
    slice_B = blocks.slice_N[blocks.slice_ptr_B1[:-1] + a_B].long()
    return slice_B, blocks.shift_M[blocks.shift_ptr_B1[:-1] + within_B - a_B * shifts_B].long()
