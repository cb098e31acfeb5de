"""What the GPU kernels of `coarse` multiply and add: images, slices, and the bias in the parts that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """score(r, o) = sum_l images_RL slices_OL + norm_BO scale_B + prior_O + offset_R, r = b shifts + t.

    norm_BO [B, O'], prior_O [O']: O' >= O, prior -inf beyond O. offset_R: log prior of the shift and what belongs to the
    particle; no number where a weight of the particle is none.
    """

    images_RL: Tensor
    slices_OL: Tensor
    shifts: int
    norm_BO: Tensor
    scale_B: Tensor
    prior_O: Tensor
    offset_R: Tensor
