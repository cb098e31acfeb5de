"""`dose`, `descend`, `follow`, `best_lengths`: a mini-batch's step in place; README.md, and `reference.py` as the definition."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from verglas.kernels import choose


def dose(light_MYX: Tensor, corner_B2: Tensor, scale_B: Tensor, into_YX: Tensor, implementation: str = "auto") -> Tensor:
    """into = sum_b scale_b sum_m |light_m(. - corner_b)|^2, in place; its greatest value, on the device.

    corner_B2: int64, windows inside. implementation: "auto", "reference", "cpu" or "triton".
    """
    return _version("dose", into_YX, implementation)(light_MYX, corner_B2, scale_B, into_YX)  # type: ignore[no-any-return]


def descend(
    value_PYX: Tensor | None, gradient_PYX: Tensor, curvature_YX: Tensor, most: Tensor, damping: float, length: float,
    implementation: str = "auto",
) -> None:  # fmt: skip
    """value -= length gradient / (2 ((1 - damping) curvature + damping most)), in place; the gradient becomes 0.

    most: one number on the device. value None: the gradient becomes the step instead. implementation: as of `dose`.
    """
    _version("descend", gradient_PYX, implementation)(value_PYX, gradient_PYX, curvature_YX, most, damping, length)


def follow(value_PYX: Tensor, step_PYX: Tensor, factor: Tensor, implementation: str = "auto") -> None:
    """value += factor step, in place; the step becomes 0. factor: one float64 on the device; implementation: as of `dose`."""
    _version("follow", value_PYX, implementation)(value_PYX, step_PYX, factor)


def best_lengths(product_B5: Tensor, like: Tensor, implementation: str = "auto") -> Tensor:
    """[4] float64 sums over positions: s |a|^2, |a|^2, t, 1. like: of the problem's device and precision; implementation: as of
    `dose`."""
    return _version("best_lengths", like, implementation)(product_B5)  # type: ignore[no-any-return]


def _version(operation: str, like: Tensor, implementation: str) -> Any:
    name = choose(like.device, like.real.dtype, implementation).name
    return getattr(import_module(f"verglas.kernels.descend.{name}"), f"{operation}_{name}")
