"""`fold`, `unfold`, `radial`: packed voxels to and from the part of a transform that one residue of planes needs; `divide` by
what was found (README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels import choose


@dataclass(frozen=True)
class RadialTable:
    """A function of the distance from the origin: value i at r = i step, linear between; the last two hold beyond the table."""

    values_T: Tensor
    step: float


def fold(
    values_V: Tensor, rows: RowTable, phase_Z2: Tensor, shape: tuple[int, int, int], implementation: str = "auto"
) -> Tensor:
    """Sums of aliases [M, size, columns, 2], shape = (M, size, columns), in the precision of the values."""
    run = _version("fold", values_V, implementation)
    return run(values_V, rows, phase_Z2.to(values_V), shape)  # type: ignore[no-any-return]


def unfold(part_MYX2: Tensor, rows: RowTable, phase_Z2: Tensor, out_V: Tensor, implementation: str = "auto") -> None:
    """Add what each voxel finds at its alias to `out_V`, in place."""
    _version("unfold", out_V, implementation)(part_MYX2, rows, phase_Z2.to(out_V), out_V)


def radial(planes_MYX: Tensor, table: RadialTable, strides: int, residue: int, implementation: str = "auto") -> None:
    """Multiply the planes z = strides m + residue of a real transform by a function of the distance, in place."""
    _version("radial", planes_MYX, implementation)(planes_MYX, table, strides, residue)


def divide(values_V: Tensor, divisor_V: Tensor, least: float, implementation: str = "auto") -> None:
    """values /= max(|divisor|, least), in place."""
    _version("divide", values_V, implementation)(values_V, divisor_V, least)


def _version(operation: str, like: Tensor, implementation: str):  # type: ignore[no-untyped-def]
    name = choose(like.device, like.dtype, implementation).name
    return getattr(import_module(f"verglas.kernels.fold.{name}"), f"{operation}_{name}")
