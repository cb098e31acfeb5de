"""`project`: slices of a packed Fourier volume. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels import choose, implementation_of


def project(
    values_V2: Tensor, rows: RowTable, sampling_R33: Tensor, coordinates_K3: Tensor, implementation: str = "auto"
) -> Tensor:
    """Slices [R, 2, K] of the packed volume (see `project_reference`), differentiable with respect to `values_V2`.

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose`.
    """
    return _Project.apply(values_V2, rows, sampling_R33, coordinates_K3, implementation)


class _Project(torch.autograd.Function):
    """The gradient of `project` is `backproject`: the sum over slices is linear in the stored values."""

    @staticmethod
    def forward(ctx: Any, values_V2: Tensor, rows: RowTable, sampling: Tensor, coordinates: Tensor, name: str) -> Tensor:
        name = choose(values_V2.device, values_V2.dtype, name).name
        ctx.name, ctx.rows = name, rows
        ctx.save_for_backward(sampling, coordinates)
        return implementation_of("project", name)(values_V2, rows, sampling, coordinates)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from verglas.kernels.backproject import backproject

        (gradient_R2K,) = gradients
        sampling, coordinates = ctx.saved_tensors
        accumulator_V4 = gradient_R2K.new_zeros(ctx.rows.count, 4)
        backproject(accumulator_V4, ctx.rows, gradient_R2K, None, sampling, coordinates, ctx.name)
        return accumulator_V4[:, :2].contiguous(), None, None, None, None
