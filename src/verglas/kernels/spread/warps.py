"""Spreading from crowded bins by warps: launches of warps.cu, float32."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from verglas.kernels.nvrtc import Kernel, load
from verglas.kernels.spread.tiles import Tiled, bin_for

SOURCE = Path(__file__).with_name("warps.cu")
WARP = 32


def spread_crowded(grid_BZYX2: Tensor, values_BM2: Tensor, places: Tiled) -> None:
    """Add the values of crowded bins' points into the grid [B, Z, Y, X, 2], in place; all contiguous."""
    width, (bin_z, bin_y, bin_x) = places.width, bin_for(places.width, places.tile)
    defines = (f"WIDTH={width}", f"DEGREE={places.degree}", f"BIN_Z={bin_z}", f"BIN_Y={bin_y}", f"BIN_X={bin_x}")
    weights = places.taps_DW if places.table_M3W is None else places.table_M3W
    with torch.cuda.device_of(grid_BZYX2):
        kernel("spread_warps", grid_BZYX2.device, defines, tile_bytes(width, places.tile))(
            (len(places.run_T2), len(grid_BZYX2)), WARP, grid_BZYX2, values_BM2, places.packed_3M, places.bin_M, places.order_M,
            weights, places.run_T2, len(places), *grid_BZYX2.shape[1:4], *places.bins[1:], *places.low,
        )  # fmt: skip


def tile_bytes(width: int, tile: tuple[int, int, int]) -> int:
    """Shared memory of a tile with its gaps (warps.cu)."""
    pitch = tile[2] + (width - tile[2]) % 16
    plane = tile[1] * pitch + (width * width - tile[1] * pitch) % 16
    return 8 * tile[0] * plane


def kernel(name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Kernel:
    """A function of warps.cu."""
    return load(SOURCE, name, device, defines, shared=shared)
