"""The fused product of `coarse` (product.cu) on GPUs of compute capability 9: maps for the tensor copies, and the launch."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from verglas.kernels.coarse.operands import Operands
from verglas.kernels.nvrtc import driver_call, load

SOURCE = Path(__file__).with_name("product.cu")
ROWS, COLUMNS, STEP = 128, 256, 64  # of product.cu
PARTICLES, LEAST_SHIFTS = 8, 19  # a tile has rows of at most so many particles; with fewer shifts it might have more
CLUSTER = 2  # blocks that share slices
SHARED = 4 * (ROWS + COLUMNS) * STEP * 2 + 2 * (PARTICLES + 1) * COLUMNS * 4 + 128
HALF, SINGLE, SWIZZLED, PLAIN, WIDE_LINES = 6, 7, 3, 0, 3  # the driver's numbers


def tensor_map(table: Tensor, box: tuple[int, int]) -> ctypes.Array[ctypes.c_char]:
    """The driver's description of a table [rows, columns] that is copied in boxes (columns, rows); zeros beyond its edges."""
    stride = table.stride(0) * table.element_size()
    return _tensor_map(table.data_ptr(), table.shape[0], table.shape[1], stride, table.dtype == torch.float16, box)


@lru_cache(maxsize=64)
def _tensor_map(
    address: int, rows: int, columns: int, stride: int, half: bool, box: tuple[int, int]
) -> ctypes.Array[ctypes.c_char]:
    """Nothing but these numbers enters a description, so that one serves all tables at the same address."""
    memory = ctypes.create_string_buffer(128 + 64)
    aligned = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
    kind, swizzle = (HALF, SWIZZLED) if half else (SINGLE, PLAIN)
    driver_call(
        "cuTensorMapEncodeTiled", aligned, kind, 2, ctypes.c_void_p(address), (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(stride), (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1), 0, swizzle, WIDE_LINES, 0,
    )  # fmt: skip
    return aligned


def can_fuse(images_BTL: Tensor) -> bool:
    """Whether product.cu takes such images: a GPU with its instructions, aligned rows, enough shifts."""
    device, (_, shifts, length) = images_BTL.device, images_BTL.shape
    fits = length % 8 == 0 and shifts >= LEAST_SHIFTS
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def fused_tops(operands: Operands, top_GR: Tensor, best_B: Tensor, group: int) -> None:
    """Launch product.cu: the largest score of each row in each group of columns, and of each particle. group: tiles of rows that
    share slices in the cache."""
    images_RL, slices_OL, device = operands.images_RL, operands.slices_OL, top_GR.device
    maps = (
        tensor_map(images_RL, (STEP, ROWS)), tensor_map(slices_OL, (STEP, COLUMNS // CLUSTER)),
        tensor_map(operands.norm_BO, (COLUMNS, PARTICLES)),
    )  # fmt: skip
    kernel = load(SOURCE, "coarse_product", device, family="a", shared=SHARED)
    tiles = -(-len(images_RL) // (ROWS * CLUSTER)) * -(-len(slices_OL) // COLUMNS)
    programs = min(tiles, torch.cuda.get_device_properties(device).multi_processor_count // CLUSTER) * CLUSTER
    kernel(
        (programs, 1), 384, *maps, operands.prior_O, operands.scale_B, operands.offset_R, top_GR, best_B, len(images_RL),
        len(slices_OL), operands.shifts, images_RL.shape[1], group // CLUSTER,
    )  # fmt: skip
