"""`spectra`: how well each particle's poses explain it, per shell. README.md gives the formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verglas.kernels import choose
from verglas.kernels.blocks import Blocks
from verglas.kernels.spectra.reference import spectra_reference


def spectra(
    posterior_N: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, shell_K: Tensor,
    n_shells: int, implementation: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(cross [B, S], power [B, S]) (see `spectra_reference`).

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_spectra(weight_BK, implementation)
    return implementation_of(name)(posterior_N, shifted_BT2K, weight_BK, slices_U2K, blocks, shell_K, n_shells)


def choose_spectra(like: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation for tensors like this one: compiled kernels compute in single precision."""
    if implementation == "auto" and like.dtype == torch.float64:
        return "reference"
    return choose(like.device, like.dtype, implementation).name


def implementation_of(name: str) -> Any:
    """The function behind an implementation's name; compiled kernels are imported only here."""
    if name == "reference":
        return spectra_reference
    if name == "cpu":
        from verglas.kernels.spectra.cpu import spectra_cpu

        return spectra_cpu
    if name == "triton":
        from verglas.kernels.spectra.triton import spectra_triton

        return spectra_triton
    raise ValueError(f"spectra has no implementation {name!r}")
