"""Spreading from crowded bins, and interpolation, by warps: launches of warps.cu, float32."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from verglas.kernels.nvrtc import Kernel, load
from verglas.kernels.spread.tiles import Tiled, bin_for

SOURCE = Path(__file__).with_name("warps.cu")
WARP, THREADS = 32, 256  # of a block that spreads, and that interpolates


def spread_crowded(grid_BZYX2: Tensor, values_BM2: Tensor, places: Tiled) -> None:
    """Add the values of crowded bins' points into the grid [B, Z, Y, X, 2], in place; all contiguous."""
    points = (places.packed_3M, places.bin_M, places.order_M, _weights(places), places.run_T2)
    with torch.cuda.device_of(grid_BZYX2):
        kernel("spread_warps", grid_BZYX2.device, _defines(places), tile_bytes(places.width, places.tile))(
            (len(places.run_T2), len(grid_BZYX2)), WARP, grid_BZYX2, values_BM2, *points, *_sizes(grid_BZYX2, places)
        )


def interpolate_all(grid_BZYX2: Tensor, out_BM2: Tensor, places: Tiled) -> None:
    """Values [B, M, 2] of all points; all contiguous."""
    points = (places.packed_3M, places.bin_M, places.order_M, _weights(places))
    if out_BM2.numel():
        with torch.cuda.device_of(grid_BZYX2):
            kernel("interpolate_warps", grid_BZYX2.device, _defines(places), 0)(
                (-(-len(places) // THREADS), len(grid_BZYX2)), THREADS, grid_BZYX2, out_BM2, *points, *_sizes(grid_BZYX2, places)
            )


def _weights(places: Tiled) -> Tensor:
    """The window's polynomials, or weights of all points."""
    return places.taps_DW if places.table_M3W is None else places.table_M3W


def _sizes(grid_BZYX2: Tensor, places: Tiled) -> tuple[int, ...]:
    return len(places), *grid_BZYX2.shape[1:4], *places.bins[1:], *places.low


def _defines(places: Tiled) -> tuple[str, ...]:
    z, y, x = bin_for(places.width, places.tile)
    return f"WIDTH={places.width}", f"DEGREE={places.degree}", f"BIN_Z={z}", f"BIN_Y={y}", f"BIN_X={x}", f"THREADS={THREADS}"


def tile_bytes(width: int, tile: tuple[int, int, int]) -> int:
    """Shared memory of a tile with its gaps (warps.cu)."""
    pitch = tile[2] + (width - tile[2]) % 16
    plane = tile[1] * pitch + (width * width - tile[1] * pitch) % 16
    return 8 * tile[0] * plane


def kernel(name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Kernel:
    """A function of warps.cu."""
    return load(SOURCE, name, device, defines, shared=shared)
