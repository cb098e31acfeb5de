"""`fold` and its companions on the GPU: a program for a run of voxels of a row; float32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.fold import RadialTable

BLOCK, WARPS = 512, 4  # voxels of a row that a program works on
FLAT = 2048  # voxels that a program of `divide` works on


@triton.jit
def _fold_kernel(
    values, start, length, phase, out, planes, size, columns, half, reach, TWINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    m, row = tl.program_id(0) // size, tl.program_id(0) % size
    y = tl.where(row > size // 2, row - size, row)
    edge = 2 * half + 1
    within = tl.abs(y) <= reach
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, imaginary = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for z in range(m - ((reach + m) // planes) * planes, reach + 1, planes):
        re, im = tl.load(phase + 2 * (z + half)), tl.load(phase + 2 * (z + half) + 1)
        for twin in tl.static_range(TWINS):  # y = size/2 is stored as -size/2, too
            used = within & (y == size // 2) if twin else within
            table = (z + half) * edge + half + (-y if twin else y)
            count = tl.load(length + table, mask=used, other=0)
            begin = tl.load(start + table, mask=used, other=0)
            value = tl.load(values + begin + x, mask=(x < count) & (x < columns), other=0.0)
            real += re * value
            imaginary += im * value
    target = out + tl.program_id(0).to(tl.int64) * columns * 2
    pair = 2 * x[:, None] + tl.arange(0, 2)[None, :]
    tl.store(target + pair, tl.join(real, imaginary), mask=(x < columns)[:, None])


@triton.jit
def _unfold_kernel(part, start, length, phase, out, planes, size, columns, half, reach, BLOCK: tl.constexpr):
    z, y = tl.program_id(0) // (2 * reach + 1) - reach, tl.program_id(0) % (2 * reach + 1) - reach
    table = (z + half) * (2 * half + 1) + y + half
    count, begin = tl.minimum(tl.load(length + table), columns), tl.load(start + table)
    re, im = tl.load(phase + 2 * (z + half)), tl.load(phase + 2 * (z + half) + 1)
    m, row = ((z % planes) + planes) % planes, ((y % size) + size) % size
    source = part + (m.to(tl.int64) * size + row) * columns * 2
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = x < count
    pair = 2 * x[:, None] + tl.arange(0, 2)[None, :]
    real, imaginary = tl.split(tl.load(source + pair, mask=mask[:, None], other=0.0))
    before = tl.load(out + begin + x, mask=mask, other=0.0)
    tl.store(out + begin + x, before + re * real + im * imaginary, mask=mask)


@triton.jit
def _radial_kernel(planes, table, per_step, last, strides, residue, size, BLOCK: tl.constexpr):
    m, row = tl.program_id(0) // size, tl.program_id(0) % size
    z = strides * m + residue
    z = tl.where(z > size // 2, z - size, z).to(tl.float32)
    y = tl.where(row > size // 2, row - size, row).to(tl.float32)
    target = planes + tl.program_id(0).to(tl.int64) * size
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    x = tl.where(column > size // 2, column - size, column).to(tl.float32)
    place = tl.minimum(tl.sqrt(x * x + (y * y + z * z)) * per_step, last)
    index = place.to(tl.int32)
    low, high = tl.load(table + index), tl.load(table + index + 1)
    value = tl.load(target + column, mask=mask, other=0.0)
    tl.store(target + column, value * (low + (high - low) * (place - index.to(tl.float32))), mask=mask)


@triton.jit
def _divide_kernel(values, divisor, least, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    found = tl.maximum(tl.abs(tl.load(divisor + i, mask=mask, other=1.0)), least)
    tl.store(values + i, tl.load(values + i, mask=mask, other=0.0) / found, mask=mask)


def fold_triton(values_V: Tensor, rows: RowTable, phase_Z2: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """See `fold`."""
    planes, size, columns = shape
    out = values_V.new_empty(*shape, 2)
    reach = min(rows.half, size // 2)
    _fold_kernel[(planes * size, triton.cdiv(columns, BLOCK))](
        values_V.contiguous(), rows.start_ZY, rows.length_ZY, phase_Z2.contiguous(), out, planes, size, columns, rows.half, reach,
        TWINS=2 if 2 * reach >= size else 1, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out


def unfold_triton(part_MYX2: Tensor, rows: RowTable, phase_Z2: Tensor, out_V: Tensor) -> None:
    """See `unfold`."""
    planes, size, columns, _ = part_MYX2.shape
    reach = min(rows.half, size // 2)
    _unfold_kernel[((2 * reach + 1) ** 2, triton.cdiv(min(columns, rows.half + 1), BLOCK))](
        part_MYX2.contiguous(), rows.start_ZY, rows.length_ZY, phase_Z2.contiguous(), out_V, planes, size, columns, rows.half,
        reach, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def radial_triton(planes_MYX: Tensor, table: RadialTable, strides: int, residue: int) -> None:
    """See `radial`."""
    planes, size, _ = planes_MYX.shape
    _radial_kernel[(planes * size, triton.cdiv(size, BLOCK))](
        planes_MYX, table.values_T.contiguous(), 1 / (size * table.step), float(len(table.values_T) - 2), strides, residue, size,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def divide_triton(values_V: Tensor, divisor_V: Tensor, least: float) -> None:
    """See `divide`."""
    count = values_V.numel()
    _divide_kernel[(triton.cdiv(count, FLAT),)](values_V, divisor_V, least, count, BLOCK=FLAT, num_warps=WARPS)
