"""`significant`: the smallest set of largest weights that holds a fraction of the sum. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels.significant.reference import Significance, significant_reference


def significant(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float, implementation: str = "auto") -> Significance:
    """Significant samples of each run of log weights (see `significant_reference`).

    implementation: "auto" (Numba on the CPU, torch on a GPU), "reference" or "cpu".
    """
    name = implementation
    if name == "auto":
        name = "cpu" if log_weight_N.device.type == "cpu" else "reference"
    if name == "reference":
        return significant_reference(log_weight_N, ptr_B1, fraction)
    if name == "cpu":
        from verglas.kernels.significant.cpu import significant_cpu

        return significant_cpu(log_weight_N, ptr_B1, fraction)
    raise ValueError(f"significant has no implementation {name!r}")


__all__ = ["Significance", "significant", "significant_reference"]
