"""`match` as a physicist would write it; any device, any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.compare.reference import compare_reference
from verglas.kernels.project.reference import project_reference

if TYPE_CHECKING:
    from verglas.kernels.match import Source


def match_reference(source: Source, sampling_U33: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, blocks: Blocks) -> Tensor:
    """See README.md; slices in double precision before they are rounded, scores in the precision of `weight_BK`."""
    values_V2 = source.values_V2.double() * source.scale
    coordinates_K3 = torch.nn.functional.pad(source.coordinates_K2.double(), (0, 1))
    slices_U2K = project_reference(values_V2, source.rows, sampling_U33.double(), coordinates_K3)
    largest = torch.finfo(shifted_BT2K.dtype).max
    slices_U2K = (slices_U2K * source.factor_K.double()).clamp(-largest, largest).to(shifted_BT2K.dtype)
    return compare_reference(shifted_BT2K, weight_BK, slices_U2K, blocks)
