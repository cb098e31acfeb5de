"""`spread` and `interpolate`: values at scattered points to and from a periodic grid. README.md gives the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verglas.kernels import choose, implementation_of

if TYPE_CHECKING:
    from verglas.kernels.spread.tiles import Tiled

BIN_XYZ = (16, 4, 4)  # cells of a bin; points are visited bin by bin


@dataclass(frozen=True)
class Places:
    """Where points lie on a grid of `shape` (Z, Y, X) cells, and the window around each.

    cell_M3: int32 (x, y, z), first cell touched; fraction_M3: in the precision of the grid; order_M: int32, order of visiting;
    first_of_bin_Z: int64, how many points come before each layer of bins along z, and all; taps_DW: README.md; table_M3W: int32,
    weights of the caller's points along (x, y, z) in 65535ths, if they are kept (`tabled`).
    """

    shape: tuple[int, int, int]
    cell_M3: Tensor
    fraction_M3: Tensor
    order_M: Tensor
    first_of_bin_Z: Tensor
    taps_DW: Tensor
    table_M3W: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cell_M3)

    @property
    def width(self) -> int:
        """Taps along x and y (and z, if the grid is no plane)."""
        return self.taps_DW.shape[1]

    def within(self, low: int, count: int) -> Places:
        """The same points on `count` planes of the grid from `low` on (rows, if the grid is a plane), in which all cells lie that
        they touch. low: where a bin begins."""
        axis = 2 if self.shape[0] > 1 else 1
        assert low % BIN_XYZ[axis] == 0
        cell_M3 = self.cell_M3.clone()
        cell_M3[:, axis] -= low
        first_Z = self.first_of_bin_Z
        if axis == 2:
            layer_Z = torch.arange(-(-count // BIN_XYZ[2]) + 1, device=first_Z.device) + low // BIN_XYZ[2]
            first_Z = first_Z[layer_Z.clamp(max=len(first_Z) - 1)]
        shape = (count, *self.shape[1:]) if axis == 2 else (1, count, self.shape[2])
        return replace(self, shape=shape, cell_M3=cell_M3, first_of_bin_Z=first_Z)


def located(
    point_M3: Tensor, shape: tuple[int, int, int], taps_DW: Tensor, implementation: str = "auto",
    per_unit: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Places | Tiled:  # fmt: skip
    """Places of points (x, y, z), any real numbers (the grid is periodic); fractions get the precision of the taps.

    per_unit: cells for each unit of their coordinates, multiplied by in double precision. A plane (Z = 1) ignores z, which may be
    left out. What is returned serves the implementation that it was made for ("reference" and "cpu" have the same).
    """
    name = choose(point_M3.device, taps_DW.dtype, implementation).name
    if name == "triton":
        from verglas.kernels.spread.tiles import located_triton

        return located_triton(point_M3, shape, taps_DW, per_unit=per_unit)
    if per_unit != (1.0, 1.0, 1.0) or point_M3.shape[1] < 3:
        cells = point_M3.new_tensor(per_unit, dtype=torch.float64)[: point_M3.shape[1]]
        point_M3 = torch.nn.functional.pad(point_M3 * cells, (0, 3 - len(cells)))
    if name == "cpu":
        from verglas.kernels.spread.cpu import located_cpu

        return located_cpu(point_M3, shape, taps_DW)
    from verglas.kernels.spread.reference import located_reference

    return located_reference(point_M3, shape, taps_DW)


def tabled(places: Places | Tiled) -> Places | Tiled:
    """The same places with the weights of every point along each axis kept as 16-bit numbers, from 0 to 1 in steps of 1/65535,
    for points that recur. Sums stay in the precision of the grid. For "reference" and "triton"."""
    if not isinstance(places, Places):
        from verglas.kernels.spread.triton import tabled_triton

        return tabled_triton(places)
    from verglas.kernels.spread.reference import weights_of

    return replace(places, table_M3W=(weights_of(places, slice(None)) * 65535).round().clamp(0, 65535).int())


def spread(grid_BZYX2: Tensor, places: Places | Tiled, values_BM2: Tensor, implementation: str = "auto") -> None:
    """Add values into the grid, in place (see `spread_reference`)."""
    run = implementation_of("spread", choose(grid_BZYX2.device, grid_BZYX2.dtype, implementation).name)
    run(grid_BZYX2, places, values_BM2)


def interpolate(grid_BZYX2: Tensor, places: Places | Tiled, implementation: str = "auto") -> Tensor:
    """Values [B, M, 2] at the points: the transpose of `spread`."""
    name = choose(grid_BZYX2.device, grid_BZYX2.dtype, implementation).name
    module = implementation_of("spread", name).__module__
    from importlib import import_module

    return getattr(import_module(module), f"interpolate_{name}")(grid_BZYX2, places)  # type: ignore[no-any-return]
