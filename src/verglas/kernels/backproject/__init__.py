"""`backproject`: the adjoint of `project`, adding slices and weights into a packed volume. See README.md."""

from __future__ import annotations

from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels import choose, implementation_of


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
    implementation_of("backproject", name)(accumulator_V4, rows, data_R2K, weight_RK, sampling_R33, coordinates_K3)
