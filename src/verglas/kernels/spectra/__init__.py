"""`spectra`: how well each particle's poses explain it, per shell. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose_single, implementation_of
from verglas.kernels.blocks import Blocks


def spectra(
    posterior_N: Tensor, images: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int, implementation: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(cross [B, S], power [B, S]) (see `spectra_reference`).

    images: shifted copies, [B, T, 2, K] of all shifts or [M, 2, K] of those of the lists, in their order (`Blocks.with_rows`).
    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_single(weight_BK, implementation)
    return implementation_of("spectra", name)(posterior_N, images, weight_BK, slices_U2K, blocks, shell_K, n_shells)
