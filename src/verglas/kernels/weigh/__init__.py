"""`weigh`: transforms of images to CTF-weighted slices. README.md gives the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels import Choice
from verglas.kernels.weigh.reference import GroupTables, ImageFactors, weigh_reference


def choose_weigh(device: torch.device | str, dtype: torch.dtype) -> Choice:
    """Numba for float32 on the CPU, else the plain torch definition, which is what a GPU runs."""
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        return Choice("cpu", "CPU device, compiled with Numba")
    return Choice("reference", f"plain torch, {str(dtype).removeprefix('torch.')}")


def weigh(fourier_BYX: Tensor, tables: GroupTables, factors: ImageFactors, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """data [B, 2, K] and weight [B, K] of images; fourier_BYX: rfft2 with forward 1/N^2, not centred.

    implementation: "auto" (see `choose_weigh`), "reference" or "cpu".
    """
    name = choose_weigh(fourier_BYX.device, fourier_BYX.real.dtype).name if implementation == "auto" else implementation
    if name == "reference":
        return weigh_reference(fourier_BYX, tables, factors)
    if name == "cpu":
        from verglas.kernels.weigh.cpu import weigh_cpu

        return weigh_cpu(fourier_BYX, tables, factors)
    raise ValueError(f"weigh has no implementation {name!r}")


__all__ = ["GroupTables", "ImageFactors", "choose_weigh", "weigh", "weigh_reference"]
