"""Sums over the shells of packed volumes on a GPU, in one walk through them, and quotients by shells: launches of shells.cu.

A row of voxels goes through each shell once. For sums of weights a warp has 32 voxels of a row at a time, and adds up those that
are of one shell from lane to lane. For correlations it adds a row up from its begin to each place, in double precision (powers
of neighbouring shells may be far apart), and takes of each shell the difference of two of these sums. Nothing is added up by
atomics, and the result does not depend on the order.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.nvrtc import Kernel, load
from verglas.projection.axes import PROCESSOR_BYTES, Sums, on
from verglas.projection.pruned import largest_below

SOURCE = Path(__file__).with_name("shells.cu")
BLOCKS, WALKING = 4096, 16384  # of one warp: those that keep sums, and those that do not


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
    limit2, device = largest_below(rows.radius), weight_V.device
    shared = 16 * shells + 8 * -(-(shells + 1) // 2)
    blocks = _blocks(device, shared)
    sums_B3S = torch.empty(blocks, 3, shells, dtype=torch.float64, device=device)
    prior = None if prior_S is None else prior_S.to(weight_V).contiguous()
    from2_S = _begins(limit2, float(padding), float(rounding), shells, device)
    _launch(
        "shell_sums", rows, blocks, shared, sums_B3S, weight_V, rows.start_ZY, rows.length_ZY.contiguous(), prior, from2_S,
        weight_V.stride(0), rows.half, limit2, shells, int(gains), 1 / padding, float(rounding),
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
    small, begin_I, end_I = _coarser(rows, nearest_E)
    room = -(-(small + 1) // 32) * 32
    sums_B3S = torch.empty(BLOCKS, 3, shells, dtype=torch.float64, device=plane_U.device)
    steps = [values.stride(0) for pair in (first, second) for values in pair]
    _launch(
        "fsc_sums", rows, BLOCKS, 8 * (3 * shells + 3 * (room + 1)), sums_B3S, *first, *second, rows.start_ZY,
        rows.length_ZY.contiguous(), plane_U.int(), begin_I, end_I, *steps, rows.half, len(plane_U), small, shells, room,
        second_from,
    )  # fmt: skip
    return sums_B3S.sum(0)


def divide_voxels_cuda(sums: Sums) -> None:
    """data /= max(weight + prior, floor) gain of voxels nearer than the radius, in place: as a transform of `sums` reads them."""
    assert sums.weight_V is not None and sums.data_V2.is_contiguous()
    _launch_on_voxels("divide_voxels", sums, sums.data_V2, sums.weight_V)


def add_prior_cuda(sums: Sums) -> None:
    """weight += prior of voxels nearer than the radius, in place; those of the others are 0 then."""
    assert sums.weight_V is not None
    _launch_on_voxels("add_prior", sums, sums.weight_V)


def _launch_on_voxels(name: str, sums: Sums, *arrays: Tensor) -> None:
    rows, curves_J4 = sums.rows, sums.curves_J4
    assert sums.weight_V is not None and sums.weight_V.is_contiguous()
    _launch(name, rows, WALKING, 0, *arrays, rows.start_ZY, rows.length_ZY.contiguous(), curves_J4, rows.half,
            largest_below(rows.radius), sums.steps, len(curves_J4) - 1)  # fmt: skip


def averages_cuda(
    data_V2: Tensor, weight_V: Tensor, rows: RowTable, nearest_E: Tensor, to_rows: RowTable, radius: int
) -> Tensor:  # fmt: skip
    """Data over weight, both summed up to the coarser grid, packed [U, 2] on its table: 0 where nothing was seen, and beyond the
    radius."""
    small, begin_I, end_I = _coarser(rows, nearest_E)
    out_U2 = torch.zeros(to_rows.count, 2, device=data_V2.device)
    _launch(
        "averages", rows, BLOCKS, 0, out_U2, data_V2, weight_V, rows.start_ZY, rows.length_ZY.contiguous(), to_rows.start_ZY,
        begin_I, end_I, data_V2.stride(0), weight_V.stride(0), rows.half, small, to_rows.half, radius**2,
    )  # fmt: skip
    return out_U2


def _coarser(rows: RowTable, nearest_E: Tensor) -> tuple[int, Tensor, Tensor]:
    """(largest number on the coarser grid, first voxel along an axis that falls to each number, the one after the last)."""
    small = int(nearest_E[-1])
    axis_I = torch.arange(-small, small + 1, device=nearest_E.device)
    begin_I, end_I = (torch.searchsorted(nearest_E, axis_I + after).int() - rows.half for after in (0, 1))
    return small, begin_I, end_I


@lru_cache(maxsize=16)
def _begins(limit2: int, padding: float, rounding: float, shells: int, device: torch.device) -> Tensor:
    """The squared distance from which on a voxel is of a shell min(floor(r / padding + rounding), shells - 1), int32
    [shells + 1]; the last one is beyond all. In single precision, as elsewhere."""
    r_L = torch.arange(limit2 + 1, dtype=torch.float32).sqrt_()
    shell_L = (r_L / padding + rounding).int().clamp_max_(shells - 1)
    begin_S = torch.searchsorted(shell_L, torch.arange(shells, dtype=torch.int32))
    return torch.cat([begin_S, begin_S.new_tensor([2**30])]).int().to(device)


def _blocks(device: torch.device, shared: int) -> int:
    """As many as a GPU runs at a time, so that all have rows for as long."""
    if device.type != "cuda":
        return BLOCKS
    return min(32, PROCESSOR_BYTES // (shared + 1024)) * torch.cuda.get_device_properties(device).multi_processor_count


def _launch(name: str, rows: RowTable, blocks: int, shared: int, *arguments: Tensor | int | float | None) -> None:
    with on(rows.device):
        kernel(name, rows.device, (f"WIDE={int(rows.start_ZY.dtype == torch.int64)}",), shared)((blocks, 1), 32, *arguments)


def kernel(name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Kernel:
    """A function of shells.cu."""
    return load(SOURCE, name, device, defines, shared=shared)
