"""`collect`: weighted images summed into slices. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verglas.kernels import choose
from verglas.kernels.blocks import Blocks
from verglas.kernels.collect.reference import collect_reference


def collect(
    posterior_N: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, blocks: Blocks, data_U2K: Tensor, total_UK: Tensor,
    implementation: str = "auto",
) -> None:  # fmt: skip
    """Add weighted images into the slices they belong to, in place (see `collect_reference`).

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_collect(data_U2K, implementation)
    implementation_of(name)(posterior_N, shifted_BT2K, weight_BK, blocks, data_U2K, total_UK)


def choose_collect(like: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation for tensors like this one: compiled kernels compute in single precision."""
    if implementation == "auto" and like.dtype == torch.float64:
        return "reference"
    return choose(like.device, like.dtype, implementation).name


def implementation_of(name: str) -> Any:
    """The function behind an implementation's name; compiled kernels are imported only here."""
    if name == "reference":
        return collect_reference
    if name == "cpu":
        from verglas.kernels.collect.cpu import collect_cpu

        return collect_cpu
    if name == "triton":
        from verglas.kernels.collect.triton import collect_triton

        return collect_triton
    raise ValueError(f"collect has no implementation {name!r}")
