"""Sums over the shells of packed volumes on a GPU, in one walk through them: launches of shells.cu.

A row of voxels goes through each shell once, so a warp adds a row up from its begin to each place, and takes of each shell the
difference of two of these sums: nothing is added up by atomics, and the result does not depend on the order. In double
precision: powers of neighbouring shells may be far apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.nvrtc import Kernel, load
from verglas.projection.axes import on
from verglas.projection.pruned import largest_below

SOURCE = Path(__file__).with_name("shells.cu")
BLOCKS = 4096  # of one warp


def serves(*sums: Tensor) -> bool:
    """Whether the kernels take these: in single precision, on a GPU."""
    return all(one.device.type == "cuda" and one.dtype == torch.float32 for one in sums)


def shell_sums_cuda(
    weight_V: Tensor, rows: RowTable, padding: float, shells: int, rounding: float, prior_S: Tensor | None = None,
    gains: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the weight (gains: of weight / (weight + prior)), number of voxels and number of those with weight >= prior.

    Per shell floor(r / padding + rounding), float64 [shells]; voxels within the table's radius only.
    """
    limit2 = largest_below(rows.radius)
    room = _room(rows.half + 2)
    sums_B3S = torch.empty(BLOCKS, 3, shells, dtype=torch.float64, device=weight_V.device)
    prior = None if prior_S is None else prior_S.to(weight_V).contiguous()
    _launch(
        "shell_sums", rows, 8 * (3 * shells + 2 * (room + 1)), sums_B3S, weight_V, rows.start_ZY, rows.length_ZY.contiguous(),
        prior, weight_V.stride(0), rows.half, limit2, float(padding), float(rounding), shells, int(gains), room,
    )  # fmt: skip
    total, count, covered = sums_B3S.sum(0)
    return total, count, count.clone() if prior is None else covered


def fsc_sums_cuda(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], rows: RowTable, plane_U: Tensor, nearest_E: Tensor, shells: int,
    second_from: int = 0,
) -> Tensor:  # fmt: skip
    """Sums of a b, a a and b b per shell round(r), float64 [3, shells], of data over weight, both summed up to the coarser grid.

    first, second: (data [V, 2], weight [V]); plane_U: planes of that grid; nearest_E: number on it of each of -half..half;
    second_from: plane of voxels, counted from 0, that `second` begins with.
    """
    small = int(nearest_E[-1])
    axis_I = torch.arange(-small, small + 1, device=nearest_E.device)
    begin_I, end_I = (torch.searchsorted(nearest_E, axis_I + after).int() - rows.half for after in (0, 1))
    room = _room(small + 1)
    sums_B3S = torch.empty(BLOCKS, 3, shells, dtype=torch.float64, device=plane_U.device)
    steps = [values.stride(0) for pair in (first, second) for values in pair]
    _launch(
        "fsc_sums", rows, 8 * (3 * shells + 3 * (room + 1)), sums_B3S, *first, *second, rows.start_ZY,
        rows.length_ZY.contiguous(), plane_U.int(), begin_I, end_I, *steps, rows.half, len(plane_U), small, shells, room,
        second_from,
    )  # fmt: skip
    return sums_B3S.sum(0)


def _room(count: int) -> int:
    return -(-count // 32) * 32


def _launch(name: str, rows: RowTable, shared: int, *arguments: Tensor | int | float | None) -> None:
    with on(rows.device):
        kernel(name, rows.device, (f"WIDE={int(rows.start_ZY.dtype == torch.int64)}",), shared)((BLOCKS, 1), 32, *arguments)


def kernel(name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Kernel:
    """A function of shells.cu."""
    return load(SOURCE, name, device, defines, shared=shared)
