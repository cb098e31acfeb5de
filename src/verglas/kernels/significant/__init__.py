"""`significant`: the smallest set of largest weights that holds a fraction of the sum. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose, implementation_of
from verglas.kernels.significant.reference import Significance, significant_reference


def significant(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float, implementation: str = "auto") -> Significance:
    """Significant samples of each run of log weights (see `significant_reference`).

    implementation: "auto" (see `choose_significant`), "reference", "cpu" or "triton" (float32 alone).
    ValueError: fraction not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction must lie between 0 and 1, got {fraction}")
    run = implementation_of("significant", choose_significant(log_weight_N, implementation))
    found: Significance = run(log_weight_N, ptr_B1, fraction)
    return found


def choose_significant(like: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation for log weights like these: see `verglas.kernels.choose`."""
    if implementation not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f"significant has no implementation {implementation!r}")
    return choose(like.device, like.dtype, implementation).name


__all__ = ["Significance", "choose_significant", "significant", "significant_reference"]
