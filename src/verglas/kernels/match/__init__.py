"""`match`: scores against slices cut as they are needed. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels import choose_single, implementation_of
from verglas.kernels.blocks import Blocks

if TYPE_CHECKING:
    from verglas.kernels.project.cells import Cells


@dataclass(frozen=True)
class Source:
    """What slices are cut from.

    values_V2: stored voxels of a packed volume (core/rows.py), which is `scale` times as much; cells: the same for GPUs;
    coordinates_K2: integer frequencies (x, y); factor_K: multiplies each coefficient.
    """

    values_V2: Tensor
    rows: RowTable
    scale: float
    cells: Cells | None
    coordinates_K2: Tensor
    factor_K: Tensor


def match(
    source: Source, sampling_U33: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, blocks: Blocks, implementation: str = "auto"
) -> Tensor:
    """Scores of all samples (see `match_reference`).

    sampling_U33: sampling matrices that blocks.slice_N points to; shifted_BT2K: float16 on a GPU.
    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_single(weight_BK, implementation)
    return implementation_of("match", name)(source, sampling_U33, shifted_BT2K, weight_BK, blocks)
