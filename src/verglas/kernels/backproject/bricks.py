"""`backproject` on the GPU without atomics for every sample: warps own bricks of voxels in shared memory (bricks.cu).

Bricks look for the lattice points that fall into them, so they serve coordinates that are integer frequencies. Other
coordinates, and slices too few to fill the volume, are left to the atomics of triton.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from verglas.core.rows import RowTable
from verglas.kernels.nvrtc import Kernel, NvrtcError, load

SOURCE = Path(__file__).with_name("bricks.cu")
BRICK_XYZ = (8, 8, 8)  # cells
SLICES_PER_BLOCK = 8192  # most slices a block walks over; blocks near the origin, which more planes cut, take fewer
PARTS_AT_ORIGIN = 8
FEWEST, FEWEST_PER_VOXEL = 1_000_000, 0.03  # samples in a call, at all and per voxel; with fewer, atomics are quicker (NOTES.md)


@dataclass(frozen=True)
class Lattice:
    """Integer coordinates, addressed by frequency. table: int32 [2 reach + 1, 2 reach + 1] over (ky, kx): k + 1 where
    coordinate k is that frequency, -(k + 1) where it is minus that frequency, else 0; extra: repeats, which the table omits.
    """

    reach: int
    table: Tensor
    extra: Tensor


_lattices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def lattice_of(coordinates_K3: Tensor) -> Lattice | None:
    """The lattice that coordinates lie on, None if they are not whole numbers with z = 0. Looked at once for each tensor."""
    if coordinates_K3 not in _lattices:
        _lattices[coordinates_K3] = _find_lattice(coordinates_K3.detach())
    return _lattices[coordinates_K3]


def _find_lattice(coordinates_K3: Tensor) -> Lattice | None:
    whole_K3 = coordinates_K3.round()
    reach = float(whole_K3.abs().max()) if len(whole_K3) else 0.0
    if not bool((whole_K3 == coordinates_K3).all()) or bool(whole_K3[:, 2].any()) or reach > 16383:
        return None
    width, index_K = 2 * int(reach) + 1, torch.arange(len(whole_K3), device=whole_K3.device)
    place_K = (whole_K3[:, 1] * width + whole_K3[:, 0]).double().round().long()  # minus the place is that of minus the point
    first = torch.full((width * width // 2 + 1,), len(index_K), device=index_K.device)
    first.scatter_reduce_(0, place_K.abs(), index_K, "amin")
    kept_K = first[place_K.abs()] == index_K
    table = torch.zeros(width * width, dtype=torch.int32, device=index_K.device)
    number = (index_K[kept_K] + 1).int()
    table[width * width // 2 - place_K[kept_K]] = -number
    table[width * width // 2 + place_K[kept_K]] = number  # second, so that the origin counts as itself
    return Lattice(int(reach), table, (~kept_K).nonzero().squeeze(1))


@lru_cache(maxsize=16)
def _items(radius: float, half: int, brick: tuple[int, int, int], device: torch.device) -> Tensor:
    """Bricks that samples can reach, those nearest the origin first: int32 [I, 4], first cell (x, y, z) and
    part << 16 | parts, the share of the slices that a block takes. Work falls as one over the distance."""
    starts = [np.arange(first, half + 1, size) for first, size in zip((0, -half, -half), brick)]
    first_I3 = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, 3)
    size = np.array(brick)
    nearest = np.clip(0, first_I3, first_I3 + size)
    first_I3 = first_I3[(nearest**2).sum(1) <= (radius + 0.02) ** 2]
    distance_I = np.linalg.norm(first_I3 + size / 2, axis=1)
    parts_I = np.ceil(PARTS_AT_ORIGIN * np.minimum(1, max(brick) / distance_I)).astype(int)
    order = np.argsort(distance_I, kind="stable")
    number = np.repeat(order, parts_I[order])
    part = np.arange(len(number)) - np.repeat(np.cumsum(parts_I[order]) - parts_I[order], parts_I[order])
    items = np.concatenate([first_I3[number], (part << 16 | parts_I[number])[:, None]], 1)
    return torch.from_numpy(items.astype(np.int32)).to(device)


def kernels(device: torch.device) -> tuple[Kernel, Kernel]:
    """(slice_geometry, backproject_bricks), compiled for `device`; NvrtcError if they cannot be."""
    defines = tuple(f"BRICK_{axis}={size}" for axis, size in zip("XYZ", BRICK_XYZ))
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
    accumulator_V4: Tensor,
    rows: RowTable,
    data_R2K: Tensor,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
) -> None:
    """See `backproject_reference`; accumulator, data and weights in float32 on a GPU.

    Slices of coordinates off the lattice and those too few go to `backproject_triton`. NvrtcError without NVRTC.
    """
    from verglas.kernels.backproject.triton import backproject_triton

    if accumulator_V4.dtype != torch.float32:
        raise TypeError(f"the kernel adds in float32, got an accumulator of {accumulator_V4.dtype}")
    few = len(sampling_R33) * len(coordinates_K3) <= max(FEWEST, FEWEST_PER_VOXEL * rows.count)
    lattice = None if few else lattice_of(coordinates_K3)
    if lattice is None:
        backproject_triton(accumulator_V4, rows, data_R2K, weight_RK, sampling_R33, coordinates_K3)
        return
    _add_bricks(accumulator_V4, rows, data_R2K, weight_RK, sampling_R33, lattice)
    if len(lattice.extra):
        weight = None if weight_RK is None else weight_RK[:, lattice.extra]
        backproject_triton(
            accumulator_V4, rows, data_R2K[:, :, lattice.extra], weight, sampling_R33, coordinates_K3[lattice.extra]
        )


def _add_bricks(
    accumulator_V4: Tensor, rows: RowTable, data_R2K: Tensor, weight_RK: Tensor | None, sampling_R33: Tensor, lattice: Lattice
) -> None:
    device, n_slices, n_pixels = accumulator_V4.device, len(data_R2K), data_R2K.shape[2]
    geometry, bricks = kernels(device)
    sampling = sampling_R33.to(device, torch.float32).contiguous()
    data = data_R2K.to(torch.float32).contiguous()
    weight = None if weight_RK is None else weight_RK.to(torch.float32).contiguous()
    items = _items(rows.radius, rows.half, BRICK_XYZ, device)
    with torch.cuda.device(device):
        slices = torch.empty(3 * n_slices, 4, device=device)
        geometry((math.ceil(n_slices / 256), 1), 256, sampling, slices, n_slices)
        bricks(
            (len(items), math.ceil(n_slices / SLICES_PER_BLOCK)), 32, accumulator_V4, rows.start_ZY, items, slices, lattice.table,
            data, weight, n_slices, n_pixels, lattice.reach, rows.half, rows.limit2,
        )  # fmt: skip
