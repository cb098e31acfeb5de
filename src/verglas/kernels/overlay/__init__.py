"""`overlay`: windows added into an object. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose, implementation_of


def overlay(patch_BOLYX: Tensor, corner_B2: Tensor, object_OLYX: Tensor, implementation: str = "auto") -> Tensor:
    """Add windows with their pixel (0, 0) at corner_B2 (int64) to object_OLYX, in place; see `overlay_reference`.

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose`. Windows must lie inside.
    """
    name = choose(object_OLYX.device, object_OLYX.real.dtype, implementation).name
    return implementation_of("overlay", name)(patch_BOLYX, corner_B2, object_OLYX)  # type: ignore[no-any-return]
