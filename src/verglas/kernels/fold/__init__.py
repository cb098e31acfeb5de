"""`fold` and `unfold`: packed voxels to and from the part of a transform that one residue of planes needs. See README.md."""

from __future__ import annotations

from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels import choose, implementation_of


def fold(
    values_V: Tensor, rows: RowTable, phase_Z2: Tensor, shape: tuple[int, int, int], implementation: str = "auto"
) -> Tensor:
    """Sums of aliases [M, size, columns, 2], shape = (M, size, columns), in the precision of the values."""
    run = implementation_of("fold", choose(values_V.device, values_V.dtype, implementation).name)
    return run(values_V, rows, phase_Z2.to(values_V), shape)  # type: ignore[no-any-return]


def unfold(part_MYX2: Tensor, rows: RowTable, phase_Z2: Tensor, out_V: Tensor, implementation: str = "auto") -> None:
    """Add what each voxel finds at its alias to `out_V`, in place."""
    name = choose(out_V.device, out_V.dtype, implementation).name
    run = implementation_of("fold", name).__globals__[f"unfold_{name}"]
    run(part_MYX2, rows, phase_Z2.to(out_V), out_V)
