"""`spread` and `interpolate` in plain torch: the definition. README.md gives the formula."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from verglas.kernels.spread import BIN_XYZ, Places

TAPS_AT_ONCE = 2**23  # products of weights held at a time


def located_reference(point_M3: Tensor, shape: tuple[int, int, int], taps_DW: Tensor) -> Places:
    """See `located`."""
    width = taps_DW.shape[1]
    size_3 = torch.tensor(shape[::-1], device=point_M3.device)
    edge_M3 = point_M3 - 0.5 * width
    first_M3 = edge_M3.ceil()
    cell_M3 = (first_M3.long() % size_3).int()
    if shape[0] == 1:
        cell_M3[:, 2] = 0
    bin_3 = torch.tensor(BIN_XYZ, device=point_M3.device)
    bin_M3 = cell_M3 // bin_3
    bins_x, bins_y, bins_z = (-(-n // b) for n, b in zip(shape[::-1], BIN_XYZ))
    order_M = torch.argsort((bin_M3[:, 2] * bins_y + bin_M3[:, 1]) * bins_x + bin_M3[:, 0], stable=True)
    first_Z = torch.zeros(bins_z + 1, dtype=torch.int64, device=point_M3.device)
    first_Z[1:] = torch.bincount(bin_M3[:, 2].long(), minlength=bins_z).cumsum(0)
    fraction_M3 = (first_M3 - edge_M3 - 0.5).to(taps_DW.dtype)
    return Places(shape, cell_M3.contiguous(), fraction_M3.contiguous(), order_M.int(), first_Z, taps_DW)


def spread_reference(grid_BZYX2: Tensor, places: Places, values_BM2: Tensor) -> None:
    """grid[l] += sum_j values_j w(l - g_j), in place."""
    flat = grid_BZYX2.view(len(grid_BZYX2), -1, 2)
    for part, cell_MT, weight_MT in _taps(places):
        for one, values_M2 in zip(flat, values_BM2[:, part]):
            one.index_add_(0, cell_MT.flatten(), (weight_MT[..., None] * values_M2[:, None]).view(-1, 2))


def interpolate_reference(grid_BZYX2: Tensor, places: Places) -> Tensor:
    """values_j = sum_l grid[l] w(l - g_j), [B, M, 2]."""
    flat = grid_BZYX2.view(len(grid_BZYX2), -1, 2)
    out_BM2 = flat.new_empty(len(flat), len(places), 2)
    for part, cell_MT, weight_MT in _taps(places):
        out_BM2[:, part] = (flat[:, cell_MT] * weight_MT[..., None]).sum(2)
    return out_BM2


def weights_of(places: Places, part: slice) -> Tensor:
    """Weights along (x, y, z) of some points, [m, 3, W]."""
    if places.table_M3W is not None:
        return places.table_M3W[part].to(places.taps_DW.dtype) / 65535
    weight_M3W = torch.zeros_like(places.fraction_M3[part])[..., None] + places.taps_DW[0]
    for coefficient_W in places.taps_DW[1:]:
        weight_M3W = weight_M3W * places.fraction_M3[part][..., None] + coefficient_W
    return weight_M3W


def _taps(places: Places) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Runs of points with the cells that each touches, and their weights [m, taps]."""
    depth, height, size = places.shape
    flat, width = depth == 1, places.width
    step = torch.arange(width, device=places.cell_M3.device)
    points = max(1, TAPS_AT_ONCE // width ** (2 if flat else 3))
    for first in range(0, len(places), points):
        part = slice(first, first + points)
        weight_M3W = weights_of(places, part)
        x, y, z = places.cell_M3[part].long().unbind(1)
        cell_x, cell_y = (x[:, None] + step) % size, (y[:, None] + step) % height
        cell = cell_y[:, :, None] * size + cell_x[:, None, :]
        weight = weight_M3W[:, 1, :, None] * weight_M3W[:, 0, None, :]
        if not flat:
            cell_z = (z[:, None] + step) % depth
            cell = cell_z[:, :, None, None] * (height * size) + cell[:, None]
            weight = weight_M3W[:, 2, :, None, None] * weight[:, None]
        yield part, cell.flatten(1), weight.flatten(1)
