"""`backproject` on the GPU without atomics for every sample: warps own bricks of voxels in shared memory (bricks.cu).

Bricks look for the lattice points that fall into them, so they serve coordinates that form a lattice: frequencies of a box,
also of another pixel size than the model's, or magnified. Others, and slices too few, are left to the atomics of triton.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from verglas.core.layers import LayerTable
from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels.backproject.apart import Apart
from verglas.kernels.nvrtc import Kernel, NvrtcError, load

SOURCE = Path(__file__).with_name("bricks.cu")
BRICK_XYZ = (8, 8, 8)  # cells
SLICES_PER_BLOCK = 8192  # most slices a block walks over; blocks near the origin, which more planes cut, take fewer
PARTS_AT_ORIGIN = 8
FEWEST, FEWEST_PER_VOXEL = 1_000_000, 0.03  # samples in a call, at all and per voxel; with fewer, atomics are quicker (NOTES.md)


@dataclass(frozen=True)
class Lattice:
    """Coordinates c = i first + j second with integer (i, j).

    basis: first (x, y), second (x, y); reach: largest |i| or |j|. table: int32 [2 reach + 1, 2 reach + 1] over (j, i): k + 1
    where coordinate k is that point, -(k + 1) where it is minus that point, else 0; extra: repeats, which the table omits.
    """

    basis: tuple[float, float, float, float]
    reach: int
    table: Tensor
    extra: Tensor

    def to(self, device: torch.device) -> Lattice:
        return Lattice(self.basis, self.reach, self.table.to(device), self.extra.to(device))


_lattices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def lattice_of(coordinates_K3: Tensor) -> Lattice | None:
    """The lattice that coordinates lie on, None if they do not (or not with z = 0). Looked for once for each tensor."""
    if coordinates_K3 not in _lattices:
        lattice = _find_lattice(coordinates_K3.detach().double().cpu())
        _lattices[coordinates_K3] = None if lattice is None else lattice.to(coordinates_K3.device)
    return _lattices[coordinates_K3]


def _find_lattice(coordinates_K3: Tensor) -> Lattice | None:
    xy_K2 = coordinates_K3[:, :2]
    basis_22 = _shortest(torch.cat([xy_K2, xy_K2 - xy_K2[len(xy_K2) // 2]]))  # of a ring no point itself is short
    if basis_22 is None or bool(coordinates_K3[:, 2].any()):
        return None
    steps_K2 = torch.linalg.solve(basis_22, xy_K2, left=False).round()
    basis_22 = torch.linalg.solve(steps_K2.T @ steps_K2, steps_K2.T @ xy_K2)  # all points together know it best
    whole_22 = basis_22.round()
    basis_22 = torch.where((basis_22 - whole_22).abs() < 1e-9, whole_22, basis_22)  # so that p_x = 0 stays 0
    reach = int(steps_K2.abs().max())
    if float((steps_K2 @ basis_22 - xy_K2).abs().max()) > 4e-7 * float(xy_K2.abs().max()) or reach > 2047:
        return None  # farther off than float32 rounds, or a table too large
    width, index_K = 2 * reach + 1, torch.arange(len(xy_K2))
    place_K = (steps_K2[:, 1] * width + steps_K2[:, 0]).long()  # minus the place is that of minus the point
    first = torch.full((width * width // 2 + 1,), len(index_K))
    first.scatter_reduce_(0, place_K.abs(), index_K, "amin")
    kept_K = first[place_K.abs()] == index_K
    table = torch.zeros(width * width, dtype=torch.int32)
    number = (index_K[kept_K] + 1).int()
    table[width * width // 2 - place_K[kept_K]] = -number
    table[width * width // 2 + place_K[kept_K]] = number  # second, so that the origin counts as itself
    first_x, first_y, second_x, second_y = basis_22.flatten().tolist()
    return Lattice((first_x, first_y, second_x, second_y), reach, table, (~kept_K).nonzero().squeeze(1))


def _shortest(xy_K2: Tensor) -> Tensor | None:
    """The shortest two points in different directions, as rows: a basis if the points are a lattice around the origin."""
    length_K = xy_K2.norm(dim=1)
    length_K = torch.where(length_K > 0, length_K, torch.inf)
    first_2 = xy_K2[length_K.argmin()]
    area_K = (first_2[0] * xy_K2[:, 1] - first_2[1] * xy_K2[:, 0]).abs()
    aside_K = torch.where(area_K > 0.5 * first_2.norm() * length_K, length_K, torch.inf)
    if not bool(aside_K.isfinite().any()):
        return None
    return torch.stack([first_2, xy_K2[aside_K.argmin()]])


@lru_cache(maxsize=16)
def _items(
    radius: float, half: int, brick: tuple[int, int, int], device: torch.device, columns: tuple[int, int] | None = None,
    inner: float = 0.0,
) -> Tensor:  # fmt: skip
    """Bricks that samples at distances from `inner` to `radius` can reach, those nearest the origin first: int32 [I, 4], first
    cell (x, y, z) and part << 16 | parts, the share of the slices that a block takes. Work falls as one over the distance."""
    ends = [(0, half + 1), (-half, half + 1), (-half, half + 1)]
    if columns is not None:
        assert columns[0] % brick[0] == 0 and (columns[1] % brick[0] == 0 or columns[1] > half)
        ends[0] = columns[0], min(columns[1], half + 1)
    starts = [
        torch.arange(low, high, step, dtype=torch.int32, device=device) for (low, high), step in zip(ends, brick, strict=True)
    ]
    x2, y2, z2 = (torch.maximum(start, -start - step).clamp_min(0).square() for start, step in zip(starts, brick, strict=True))
    reached_XYZ = x2[:, None, None] + y2[:, None] + z2 <= (radius + 0.02) ** 2
    if inner > 0.02:
        far = (torch.maximum(start.abs(), (start + step).abs()).square() for start, step in zip(starts, brick, strict=True))
        x2, y2, z2 = far
        reached_XYZ &= x2[:, None, None] + y2[:, None] + z2 >= (inner - 0.02) ** 2
    index_3I = reached_XYZ.nonzero().T
    first_I3 = torch.stack([start[index] for start, index in zip(starts, index_3I, strict=True)], 1)
    centre_I3 = first_I3 + torch.tensor(brick, dtype=torch.float32, device=device) / 2
    distance_I, order = centre_I3.norm(dim=1).sort(stable=True)
    parts_I = (PARTS_AT_ORIGIN * (max(brick) / distance_I).clamp_max(1)).ceil().int()
    number = torch.repeat_interleave(torch.arange(len(order), device=device), parts_I)
    part = torch.arange(len(number), device=device) - (parts_I.cumsum(0) - parts_I)[number]
    share = (part << 16 | parts_I[number]).int()
    return torch.cat([first_I3[order[number]], share[:, None]], 1)


def kernels(device: torch.device, wide: bool = False, apart: bool = False) -> tuple[Kernel, Kernel]:
    """(slice_geometry, backproject_bricks), compiled for `device`; NvrtcError if they cannot be. wide: the row table is int64;
    apart: data and weights are."""
    flags = [name for name, wanted in (("WIDE=1", wide), ("APART=1", apart)) if wanted]
    defines = (*(f"BRICK_{axis}={size}" for axis, size in zip("XYZ", BRICK_XYZ)), *flags)
    return load(SOURCE, "slice_geometry", device, defines), load(SOURCE, "backproject_bricks", device, defines)


@lru_cache(maxsize=16)
def unavailable(device: torch.device) -> str | None:
    """Why bricks cannot run on `device` (no NVRTC, no CUDA driver, a kernel refused); None if they can."""
    try:
        kernels(device)
    except NvrtcError as error:
        return str(error)
    return None


def backproject_bricks(
    accumulator_V4: Tensor | Apart,
    rows: RowTable,
    data_R2K: Tensor | None,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
    columns: tuple[int, int] | None = None,
) -> None:
    """See `backproject_reference`; accumulator, data and weights in float32 on a GPU. columns: ends are multiples of a brick's.

    Slices of coordinates off the lattice and those too few go to `backproject_triton`. NvrtcError without NVRTC.
    """
    if accumulator_V4.dtype != torch.float32:
        raise TypeError(f"the kernel adds in float32, got an accumulator of {accumulator_V4.dtype}")
    if isinstance(accumulator_V4, Apart):  # what is not wanted is not read
        data_R2K = None if accumulator_V4.data_V2 is None else data_R2K
        weight_RK = None if accumulator_V4.weight_V is None else weight_RK
    voxels = rows.count if columns is None else packed_sphere(rows.radius, rows.device).count  # samples are of all columns
    few = too_few(len(sampling_R33) * len(coordinates_K3), voxels)
    lattice = None if few else lattice_of(coordinates_K3)
    if lattice is not None:
        _add_bricks(accumulator_V4, rows, data_R2K, weight_RK, sampling_R33, lattice, columns, len(coordinates_K3))
        if len(lattice.extra) == 0:
            return
    # Here, because importing Triton takes half a second, which a reconstruction that needs nothing else of it is spared.
    from verglas.kernels.backproject.triton import backproject_triton

    if lattice is None:
        backproject_triton(accumulator_V4, rows, data_R2K, weight_RK, sampling_R33, coordinates_K3, columns)
    else:
        weight = None if weight_RK is None else weight_RK[:, lattice.extra]
        data = None if data_R2K is None else data_R2K[:, :, lattice.extra]
        backproject_triton(accumulator_V4, rows, data, weight, sampling_R33, coordinates_K3[lattice.extra], columns)


def prepare(rows: RowTable) -> None:
    """Have the list of bricks of a table made, before memory is short."""
    _items(rows.radius, rows.half, BRICK_XYZ, rows.device, None, 0.0)


def too_few(samples: int, voxels: int) -> bool:
    """Whether a call with so many samples is left to atomics."""
    return samples <= max(FEWEST, FEWEST_PER_VOXEL * voxels)


def _add_bricks(
    accumulator_V4: Tensor | Apart, rows: RowTable, data_R2K: Tensor | None, weight_RK: Tensor | None, sampling_R33: Tensor,
    lattice: Lattice, columns: tuple[int, int] | None, n_pixels: int,
) -> None:  # fmt: skip
    device, n_slices, apart = accumulator_V4.device, len(sampling_R33), isinstance(accumulator_V4, Apart)
    sums = (accumulator_V4.data_V2, accumulator_V4.weight_V) if isinstance(accumulator_V4, Apart) else (accumulator_V4, None)
    geometry, bricks = kernels(device, rows.start_ZY.dtype == torch.int64, apart)
    sampling = sampling_R33.to(device, torch.float32).contiguous()
    data, weight = (None if one is None else one.to(torch.float32).contiguous() for one in (data_R2K, weight_RK))
    inner, outer = (rows.inner, rows.outer) if isinstance(rows, LayerTable) else (0.0, rows.radius)
    items = _items(outer, rows.half, BRICK_XYZ, device, columns, inner)
    with torch.cuda.device(device):
        slices = torch.empty(3 * n_slices, 4, device=device)
        geometry((math.ceil(n_slices / 256), 1), 256, sampling, slices, *lattice.basis, n_slices)
        bricks(
            (len(items), math.ceil(n_slices / SLICES_PER_BLOCK)), 32, *sums, rows.start_ZY, items, slices, lattice.table,
            data, weight, n_slices, n_pixels, lattice.reach, rows.half, rows.limit2,
        )  # fmt: skip
