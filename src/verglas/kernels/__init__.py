"""Hot operations. Each folder holds one operation: README (formula, adjoint), a plain reference, a CPU and a Triton version.

`choose` says which version runs on a device and why; nothing falls back in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
