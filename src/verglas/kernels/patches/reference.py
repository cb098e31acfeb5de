"""`patches` as indexing; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def patches_reference(object_OLYX: Tensor, corner_B2: Tensor, shape: tuple[int, int]) -> Tensor:
    """See README.md."""
    row_BY1 = corner_B2[:, :1, None] + torch.arange(shape[0], device=corner_B2.device)[:, None]
    column_B1X = corner_B2[:, 1:, None] + torch.arange(shape[1], device=corner_B2.device)
    return object_OLYX[:, :, row_BY1, column_B1X].permute(2, 0, 1, 3, 4).contiguous()
