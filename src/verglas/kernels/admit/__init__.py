"""`admit`: give fine samples the prior of their coarse parents. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels.admit.reference import Parents, admit_reference
from verglas.kernels.blocks import Blocks


def admit(
    score_N: Tensor, blocks: Blocks, parents: Parents, slices_each: int, shifts_each: int, implementation: str = "auto"
) -> None:
    """Add the parents' log priors to the children's scores in place, -inf where the parent was left out.

    implementation: "auto" (Numba on the CPU, torch on a GPU), "reference" or "cpu".
    """
    name = implementation if implementation != "auto" else "cpu" if score_N.device.type == "cpu" else "reference"
    if name == "reference":
        admit_reference(score_N, blocks, parents, slices_each, shifts_each)
    elif name == "cpu":
        from verglas.kernels.admit.cpu import admit_cpu

        admit_cpu(score_N, blocks, parents, slices_each, shifts_each)
    else:
        raise ValueError(f"admit has no implementation {name!r}")


__all__ = ["Parents", "admit", "admit_reference"]
