"""`admit`: give fine samples the prior of their coarse parents. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import choose, implementation_of
from verglas.kernels.admit.reference import Parents, admit_reference
from verglas.kernels.blocks import Blocks


def admit(
    score_N: Tensor, blocks: Blocks, parents: Parents, slices_each: int, shifts_each: int, implementation: str = "auto"
) -> None:
    """Add the parents' log priors to the children's scores in place, -inf where the parent was left out.

    implementation: "auto", "reference", "cpu" (either precision) or "triton" (float32); see `verglas.kernels.choose`.
    """
    name = choose(score_N.device, score_N.dtype, implementation).name
    implementation_of("admit", name)(score_N, blocks, parents, slices_each, shifts_each)


__all__ = ["Parents", "admit", "admit_reference"]
