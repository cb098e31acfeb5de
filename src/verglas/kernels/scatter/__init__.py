"""`scatter`: exit waves spread over object and light. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose, implementation_of


def scatter(
    exit_BOMYX: Tensor, corner_B2: Tensor, seen_OYX: Tensor, light_BMYX: Tensor, object_OYX: Tensor | None,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Adds to object_OYX in place (None: not asked for), returns what falls to the light; see `scatter_reference`.

    implementation: "auto", "reference", "cpu" or "triton"; see `verglas.kernels.choose`. Windows must lie inside.
    """
    name = choose(exit_BOMYX.device, exit_BOMYX.real.dtype, implementation).name
    return implementation_of("scatter", name)(exit_BOMYX, corner_B2, seen_OYX, light_BMYX, object_OYX)  # type: ignore[no-any-return]
