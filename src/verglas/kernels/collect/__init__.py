"""`collect`: weighted images summed into slices. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose_single, implementation_of
from verglas.kernels.blocks import Blocks


def collect(
    posterior_N: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, blocks: Blocks, data_U2K: Tensor, total_UK: Tensor,
    implementation: str = "auto",
) -> None:  # fmt: skip
    """Add weighted images into the slices they belong to, in place (see `collect_reference`).

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_single(data_U2K, implementation)
    implementation_of("collect", name)(posterior_N, shifted_BT2K, weight_BK, blocks, data_U2K, total_UK)
