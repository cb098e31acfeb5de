"""`coarse` in plain torch, any device: all scores of a batch in memory, then `significant` and `keep`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.keep.reference import Kept, keep_reference
from verglas.kernels.significant.reference import Significance, significant_reference

ALIGNED = 256  # rows of `Power` are filled up to a multiple of this


@dataclass(frozen=True)
class Power:
    """|P|^2 (both planes) of `count` slices: mean_K + scale_K (high + low), float32 [K], scales being powers of 2.

    halves: float16 [O', 3 K], rows of high, low and high again (for the low half of weights); O' >= count, filled with zeros.
    Without its mean a sum over K stays small: tensor cores drop what is below the last bit of a sum, always downwards.
    """

    halves: Tensor
    scale_K: Tensor
    mean_K: Tensor
    count: int

    @classmethod
    def split(cls, power_OK: Tensor) -> Power:
        """Of float32 powers [O, K]; the error is at most 2^-22 of the largest deviation of a coefficient."""
        mean_K = power_OK.mean(0)
        deviation_OK = power_OK - mean_K
        largest_K = deviation_OK.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny)
        scale_K = torch.exp2(torch.ceil(torch.log2(largest_K)))
        high, low = split_halves(deviation_OK / scale_K)
        halves = torch.nn.functional.pad(torch.cat([high, low, high], 1), (0, 0, 0, -len(power_OK) % ALIGNED))
        return cls(halves, scale_K, mean_K, len(power_OK))

    def whole(self) -> Tensor:
        """[O, K], float64."""
        high, low, _ = self.halves[: self.count].double().chunk(3, 1)
        return self.mean_K + self.scale_K * (high + low)


@dataclass(frozen=True)
class Orientations:
    """What all particles are compared with: O slices as rows of L numbers (both planes, and any further columns that images have
    too), their power, and the log prior [O] of each (float32, -inf allowed)."""

    slices_OL: Tensor
    power: Power
    log_prior_O: Tensor

    @cached_property
    def padded_prior(self) -> Tensor:
        """The log prior with as many columns as `power.halves` has rows: -inf where there is no orientation."""
        missing = len(self.power.halves) - self.power.count
        return torch.nn.functional.pad(self.log_prior_O.float(), (0, missing), value=-math.inf)


def split_halves(value: Tensor) -> Tensor:
    """High and low float16 half [2, ...] of a float32 tensor: 22 bits of each number."""
    high = value.half()
    return torch.stack([high, (value - high.float()).half()])


def split_columns(images_BTS: Tensor, slices_OS: Tensor) -> tuple[Tensor, Tensor]:
    """Columns [B, T, 3 S] and [O, 3 S] in float16 whose product is that of float32 columns to 2^-21: for coefficients too strong
    for half precision, to be appended to the rows. Padded with zeros to a multiple of 8.

    Products of single numbers must stay below 1e7: they are shares of a score. Slices are scaled to at most 256.
    """
    largest_S = slices_OS.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    scale_S = torch.exp2(torch.ceil(torch.log2(largest_S)) - 8)
    image_high, image_low = split_halves(images_BTS * scale_S)
    slice_high, slice_low = split_halves(slices_OS / scale_S)
    images, slices = torch.cat([image_high, image_high, image_low], -1), torch.cat([slice_high, slice_low, slice_high], -1)
    missing = -images.shape[-1] % 8
    return torch.nn.functional.pad(images, (0, missing)), torch.nn.functional.pad(slices, (0, missing))


def coarse_reference(
    images_BTL: Tensor, weight_BK: Tensor, log_offset_BT: Tensor, orientations: Orientations, fraction: float
) -> tuple[Kept, Significance]:
    """See README.md; scores in float64, returned in float32."""
    (particles, shifts, _), count = images_BTL.shape, len(orientations.slices_OL)
    cross_BTO = images_BTL.double() @ orientations.slices_OL.double().T
    power_BO = weight_BK.double() @ orientations.power.whole().T
    score_BTO = cross_BTO + (orientations.log_prior_O.double() - 0.5 * power_BO)[:, None] + log_offset_BT.double()[:, :, None]
    score_N = score_BTO.float().flatten()
    ptr_B1 = torch.arange(particles + 1, device=score_N.device)
    slice_N = torch.arange(count, device=score_N.device).repeat(particles)
    shift_M = torch.arange(shifts, device=score_N.device).repeat(particles)
    blocks = Blocks.build(ptr_B1 * count, slice_N, ptr_B1 * shifts, shift_M)
    found = significant_reference(score_N, blocks.value_ptr_B1, fraction)
    return keep_reference(score_N, blocks, found.threshold_B, by_shift=True), found
