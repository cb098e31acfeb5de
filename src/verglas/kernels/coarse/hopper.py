"""The fused product of `coarse` (product.cu) on GPUs of compute capability 9: operands for the tensor copies, and the launch."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from verglas.kernels.nvrtc import driver_call, load

ROWS, COLUMNS, STEP = 128, 256, 64  # of product.cu
PARTICLES, LEAST_SHIFTS = 8, 19  # a tile has rows of at most so many particles; with fewer shifts it might have more
SHARED = 4 * (ROWS + COLUMNS) * STEP * 2 + 2 * PARTICLES * COLUMNS * 4 + 128
HALF, SINGLE, SWIZZLED, PLAIN, WIDE_LINES = 6, 7, 3, 0, 3  # the driver's numbers


def tensor_map(table: Tensor, box: tuple[int, int]) -> ctypes.Array[ctypes.c_char]:
    """The driver's description of a table [rows, columns] that is copied in boxes (columns, rows); zeros beyond its edges."""
    memory = ctypes.create_string_buffer(128 + 64)
    aligned = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
    size = (ctypes.c_uint64 * 2)(table.shape[1], table.shape[0])
    stride = (ctypes.c_uint64 * 1)(table.stride(0) * table.element_size())
    kind, swizzle = (HALF, SWIZZLED) if table.dtype == torch.float16 else (SINGLE, PLAIN)
    driver_call(
        "cuTensorMapEncodeTiled", aligned, kind, 2, ctypes.c_void_p(table.data_ptr()), size, stride, (ctypes.c_uint32 * 2)(*box),
        (ctypes.c_uint32 * 2)(1, 1), 0, swizzle, WIDE_LINES, 0,
    )  # fmt: skip
    return aligned


def can_fuse(images_BTL: Tensor) -> bool:
    """Whether product.cu takes such images: a GPU with its instructions, aligned rows, enough shifts."""
    device, (_, shifts, length) = images_BTL.device, images_BTL.shape
    fits = length % 8 == 0 and shifts >= LEAST_SHIFTS
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def fused_product(
    images_BTL: Tensor, slices_OL: Tensor, bias_BO: Tensor, lists: tuple[Tensor, ...], group: int, limits: tuple[float, float]
) -> None:
    """Launch product.cu. lists: offset_R, bound_B, count_B, start_B, room_B, value, place, row_top, row_sum as it names them;
    group: tiles of rows that share slices in the cache; limits: (depth, share)."""
    particles, shifts, length = images_BTL.shape
    images_RL = images_BTL.view(particles * shifts, length)
    maps = tensor_map(images_RL, (STEP, ROWS)), tensor_map(slices_OL, (STEP, COLUMNS)), tensor_map(bias_BO, (COLUMNS, PARTICLES))
    kernel = load(Path(__file__).with_name("product.cu"), "coarse_product", images_BTL.device, family="a", shared=SHARED)
    tiles = -(-len(images_RL) // ROWS) * -(-len(slices_OL) // COLUMNS)
    programs = min(tiles, torch.cuda.get_device_properties(images_BTL.device).multi_processor_count)
    kernel((programs, 1), 384, *maps, *lists, len(images_RL), len(slices_OL), shifts, length, group, *limits)
