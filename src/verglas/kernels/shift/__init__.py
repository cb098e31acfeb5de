"""`shift`: all shifted copies of images. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verglas.kernels import choose
from verglas.kernels.shift.reference import shift_reference


def shift(
    image_B2K: Tensor, shift_T2: Tensor, x_K: Tensor, y_K: Tensor, box: int, out_dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """[B, T, 2, K] copies of images moved by shift_T2 px (x, y), positive towards + (see `shift_reference`).

    x_K, y_K: integer frequencies (int32) of a `box` px image. implementation: "auto", "reference", "cpu" or "triton";
    see `verglas.kernels.choose` (float64 images run the reference). TypeError where it cannot write `out_dtype`.
    """
    name = choose_shift(image_B2K, implementation)
    return implementation_of(name)(image_B2K, shift_T2, x_K, y_K, box, out_dtype)


def choose_shift(like: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation for tensors like this one: compiled kernels compute in single precision."""
    if implementation == "auto" and like.dtype == torch.float64:
        return "reference"
    return choose(like.device, like.dtype, implementation).name


def implementation_of(name: str) -> Any:
    """The function behind an implementation's name; compiled kernels are imported only here."""
    if name == "reference":
        return shift_reference
    if name == "cpu":
        from verglas.kernels.shift.cpu import shift_cpu

        return shift_cpu
    if name == "triton":
        from verglas.kernels.shift.triton import shift_triton

        return shift_triton
    raise ValueError(f"shift has no implementation {name!r}")


__all__ = ["choose_shift", "implementation_of", "shift", "shift_reference"]
