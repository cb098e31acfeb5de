"""`backproject`: the adjoint of `project`, adding slices and weights into a packed volume. See README.md."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels import Choice, choose, implementation_of
from verglas.kernels.backproject.apart import Apart


def backproject(
    accumulator_V4: Tensor | Apart,
    rows: RowTable,
    data_R2K: Tensor | None,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
    implementation: str = "auto",
    columns: tuple[int, int] | None = None,
) -> None:
    """Add slices into `accumulator_V4` in place (see `backproject_reference`); data and weights apart on a CPU by the reference.

    columns: (first, last + 1), only samples with floor(p_x) in between are added; all by default.
    implementation: "auto", "reference", "cpu", "triton" or "bricks"; see `choose_backproject`.
    """
    name = choose_backproject(accumulator_V4.device, accumulator_V4.dtype, implementation).name
    name = "reference" if name == "cpu" and isinstance(accumulator_V4, Apart) else name
    if name == "bricks":
        from verglas.kernels.backproject.bricks import backproject_bricks as run
    else:
        run = implementation_of("backproject", name)
    run(accumulator_V4, rows, data_R2K, weight_RK, sampling_R33, coordinates_K3, columns=columns)


def choose_backproject(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> Choice:
    """As `verglas.kernels.choose`, but "bricks" on a GPU; "triton" with a warning and the reason where these do not compile."""
    choice = choose(device, dtype, name)
    if name != "auto" or choice.name != "triton":
        return choice
    return _choose_on_gpu(torch.device(device))


@lru_cache(maxsize=16)
def _choose_on_gpu(device: torch.device) -> Choice:
    from verglas.kernels.backproject.bricks import unavailable

    reason = unavailable(device)
    if reason is None:
        return Choice("bricks", "CUDA device, float32; Triton atomics for few slices and for coordinates off the lattice")
    warnings.warn(f"backproject: Triton atomics, at half the speed or less, because {reason}", stacklevel=4)
    return Choice("triton", f"atomics, because {reason}")


__all__ = ["Apart", "backproject", "choose_backproject"]
