"""`match` on the CPU: `project`, then `compare`, as many particles at once as have slices of about `NUMBERS_AT_ONCE` numbers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.compare.cpu import compare_cpu
from verglas.kernels.project.cpu import project_cpu

if TYPE_CHECKING:
    from verglas.kernels.match import Source

NUMBERS_AT_ONCE = 2**22


def match_cpu(source: Source, sampling_U33: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, blocks: Blocks) -> Tensor:
    """See `match_reference`; slices in single precision."""
    score_N = torch.empty(blocks.samples, dtype=torch.float32)
    values_V2, factor_K = source.values_V2.float() * source.scale, source.factor_K.float()
    most = max(1, NUMBERS_AT_ONCE // (2 * len(factor_K)))
    coordinates_K3 = torch.nn.functional.pad(source.coordinates_K2, (0, 1))
    slice_ptr, value_ptr = blocks.slice_ptr_B1.tolist(), blocks.value_ptr_B1.tolist()
    first = 0
    while first < blocks.particles:
        last = max(first + 1, bisect_right(slice_ptr, slice_ptr[first] + most) - 1)
        part = blocks.part(first, last)
        slices_U2K = project_cpu(values_V2, source.rows, sampling_U33[part.slice_N.long()].float(), coordinates_K3)
        part = replace(part, slice_N=torch.arange(len(part.slice_N), dtype=torch.int32))
        one = slice(first, last)
        score_N[value_ptr[first] : value_ptr[last]] = compare_cpu(
            shifted_BT2K[one].float(), weight_BK[one], slices_U2K.mul_(factor_K), part
        )
        first = last
    return score_N
