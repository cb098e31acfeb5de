"""Hot operations. Each folder holds one operation: README (formula, adjoint), a plain reference, a CPU and a Triton version.

`choose` says which version runs on a device and why; nothing falls back in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Which implementation runs, and why (goes into the run record)."""

    name: str
    reason: str


def choose(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> Choice:
    """Implementation for tensors on `device`: "triton" on CUDA in float32, "cpu" (Numba) on the CPU, else "reference"."""
    if name != "auto":
        return Choice(name, "asked for")
    if torch.device(device).type == "cuda":
        if dtype == torch.float32:
            return Choice("triton", "CUDA device, float32")
        return Choice("reference", f"{dtype} on CUDA has no Triton kernel")
    return Choice("cpu", "CPU device, compiled with Numba")


def choose_single(like: Tensor, implementation: str = "auto") -> str:
    """As `choose`, by name alone, for operations compiled in single precision only: float64 tensors run the reference."""
    if implementation == "auto" and like.dtype == torch.float64:
        return "reference"
    return choose(like.device, like.dtype, implementation).name


def implementation_of(operation: str, name: str) -> Any:
    """The function behind an implementation's name: verglas/kernels/`operation`/`name`.py, `operation`_`name`.

    Compiled kernels are imported only here. ValueError if the operation has none of that name.
    """
    if name not in ("reference", "cpu", "triton"):
        raise ValueError(f"{operation} has no implementation {name!r}")
    return getattr(import_module(f"verglas.kernels.{operation}.{name}"), f"{operation}_{name}")
