"""`gather` by `patches`; any device, any dtype."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels.patches.reference import patches_reference


def gather_reference(object_OYX: Tensor, corner_B2: Tensor, light_BMYX: Tensor) -> Tensor:
    """See README.md."""
    rows, columns = light_BMYX.shape[-2:]
    return patches_reference(object_OYX[:, None], corner_B2, (rows, columns)) * light_BMYX[:, None]
