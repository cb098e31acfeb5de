"""`overlay` as a sum by index; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def overlay_reference(patch_BOLYX: Tensor, corner_B2: Tensor, object_OLYX: Tensor) -> Tensor:
    """See README.md."""
    rows, columns = patch_BOLYX.shape[-2:]
    row_BY1 = corner_B2[:, :1, None] + torch.arange(rows, device=corner_B2.device)[:, None]
    column_B1X = corner_B2[:, 1:, None] + torch.arange(columns, device=corner_B2.device)
    index = (row_BY1 * object_OLYX.shape[3] + column_B1X).flatten()
    added_OLN = patch_BOLYX.permute(1, 2, 0, 3, 4).flatten(2)
    object_OLYX.view(*object_OLYX.shape[:2], -1).index_add_(2, index, added_OLN)
    return object_OLYX
