"""`backproject`: the adjoint of `project`, adding slices and weights into a packed volume. See README.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels import choose
from verglas.kernels.backproject.reference import backproject_reference


def backproject(
    accumulator_V4: Tensor,
    rows: RowTable,
    data_R2K: Tensor,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
    implementation: str = "auto",
) -> None:
    """Add slices into `accumulator_V4` in place (see `backproject_reference`).

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose`.
    """
    name = choose(accumulator_V4.device, accumulator_V4.dtype, implementation).name
    implementation_of(name)(accumulator_V4, rows, data_R2K, weight_RK, sampling_R33, coordinates_K3)


def implementation_of(name: str) -> Any:
    """The function behind an implementation's name; compiled kernels are imported only here."""
    if name == "reference":
        return backproject_reference
    if name == "cpu":
        from verglas.kernels.backproject.cpu import backproject_cpu

        return backproject_cpu
    if name == "triton":
        from verglas.kernels.backproject.triton import backproject_triton

        return backproject_triton
    raise ValueError(f"backproject has no implementation {name!r}")
