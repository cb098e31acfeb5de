"""`collect` as a physicist would write it; any device, any dtype."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels.blocks import Blocks


def collect_reference(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, blocks: Blocks, data_U2K: Tensor, total_UK: Tensor
) -> None:
    """See README.md; in the precision of `data_U2K`."""
    image_R2K, blocks = blocks.with_rows(images)
    dtype = data_U2K.dtype
    for i in range(blocks.particles):
        slices, shifts, where = blocks.lists(i)
        p_NM = posterior_N[where].to(dtype).view(len(slices), len(shifts))
        images_M2K = image_R2K[shifts].to(dtype)
        data_U2K.index_add_(0, slices, (p_NM @ images_M2K.flatten(1)).unflatten(1, (2, -1)))
        total_UK.index_add_(0, slices, p_NM.sum(1, keepdim=True) * weight_BK[i].to(dtype))
