"""`keep` and `posterior`: the accepted samples of ragged blocks, their weights and sums. README.md gives the formulas."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor

from verglas.kernels import choose
from verglas.kernels.blocks import Blocks
from verglas.kernels.keep.reference import Kept, keep_reference, posterior_reference


def keep(log_weight_N: Tensor, blocks: Blocks, threshold_B: Tensor, by_shift: bool = False, implementation: str = "auto") -> Kept:
    """The smallest blocks that hold the samples at or above their particle's threshold (see `keep_reference`).

    implementation: "auto" (see `choose_keep`), "reference", "cpu" or "triton" (float32 alone).
    """
    module = _module(choose_keep(log_weight_N, implementation))
    kept: Kept = getattr(module, f"keep_{module.__name__.rpartition('.')[2]}")(log_weight_N, blocks, threshold_B, by_shift)
    return kept


def posterior(
    value_N: Tensor, blocks: Blocks, log_sum_B: Tensor, implementation: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights exp(value - log_sum); their sums per slice entry and per shift entry; entropy of each particle, nats.

    Weights in the precision of `value_N`, the rest float64.
    """
    module = _module(choose_keep(value_N, implementation))
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    found = getattr(module, f"posterior_{module.__name__.rpartition('.')[2]}")(value_N, blocks, log_sum_B)
    return found


def choose_keep(like: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation for log weights like these: see `verglas.kernels.choose`."""
    if implementation not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f"keep has no implementation {implementation!r}")
    return choose(like.device, like.dtype, implementation).name


def _module(name: str) -> ModuleType:
    return import_module(f"verglas.kernels.keep.{name}")


__all__ = ["Kept", "choose_keep", "keep", "keep_reference", "posterior", "posterior_reference"]
