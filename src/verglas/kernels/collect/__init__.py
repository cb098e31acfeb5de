"""`collect`: weighted images summed into slices. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose_single, implementation_of
from verglas.kernels.blocks import Blocks


def collect(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, blocks: Blocks, data_U2K: Tensor, total_UK: Tensor,
    implementation: str = "auto",
) -> None:  # fmt: skip
    """Add weighted images into the slices they belong to, in place (see `collect_reference`).

    images: shifted copies, [B, T, 2, K] of all shifts or [M, 2, K] of those of the lists, in their order (`Blocks.with_rows`).
    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_single(data_U2K, implementation)
    implementation_of("collect", name)(posterior_N, images, weight_BK, blocks, data_U2K, total_UK)
