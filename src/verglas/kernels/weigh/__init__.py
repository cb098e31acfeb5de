"""`weigh`: transforms of images to CTF-weighted slices. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose
from verglas.kernels.weigh.reference import GroupTables, ImageFactors, weigh_reference


def weigh(fourier_BYX: Tensor, tables: GroupTables, factors: ImageFactors, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """data [B, 2, K] and weight [B, K] of images; fourier_BYX: rfft2 with forward 1/N^2, not centred (it may be changed)."""
    name = choose(fourier_BYX.device, fourier_BYX.real.dtype, implementation).name
    if name == "cpu":
        from verglas.kernels.weigh.cpu import weigh_cpu

        return weigh_cpu(fourier_BYX, tables, factors)
    return weigh_reference(fourier_BYX, tables, factors)  # plain torch is what runs on a GPU, too


__all__ = ["GroupTables", "ImageFactors", "weigh", "weigh_reference"]
