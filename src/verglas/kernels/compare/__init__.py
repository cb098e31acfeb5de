"""`compare`: scores of ragged lists of slices and shifts. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verglas.kernels import choose
from verglas.kernels.blocks import Blocks, Wanted
from verglas.kernels.compare.reference import compare_reference


def compare(
    shifted_BT2K: Tensor, weight_BK: Tensor, slices_U2K: Tensor, blocks: Blocks, wanted: Wanted | None = None,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Scores of all samples (see `compare_reference`).

    wanted: samples that nobody asks for may be left out; the CPU kernel does.
    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose` (float64 runs the reference).
    """
    name = choose_compare(weight_BK, implementation)
    if name == "cpu":
        return implementation_of(name)(shifted_BT2K, weight_BK, slices_U2K, blocks, wanted)
    return implementation_of(name)(shifted_BT2K, weight_BK, slices_U2K, blocks)


def choose_compare(like: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation for tensors like this one: compiled kernels compute in single precision."""
    if implementation == "auto" and like.dtype == torch.float64:
        return "reference"
    return choose(like.device, like.dtype, implementation).name


def implementation_of(name: str) -> Any:
    """The function behind an implementation's name; compiled kernels are imported only here."""
    if name == "reference":
        return compare_reference
    if name == "cpu":
        from verglas.kernels.compare.cpu import compare_cpu

        return compare_cpu
    if name == "triton":
        from verglas.kernels.compare.triton import compare_triton

        return compare_triton
    raise ValueError(f"compare has no implementation {name!r}")
