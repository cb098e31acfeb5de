"""`scatter` by `patches` and `overlay`; any device, any dtype."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels.overlay.reference import overlay_reference
from verglas.kernels.patches.reference import patches_reference


def scatter_reference(
    exit_BOMYX: Tensor, corner_B2: Tensor, seen_OYX: Tensor, light_BMYX: Tensor, object_OYX: Tensor | None
) -> Tensor:
    """See README.md."""
    if object_OYX is not None:
        overlay_reference((light_BMYX[:, None].conj() * exit_BOMYX).sum(2, keepdim=True), corner_B2, object_OYX[:, None])
    rows, columns = exit_BOMYX.shape[-2:]
    patch_BOYX = patches_reference(seen_OYX[:, None], corner_B2, (rows, columns))[:, :, 0]
    each_BMYX = (patch_BOYX[:, :, None].conj() * exit_BOMYX).sum(1)
    return each_BMYX if len(light_BMYX) > 1 else each_BMYX.sum(0, keepdim=True)
