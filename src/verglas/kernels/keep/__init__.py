"""`keep` and `posterior`: the accepted samples of ragged blocks, their weights and sums. README.md gives the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.keep.reference import Kept, keep_reference, posterior_reference


def keep(log_weight_N: Tensor, blocks: Blocks, threshold_B: Tensor, by_shift: bool = False, implementation: str = "auto") -> Kept:
    """The smallest blocks that hold the samples at or above their particle's threshold (see `keep_reference`).

    implementation: "auto" (Numba on the CPU, torch on a GPU), "reference" or "cpu".
    """
    if choose_keep(log_weight_N.device, implementation) == "reference":
        return keep_reference(log_weight_N, blocks, threshold_B, by_shift)
    from verglas.kernels.keep.cpu import keep_cpu

    return keep_cpu(log_weight_N, blocks, threshold_B, by_shift)


def posterior(
    value_N: Tensor, blocks: Blocks, log_sum_B: Tensor, implementation: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights exp(value - log_sum); their sums per slice entry and per shift entry; entropy of each particle, nats.

    Weights in the precision of `value_N`, the rest float64.
    """
    if choose_keep(value_N.device, implementation) == "reference":
        return posterior_reference(value_N, blocks, log_sum_B)
    from verglas.kernels.keep.cpu import posterior_cpu

    return posterior_cpu(value_N, blocks, log_sum_B)


def choose_keep(device: torch.device, implementation: str = "auto") -> str:
    """Numba on the CPU, else the torch definition."""
    if implementation == "auto":
        return "cpu" if device.type == "cpu" else "reference"
    if implementation in ("reference", "cpu"):
        return implementation
    raise ValueError(f"keep has no implementation {implementation!r}")


__all__ = ["Kept", "choose_keep", "keep", "keep_reference", "posterior", "posterior_reference"]
