"""`fold` and its companions in plain torch: the definition, one voxel after another in the order they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.fold import RadialTable


def fold_reference(values_V: Tensor, rows: RowTable, phase_Z2: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """See `fold`."""
    out = values_V.new_zeros(*shape, 2)
    place_V, z_V, fits_V = _places(rows, shape)
    out.view(-1, 2).index_add_(0, place_V, (values_V * fits_V)[:, None] * phase_Z2[z_V])
    return out


def unfold_reference(part_MYX2: Tensor, rows: RowTable, phase_Z2: Tensor, out_V: Tensor) -> None:
    """See `unfold`."""
    planes, size, columns, _ = part_MYX2.shape
    place_V, z_V, fits_V = _places(rows, (planes, size, columns))
    out_V += (part_MYX2.view(-1, 2)[place_V] * phase_Z2[z_V]).sum(1) * fits_V


def radial_reference(planes_MYX: Tensor, table: RadialTable, strides: int, residue: int) -> None:
    """See `radial`."""
    size = planes_MYX.shape[1]
    axis = torch.arange(size, device=planes_MYX.device)
    axis2 = torch.where(axis > size // 2, axis - size, axis).to(planes_MYX.dtype).square()
    r_MYX = (axis2[residue::strides][:, None, None] + axis2[:, None] + axis2).sqrt() / size
    place = (r_MYX / table.step).clamp_max(len(table.values_T) - 2)
    index = place.int()
    low, high = table.values_T[index], table.values_T[index + 1]
    planes_MYX *= low + (high - low) * (place - index)


def divide_reference(values_V: Tensor, divisor_V: Tensor, least: float) -> None:
    """See `divide`."""
    values_V /= divisor_V.abs().clamp_min(least)


def _places(rows: RowTable, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where each voxel's alias lies, its plane of the table, and whether it lies within the columns."""
    planes, size, columns = shape
    x, y, z = rows.coordinates_V3().long().unbind(1)
    fits = (x < columns) & (y.abs() <= size // 2) & (z.abs() <= size // 2)
    return torch.where(fits, ((z % planes) * size + y % size) * columns + x, 0), z + rows.half, fits
