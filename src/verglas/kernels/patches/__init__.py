"""`patches`: windows of an object. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose, implementation_of


def patches(object_OLYX: Tensor, corner_B2: Tensor, shape: tuple[int, int], implementation: str = "auto") -> Tensor:
    """[B, O, L, rows, columns] windows of `shape` px with their pixel (0, 0) at corner_B2 (int64); see `patches_reference`.

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose`. Windows must lie inside.
    """
    name = choose(object_OLYX.device, object_OLYX.real.dtype, implementation).name
    return implementation_of("patches", name)(object_OLYX, corner_B2, shape)  # type: ignore[no-any-return]
