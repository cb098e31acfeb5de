"""`gather`: exit waves, windows of an object times light. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose, implementation_of


def gather(object_OYX: Tensor, corner_B2: Tensor, light_BMYX: Tensor, implementation: str = "auto") -> Tensor:
    """[B, O, M, rows, columns] exit waves at corner_B2 (int64) under light [1 or B, M, rows, columns]; see `gather_reference`.

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose`. Windows must lie inside.
    """
    name = choose(object_OYX.device, object_OYX.real.dtype, implementation).name
    return implementation_of("gather", name)(object_OYX, corner_B2, light_BMYX)  # type: ignore[no-any-return]
