"""`keep` and `marginals`: the accepted samples of ragged blocks, and sums of their weights. README.md gives the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.keep.reference import Kept, keep_reference, marginals_reference


def keep(log_weight_N: Tensor, blocks: Blocks, threshold_B: Tensor, by_shift: bool = False, implementation: str = "auto") -> Kept:
    """The smallest blocks that hold the samples at or above their particle's threshold (see `keep_reference`).

    implementation: "auto" (Numba on the CPU, torch on a GPU), "reference" or "cpu".
    """
    if choose_keep(log_weight_N.device, implementation) == "reference":
        return keep_reference(log_weight_N, blocks, threshold_B, by_shift)
    from verglas.kernels.keep.cpu import keep_cpu

    return keep_cpu(log_weight_N, blocks, threshold_B, by_shift)


def marginals(weight_N: Tensor, blocks: Blocks, implementation: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Sums of weights per slice entry and per shift entry, and the entropy of each particle in nats; float64."""
    if choose_keep(weight_N.device, implementation) == "reference":
        return marginals_reference(weight_N, blocks)
    from verglas.kernels.keep.cpu import marginals_cpu

    return marginals_cpu(weight_N, blocks)


def choose_keep(device: torch.device, implementation: str = "auto") -> str:
    """Numba on the CPU, else the torch definition."""
    if implementation == "auto":
        return "cpu" if device.type == "cpu" else "reference"
    if implementation in ("reference", "cpu"):
        return implementation
    raise ValueError(f"keep has no implementation {implementation!r}")


__all__ = ["Kept", "choose_keep", "keep", "keep_reference", "marginals", "marginals_reference"]
