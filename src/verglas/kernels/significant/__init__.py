"""`significant`: the smallest set of largest weights that holds a fraction of the sum. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels.significant.reference import Significance, chosen_reference, significant_reference


def significant(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float, implementation: str = "auto") -> Significance:
    """Significant samples of each run of log weights (see `significant_reference`).

    implementation: "auto" (Numba on the CPU, torch on a GPU), "reference" or "cpu". ValueError: fraction not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction must lie between 0 and 1, got {fraction}")
    if choose_significant(log_weight_N, implementation) == "reference":
        return significant_reference(log_weight_N, ptr_B1, fraction)
    from verglas.kernels.significant.cpu import significant_cpu

    return significant_cpu(log_weight_N, ptr_B1, fraction)


def chosen(log_weight_N: Tensor, ptr_B1: Tensor, threshold_B: Tensor, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """Samples that reach their run's threshold: (ptr [B + 1] of the accepted, their positions ascending), int64.

    threshold_B: as `Significance.threshold_B` (+inf accepts none of finite weight). implementation: as for `significant`.
    """
    if choose_significant(log_weight_N, implementation) == "reference":
        return chosen_reference(log_weight_N, ptr_B1, threshold_B)
    from verglas.kernels.significant.cpu import chosen_cpu

    return chosen_cpu(log_weight_N, ptr_B1, threshold_B)


def choose_significant(like: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation for log weights like these: Numba on the CPU in either precision, else torch."""
    if implementation == "auto":
        return "cpu" if like.device.type == "cpu" else "reference"
    if implementation in ("reference", "cpu"):
        return implementation
    raise ValueError(f"significant has no implementation {implementation!r}")


__all__ = ["Significance", "choose_significant", "chosen", "chosen_reference", "significant", "significant_reference"]
