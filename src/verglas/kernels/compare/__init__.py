"""`compare`: scores of ragged lists of slices and shifts. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose_single, implementation_of
from verglas.kernels.blocks import Blocks, Wanted
from verglas.kernels.compare.reference import compare_reference


def compare(
    images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, wanted: Wanted | None = None,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Scores of all samples (see `compare_reference`).

    images: shifted copies, [B, T, 2, K] of all shifts or [M, 2, K] of those of the lists, in their order (`Blocks.with_rows`).
    wanted: samples that nobody asks for may be left out (the compiled kernels do): what stands there then means nothing.
    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_single(weight_BK, implementation)
    if name == "reference":
        return compare_reference(images, weight_BK, slices_U2K, blocks)
    return implementation_of("compare", name)(images, weight_BK, slices_U2K, blocks, wanted)
