"""`fold` and `unfold` on the GPU: a program for each row; float32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.fold import RadialTable

BLOCK, WARPS = 256, 2  # voxels of a row worked on at a time


@triton.jit
def _fold_kernel(values, start, length, phase, out, planes, size, columns, half, reach, BLOCK: tl.constexpr):
    m, row = tl.program_id(0) // size, tl.program_id(0) % size
    y = tl.where(row > size // 2, row - size, row)
    edge = 2 * half + 1
    first_z = m - ((reach + m) // planes) * planes
    target = out + tl.program_id(0).to(tl.int64) * columns * 2
    within = tl.abs(y) <= reach
    for x0 in range(0, columns, BLOCK):
        x = x0 + tl.arange(0, BLOCK)
        real, imaginary = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for z in range(first_z, reach + 1, planes):
            re, im = tl.load(phase + 2 * (z + half)), tl.load(phase + 2 * (z + half) + 1)
            for twin in range(2):  # y = size/2 is stored as -size/2, too
                own = tl.where(twin == 0, y, -y)
                used = within & ((twin == 0) | (y == size // 2))
                table = (z + half) * edge + own + half
                count = tl.load(length + table, mask=used, other=0)
                begin = tl.load(start + table, mask=used, other=0)
                value = tl.load(values + begin + x, mask=(x < count) & (x < columns), other=0.0)
                real += re * value
                imaginary += im * value
        tl.store(target + 2 * x, real, mask=x < columns)
        tl.store(target + 2 * x + 1, imaginary, mask=x < columns)


@triton.jit
def _unfold_kernel(part, start, length, phase, out, planes, size, columns, half, reach, BLOCK: tl.constexpr):
    z, y = tl.program_id(0) // (2 * reach + 1) - reach, tl.program_id(0) % (2 * reach + 1) - reach
    table = (z + half) * (2 * half + 1) + y + half
    count, begin = tl.minimum(tl.load(length + table), columns), tl.load(start + table)
    re, im = tl.load(phase + 2 * (z + half)), tl.load(phase + 2 * (z + half) + 1)
    m, row = ((z % planes) + planes) % planes, ((y % size) + size) % size
    source = part + (m.to(tl.int64) * size + row) * columns * 2
    for x0 in range(0, count, BLOCK):
        x = x0 + tl.arange(0, BLOCK)
        mask = x < count
        found = re * tl.load(source + 2 * x, mask=mask, other=0.0) + im * tl.load(source + 2 * x + 1, mask=mask, other=0.0)
        tl.store(out + begin + x, tl.load(out + begin + x, mask=mask, other=0.0) + found, mask=mask)


@triton.jit
def _radial_kernel(planes, table, per_step, last, strides, residue, size, BLOCK: tl.constexpr):
    m, row = tl.program_id(0) // size, tl.program_id(0) % size
    z = strides * m + residue
    z = tl.where(z > size // 2, z - size, z).to(tl.float32)
    y = tl.where(row > size // 2, row - size, row).to(tl.float32)
    target = planes + tl.program_id(0).to(tl.int64) * size
    for x0 in range(0, size, BLOCK):
        column = x0 + tl.arange(0, BLOCK)
        mask = column < size
        x = tl.where(column > size // 2, column - size, column).to(tl.float32)
        place = tl.minimum(tl.sqrt(x * x + (y * y + z * z)) * per_step, last)
        index = place.to(tl.int32)
        low, high = tl.load(table + index), tl.load(table + index + 1)
        value = tl.load(target + column, mask=mask, other=0.0)
        tl.store(target + column, value * (low + (high - low) * (place - index.to(tl.float32))), mask=mask)


def fold_triton(values_V: Tensor, rows: RowTable, phase_Z2: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """See `fold`."""
    planes, size, columns = shape
    out = values_V.new_empty(*shape, 2)
    reach = min(rows.half, size // 2)
    _fold_kernel[(planes * size,)](
        values_V.contiguous(), rows.start_ZY, rows.length_ZY, phase_Z2.contiguous(), out, planes, size, columns, rows.half, reach,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out


def unfold_triton(part_MYX2: Tensor, rows: RowTable, phase_Z2: Tensor, out_V: Tensor) -> None:
    """See `unfold`."""
    planes, size, columns, _ = part_MYX2.shape
    reach = min(rows.half, size // 2)
    _unfold_kernel[((2 * reach + 1) ** 2,)](
        part_MYX2.contiguous(), rows.start_ZY, rows.length_ZY, phase_Z2.contiguous(), out_V, planes, size, columns, rows.half,
        reach, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def radial_triton(planes_MYX: Tensor, table: RadialTable, strides: int, residue: int) -> None:
    """See `radial`."""
    planes, size, _ = planes_MYX.shape
    _radial_kernel[(planes * size,)](
        planes_MYX, table.values_T.contiguous(), 1 / (size * table.step), float(len(table.values_T) - 2), strides, residue, size,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
