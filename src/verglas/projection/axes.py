"""Transforms of padded maps on the GPU, one kernel for each axis: launches of axes.cu (`pruned` is their definition).

Along y a block has one plane z and some neighbouring columns x, along z one row y and some columns, along x some lines: it reads
each line once, transforms it in shared memory, and writes what is kept of it once.

    to map:    packed voxels (over their weights) --y--> lines [N rows, (z, x)] --z--> [N, N, x] --x, real--> map
    from map:  the same backwards; the map is divided by the gridding correction as it is read

Between y and z a line (z, x) is there only if it holds a voxel within the radius; lines of a plane lie side by side, planes one
after the other (`Between`). Ranks that share the planes exchange exactly these lines: rows y of all planes for each.

A transform is in place, radix by radix (8, 4, 2, 13, 11, 7, 5, 3), numbers side by side in x, so that no two threads of a half
warp meet in a bank; it ends in the order of reversed digits, which the kernel that writes looks up. Real transforms along x are
complex ones of P / 2. Lengths: even, without prime factors beyond 13, up to 7,000 (four lines fill a block's memory then).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.nvrtc import Kernel, load

SOURCE = Path(__file__).with_name("axes.cu")
EDGE = 3.0  # px, of the sphere outside of which a map is its mean
SHARED_BYTES = 112 * 1024  # of a block: two at a time on a processor with 227 KB
MOST_SHARED_BYTES = 224 * 1024
LARGEST_FACTOR = 13  # of a length that the kernels transform
SMALLEST = 128  # px, of a map: for smaller ones the kernels are not worth compiling
NUMBERS_AT_ONCE = 2**26  # complex numbers between two axes: 0.5 GB
SUMMING_BLOCKS = 1056


@dataclass(frozen=True)
class Sums:
    """What is put into a padded transform: data, or data / (max(weight + prior, floor) gain) with curves (prior, floor, gain) by
    shell; padding: of the shells."""

    data_V2: Tensor
    rows: RowTable
    weight_V: Tensor | None = None
    curves_S: tuple[Tensor, Tensor, Tensor] | None = None
    padding: float = 1.0


@dataclass(frozen=True)
class Between:
    """Where lines lie between the transforms along y and z: arrays [rows, lines of some planes], one after the other, of those
    with z^2 + x^2 <= limit2. counts: lines of each; base, step: [P + 1], of plane z at z + P / 2 (see axes.cu)."""

    limit2: int
    counts: list[int]
    base: Tensor
    step: Tensor

    @classmethod
    def of(cls, size: int, planes: list[Tensor], rows: int, part: slice, limit2: int, device: torch.device) -> Between:
        """planes: z of each array, on the host; part: columns x."""
        base, step, counts, begin = torch.zeros(size + 1, dtype=torch.int64), torch.zeros(size + 1, dtype=torch.int32), [], 0
        for plane_Z in planes:
            reach_Z = (limit2 - plane_Z.double() ** 2).clamp_min(-1).add(0.5).sqrt().floor().nan_to_num(-1)  # largest x
            count_Z = (reach_Z.long() + 1 - part.start).clamp(0, part.stop - part.start)
            counts.append(int(count_Z.sum()))
            base[plane_Z + size // 2] = begin + count_Z.cumsum(0) - count_Z
            step[plane_Z + size // 2] = counts[-1]
            begin += rows * counts[-1]
        return cls(limit2, counts, base.to(device), step.to(device))


def serves(box: int, size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels take a padded size: in single precision on a GPU, if it is even and has no large prime factor."""
    if device.type != "cuda" or dtype != torch.float32 or box < SMALLEST or size % 2:
        return False
    left = size
    for factor in range(2, LARGEST_FACTOR + 1):
        while left % factor == 0:
            left //= factor
    return left == 1 and size * 4 * 8 <= MOST_SHARED_BYTES


@dataclass(frozen=True)
class Axes:
    """The transforms of the three axes between a map of N^3 and its padded transform of P^3. box: N; size: P."""

    box: int
    size: int
    device: torch.device

    @property
    def columns(self) -> int:
        """x that a block has."""
        return next((some for some in (16, 8) if self.size * some * 8 <= SHARED_BYTES), 4)

    @property
    def lines(self) -> int:
        """Lines along x that a block has."""
        return next((some for some in (16, 8) if self.size // 2 * (some + 1) * 8 <= SHARED_BYTES), 4)

    @property
    def threads(self) -> int:
        return 512 if self.size * self.columns >= 8192 else 256

    def half(self, rows: int, columns: int) -> Tensor:
        """Room for what lies between the transforms along z and x, [N, rows, pitch]: lines of whole sectors."""
        return torch.empty(self.box, rows, -(-columns // 16) * 16, dtype=torch.complex64, device=self.device)

    def column_runs(self, columns: int, others: int) -> list[slice]:
        """Columns that are worked on at a time, with `others` lines each."""
        step = max(1, NUMBERS_AT_ONCE // max(1, others) // self.columns) * self.columns
        return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]

    def to_y(self, cut: Tensor, between: Between, sums: Sums, plane_Z: Tensor, wanted: range, part: slice) -> None:
        """Sums of planes z (int32) -> columns of `part`, the rows y that are wanted."""
        rows, data_V2, weight_V = sums.rows, sums.data_V2, sums.weight_V
        assert data_V2.stride(1) == 1
        prior, floor, gain = (None, None, None) if sums.curves_S is None else (c.float().contiguous() for c in sums.curves_S)
        steps = data_V2.stride(0), 0 if weight_V is None else weight_V.stride(0)
        last = 0 if sums.curves_S is None else len(sums.curves_S[0]) - 1
        self._launch(
            "to_y", (self._tiles(part), len(plane_Z)), cut, between.base, between.step, data_V2, weight_V, rows.start_ZY, plane_Z,
            prior, floor, gain, self.roots, *steps, rows.half, between.limit2, float(sums.padding), last, self.box, wanted.start,
            wanted.stop, part.start, part.stop - part.start, wide=rows.start_ZY.dtype == torch.int64,
        )  # fmt: skip

    def to_z(self, half_ZYX: Tensor, cut: Tensor, between: Between, part: slice) -> None:
        """-> columns of `part` of [N, rows, pitch]."""
        self._along_z("to_z", half_ZYX, half_ZYX, cut, between, part)

    def from_z(self, half_ZYX: Tensor, cut: Tensor, between: Between, part: slice) -> None:
        """Columns of `part` of [N, rows, pitch] -> lines."""
        self._along_z("from_z", half_ZYX, cut, half_ZYX, between, part)

    def _along_z(self, name: str, half_ZYX: Tensor, into: Tensor, of: Tensor, between: Between, part: slice) -> None:
        _, rows, pitch = half_ZYX.shape
        self._launch(name, (self._tiles(part), rows), into, of, between.base, between.step, self.roots, between.limit2, self.box,
                     pitch, part.start, part.stop - part.start)  # fmt: skip

    def to_x(self, half_ZYX: Tensor, columns: int) -> Tensor:
        """[N, rows, pitch] -> the map [N, rows, N], in its units, without gridding correction."""
        planes, rows, pitch = half_ZYX.shape
        map_ZYX = torch.empty(planes, rows, self.box, device=half_ZYX.device)
        scale = self.box**2 / self.size**3
        blocks = -(-planes * rows // self.lines)
        self._launch("to_x", (blocks, 1), map_ZYX, half_ZYX, self.roots, planes * rows, self.box, pitch, columns, scale)
        return map_ZYX

    def from_x(self, map_ZYX: Tensor, z_A: Tensor, first_y: int, columns: int) -> Tensor:
        """Rows y of a map [N, rows, N] -> their transform along x [N, rows, pitch], gridding-corrected."""
        planes, rows, _ = map_ZYX.shape
        assert map_ZYX.stride(2) == 1
        half_ZYX = self.half(rows, columns)
        blocks = -(-planes * rows // self.lines)
        self._launch("from_x", (blocks, 1), half_ZYX, map_ZYX, z_A, self.roots, planes * rows, rows, first_y, map_ZYX.stride(0),
                     map_ZYX.stride(1), self.box, half_ZYX.shape[2], columns, 1 / self.box**2)  # fmt: skip
        return half_ZYX

    def from_y(self, voxels_V2: Tensor, cut: Tensor, between: Between, rows: RowTable, plane_Z: Tensor, part: slice) -> None:
        """Lines of planes z (int32), N rows of them -> packed voxels [V, 2] within the radius."""
        self._launch(
            "from_y", (self._tiles(part), len(plane_Z)), voxels_V2, cut, between.base, between.step, rows.start_ZY, plane_Z,
            self.roots, rows.half, between.limit2, self.box, part.start, part.stop - part.start,
            wide=rows.start_ZY.dtype == torch.int64,
        )  # fmt: skip

    def outside(self, map_ZYX: Tensor, z_A: Tensor, first_y: int) -> Tensor:
        """(sum of a part of a map times its share outside of the sphere, sum of these shares), float64 [2]."""
        planes, rows, box = map_ZYX.shape
        sums_B2 = torch.empty(min(SUMMING_BLOCKS, planes * rows), 2, dtype=torch.float64, device=map_ZYX.device)
        self._launch("sum_outside", (len(sums_B2), 1), sums_B2, map_ZYX, z_A, planes * rows, rows, first_y, box)
        return sums_B2.sum(0)

    def finish(self, map_ZYX: Tensor, mean: Tensor | None, z_A: Tensor, first_y: int) -> None:
        """Blend a part of a map into its mean [1] outside of the sphere, if there is one; divide by the gridding correction."""
        planes, rows, box = map_ZYX.shape
        self._launch("finish", (planes * rows, 1), map_ZYX, mean, z_A, rows, first_y, box)

    @property
    def roots(self) -> Tensor:
        """exp(-2 pi i j / P), complex64 [P]."""
        return _roots(self.size, self.device)

    def _tiles(self, part: slice) -> int:
        return -(-(part.stop - part.start) // self.columns)

    def _launch(self, name: str, grid: tuple[int, int], *arguments: Tensor | int | float | None, wide: bool = False) -> None:
        if 0 in grid:
            return
        along_x = name in ("to_x", "from_x")
        numbers = self.size // 2 * (self.lines + 1) if along_x else self.size * self.columns
        shared = 16 * self.threads if name in ("sum_outside", "finish") else 8 * numbers
        with on(self.device):
            kernel(name, self.device, self._defines(wide), shared)(grid, self.threads, *arguments)

    def compiled(self, wide: bool) -> None:
        """Have the kernels compiled that read row tables of int32, or (wide) int64."""
        kernel("to_x", self.device, self._defines(wide), 0)

    def _defines(self, wide: bool) -> tuple[str, ...]:
        words = {"P": self.size, "COLUMNS": self.columns, "LINES": self.lines, "THREADS": self.threads}
        return (*(f"{name}={value}" for name, value in words.items()), f"EDGE={EDGE}f", f"WIDE={int(wide)}")


@lru_cache(maxsize=8)
def _roots(size: int, device: torch.device) -> Tensor:
    angle_P = torch.arange(size, dtype=torch.float64) * (-2 * torch.pi / size)
    return torch.polar(torch.ones_like(angle_P), angle_P).to(device, torch.complex64)


def kernel(name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Kernel:
    """A function of axes.cu."""
    return load(SOURCE, name, device, defines, shared=shared)


def on(device: torch.device) -> AbstractContextManager[object]:
    """In which launches go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
