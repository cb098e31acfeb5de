"""Helpers of the tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def shared_data() -> Path | None:
    """Folder of real inputs: $VERGLAS_SHARED, else `shared` beside the checkout; None where there is neither."""
    named = os.environ.get("VERGLAS_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[4] / "shared"
    return folder if (folder / "data").is_dir() else None


def assert_adjoint(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, relative: float = 1e-10
) -> None:
    """Assert <forward(x), y> = <x, adjoint(y)> for stored arrays taken as free real vectors, relative to |forward(x)| |y|."""
    image = forward(x)
    left, right = float((image * y).sum()), float((x * adjoint(y)).sum())
    scale = float(image.norm() * y.norm())
    assert scale > 0, "nothing was tested: the image or y is zero"
    assert abs(left - right) <= relative * scale, f"<Ax, y> = {left:.12g} but <x, A'y> = {right:.12g}"
