"""Transforms of padded maps on the GPU, one kernel for each axis: launches of axes.cu (`pruned` is their definition).

Along y a block has one plane z and some neighbouring columns x, along z one row y and some columns, along x some lines: it reads
each line once, transforms it in shared memory, and writes what is kept of it once.

    to map:    packed voxels (over their weights) --y--> lines [N rows, (z, x)] --z--> [N, N, x] --x, real--> map
    from map:  the same backwards; the map is divided by the gridding correction as it is read

Between y and z a line (z, x) is there only if it holds a voxel within the radius; lines of a plane lie side by side, planes one
after the other (`Between`). Ranks that share the planes exchange exactly these lines: rows y of all planes for each.

A thread has as many numbers of a line as fit its registers, and transforms these: two or three passes (1,600 = 40 x 40), between
which numbers change hands in shared memory, side by side in x; the last one hands them over in the order in which the kernel that
writes wants them. Real transforms along x are complex ones of P / 2. Lengths: even, without prime factors beyond 13, up to some
7,000 (four lines fill a block's memory then).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.nvrtc import Kernel, load

SOURCE = Path(__file__).with_name("axes.cu")
EDGE = 3.0  # px, of the sphere outside of which a map is its mean
PROCESSOR_BYTES = 227 * 1024
REGISTERS = 2**16  # of a processor
SPARE_REGISTERS = 32  # of a thread, beside the numbers that it transforms
LARGEST_RADIX, LARGEST_FILLING, FILLING_ALONE = 40, 20, 16  # numbers that a thread transforms at a time
LINES = (8, 4)  # of a block: eight, if they fit, so that whole sectors of 32 bytes are read and written
TOGETHER = 16  # columns of a run, or a multiple; also where lines of a plane begin, if nobody has to send them
SUMMERS = 256
MOST_SHARED_BYTES = 226 * 1024
MOST_THREADS = 1024
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

    @cached_property
    def curves_J4(self) -> Tensor:
        """The curves by steps of half a shell, float32 [2 S - 1, 4]: prior, floor, gain, 0; the floor is the shell's within,
        the others are of the nearest one."""
        assert self.curves_S is not None
        prior_S, floor_S, gain_S = self.curves_S
        half_J = torch.arange(2 * len(prior_S) - 1, device=prior_S.device)
        nearest_J, within_J = (half_J + 1) // 2, half_J // 2
        return torch.stack([prior_S[nearest_J], floor_S[within_J], gain_S[nearest_J], 0 * gain_S[nearest_J]], 1).float()

    @property
    def steps(self) -> float:
        """Of half a shell, in a voxel; rounded up, so that voxels at a shell's very border do not fall short of it."""
        return float(np.nextafter(np.float32(2 / self.padding), np.float32(4))) if 2 % self.padding else 2 / self.padding


@dataclass(frozen=True)
class Between:
    """Where lines lie between the transforms along y and z: arrays [rows, lines of some planes], one after the other, of those
    with z^2 + x^2 <= limit2. counts: lines of each; planes: [P + 1, 4], of plane z at z + P / 2 (`Plane` of axes.cu)."""

    limit2: int
    counts: list[int]
    planes: Tensor

    @classmethod
    def of_runs(
        cls, size: int, planes: list[Tensor], rows: int, parts: list[slice], limit2: int, device: torch.device,
        align: int = 1,
    ) -> list[Between]:
        """For each run of columns. planes: z of each array, on the host; align: lines of a plane begin at multiples of it. It
        goes to the device without waiting for that."""
        start_R1, stop_R1 = (np.array([[getattr(part, end)] for part in parts]) for end in ("start", "stop"))
        table, begin_R1 = np.zeros((len(parts), size + 1, 4), dtype=np.int32), np.zeros((len(parts), 1), dtype=np.int64)
        totals = []
        for plane_Z in planes:
            left2_Z = limit2 - plane_Z.numpy().astype(np.int64) ** 2
            reach_Z = np.where(left2_Z < 0, -1, np.sqrt(left2_Z.clip(0) + 0.5).astype(np.int64))  # largest x
            count_RZ = (reach_Z + 1 - start_R1).clip(0, stop_R1 - start_R1)
            room_RZ = -(-count_RZ // align) * align
            total_R1 = room_RZ.sum(1, keepdims=True)
            at_Z = plane_Z.numpy() + size // 2
            table[:, at_Z, 0] = begin_R1 + room_RZ.cumsum(1) - room_RZ
            table[:, at_Z, 1], table[:, at_Z, 2] = total_R1, count_RZ
            begin_R1 = begin_R1 + rows * total_R1
            totals.append(total_R1[:, 0])
        assert begin_R1.max(initial=0) < 2**31
        there = torch.from_numpy(table)
        there = there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there
        counts_R = np.array(totals).reshape(len(planes), -1).T.tolist()
        return [cls(limit2, counts, planes_P4) for counts, planes_P4 in zip(counts_R, there, strict=True)]


@lru_cache(maxsize=64)
def passes(length: int, most: int) -> tuple[int, ...]:
    """Radices of a transform's passes: as few as there can be, then such as give all threads of a line work in all of them (a
    thread has one number of the largest radix at a time), then as even ones as possible; an even one first."""
    for count in range(1, 30):
        found = [radices for radices in _products(length, count) if max(radices) <= (most if count < 3 else min(most, 20))]
        if found:
            best = min(found, key=lambda radices: (_slots(length, radices), max(radices), radices))
            return tuple(sorted(best, key=lambda radix: (radix % 2, radix)))
    raise AssertionError(f"a transform of {length}")


def _products(length: int, count: int, least: int = 2) -> list[tuple[int, ...]]:
    """All ascending factors, so many of them."""
    if count == 1:
        return [(length,)] if length >= least or length == 1 else []
    divisors = [d for d in range(least, math.isqrt(length) + 1) if length % d == 0]
    return [(d, *rest) for d in divisors for rest in _products(length // d, count - 1, d)]


def _slots(length: int, radices: tuple[int, ...]) -> int:
    """Numbers that pass through a line's threads, those of threads without work counted in."""
    workers = length // max(radices)
    return sum(-(-(length // radix) // workers) * radix * workers for radix in radices)


def serves(box: int, size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels take a padded size: in single precision on a GPU, if it is even and has no large prime factor."""
    if device.type != "cuda" or dtype != torch.float32 or box < SMALLEST or size % 2:
        return False
    left = size
    for factor in range(2, LARGEST_FACTOR + 1):
        while left % factor == 0:
            left //= factor
    kinds = (LARGEST_RADIX, LARGEST_FILLING, FILLING_ALONE)
    return left == 1 and max(8 * min(LINES) * room(passes(size, most)) for most in kinds) <= MOST_SHARED_BYTES


@dataclass(frozen=True)
class Cut:
    """How blocks of threads transform lines. radices: of the passes; lines: of a block; workers: threads of a line; shared: bytes
    of a block; blocks: at a time on a processor."""

    radices: tuple[int, ...]
    lines: int
    workers: int
    shared: int
    blocks: int

    @classmethod
    def of(cls, length: int, most: int) -> Cut:
        """The one that the module's constants ask for."""
        radices = passes(length, most)
        for lines in LINES:
            workers, shared = min(length // max(radices), MOST_THREADS // lines), 8 * lines * room(radices)
            if shared <= MOST_SHARED_BYTES:
                break
        registers = 32 * -(-lines * workers // 32) * (SPARE_REGISTERS + 2 * max(radices))
        return cls(radices, lines, workers, shared, max(1, min(PROCESSOR_BYTES // (shared + 1024), REGISTERS // registers)))

    @property
    def threads(self) -> int:
        return self.lines * self.workers


def room(radices: tuple[int, ...]) -> int:
    """Numbers for which a line has room in shared memory (`Passes` of axes.cu)."""
    blocks = [math.prod(radices[number:]) for number in range(1, len(radices))]
    last = math.prod(radices) - 1
    return last + 1 + sum(last // block for block in blocks if block % 2 == 0)


@dataclass(frozen=True)
class Axes:
    """The transforms of the three axes between a map of N^3 and its padded transform of P^3. box: N; size: P."""

    box: int
    size: int
    device: torch.device

    @cached_property
    def filling(self) -> Cut:
        """Of columns, along y on the way to a map: in more threads, as most of the time goes with waiting for voxels; where a
        processor has one block alone, a thread reads more of them at a time, and none is idle meanwhile."""
        cut = Cut.of(self.size, LARGEST_FILLING)
        if cut.blocks > 1:
            return cut
        alone = Cut.of(self.size, FILLING_ALONE)
        units = self.size // alone.radices[0]  # of the first pass
        return replace(alone, workers=-(-units // -(-units // alone.workers)))

    @cached_property
    def along(self) -> Cut:
        """Of columns, along y and z."""
        return Cut.of(self.size, LARGEST_RADIX)

    @cached_property
    def across(self) -> Cut:
        """Of lines along x."""
        return Cut.of(self.size // 2, LARGEST_RADIX)

    def half(self, rows: int, columns: int) -> Tensor:
        """Room for what lies between the transforms along z and x, [N, rows, pitch]: lines of whole sectors."""
        return torch.empty(self.box, rows, -(-columns // 16) * 16, dtype=torch.complex64, device=self.device)

    def column_runs(self, columns: int, others: int, room: int = 0, most: int | None = None) -> list[slice]:
        """Columns that are worked on at a time, with `others` lines each; room: for so many numbers, if more than usual; most: no
        more than that, if it is fewer."""
        numbers = max(NUMBERS_AT_ONCE, room) if most is None else min(max(NUMBERS_AT_ONCE, room), most)
        step = max(1, numbers // max(1, others) // TOGETHER) * TOGETHER
        return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]

    def to_y(self, cut: Tensor, between: Between, sums: Sums, plane_Z: Tensor, wanted: range, part: slice) -> None:
        """Sums of planes z (int32) -> columns of `part`, the rows y that are wanted."""
        rows, data_V2, weight_V = sums.rows, sums.data_V2, sums.weight_V
        assert data_V2.stride(1) == 1
        kind, curves_J4, last = "PLAIN", None, 0
        strides = data_V2.stride(0), 0 if weight_V is None else weight_V.stride(0)
        if weight_V is not None:
            beside = strides == (4, 4) and weight_V.data_ptr() == data_V2.data_ptr() + 8 and data_V2.data_ptr() % 16 == 0
            kind, curves_J4 = "TOGETHER" if beside else "APART", sums.curves_J4
            last = len(curves_J4) - 1
        self._launch(
            "to_y", (self._tiles(part, self.filling), len(plane_Z)), cut, between.planes, data_V2, weight_V, rows.start_ZY,
            plane_Z, curves_J4, self.roots, *strides, rows.half, between.limit2, sums.steps, last, wanted.start, wanted.stop,
            part.start, part.stop - part.start, wide=rows.start_ZY.dtype == torch.int64, kind=kind,
        )  # fmt: skip

    def to_z(self, half_ZYX: Tensor, cut: Tensor, between: Between, part: slice) -> None:
        """-> columns of `part` of [N, rows, pitch]."""
        self._along_z("to_z", half_ZYX, half_ZYX, cut, between, part)

    def from_z(self, half_ZYX: Tensor, cut: Tensor, between: Between, part: slice) -> None:
        """Columns of `part` of [N, rows, pitch] -> lines."""
        self._along_z("from_z", half_ZYX, cut, half_ZYX, between, part)

    def _along_z(self, name: str, half_ZYX: Tensor, into: Tensor, of: Tensor, between: Between, part: slice) -> None:
        _, rows, pitch = half_ZYX.shape
        grid = self._tiles(part, self.along), rows
        self._launch(name, grid, into, of, between.planes, self.roots, pitch, part.start, part.stop - part.start)

    def to_x(self, half_ZYX: Tensor, columns: int) -> Tensor:
        """[N, rows, pitch] -> the map [N, rows, N], in its units, without gridding correction."""
        planes, rows, pitch = half_ZYX.shape
        map_ZYX = torch.empty(planes, rows, self.box, device=half_ZYX.device)
        scale = self.box**2 / self.size**3
        blocks = -(-planes * rows // self.across.lines)
        self._launch("to_x", (blocks, 1), map_ZYX, half_ZYX, self.roots, planes * rows, pitch, columns, scale)
        return map_ZYX

    def from_x(self, map_ZYX: Tensor, z_A: Tensor, first_y: int, columns: int) -> Tensor:
        """Rows y of a map [N, rows, N] -> their transform along x [N, rows, pitch], gridding-corrected."""
        planes, rows, _ = map_ZYX.shape
        whole_pairs = map_ZYX.data_ptr() % 8 == 0 and map_ZYX.stride(0) % 2 == 0 and map_ZYX.stride(1) % 2 == 0
        map_ZYX = map_ZYX if map_ZYX.stride(2) == 1 and whole_pairs else map_ZYX.contiguous()
        half_ZYX = self.half(rows, columns)
        blocks = -(-planes * rows // self.across.lines)
        self._launch("from_x", (blocks, 1), half_ZYX, map_ZYX, z_A, self.roots, planes * rows, rows, first_y, map_ZYX.stride(0),
                     map_ZYX.stride(1), half_ZYX.shape[2], columns, 1 / self.box**2)  # fmt: skip
        return half_ZYX

    def from_y(self, voxels_V2: Tensor, cut: Tensor, between: Between, rows: RowTable, plane_Z: Tensor, part: slice) -> None:
        """Lines of planes z (int32), N rows of them -> packed voxels [V, 2] within the radius."""
        self._launch(
            "from_y", (self._tiles(part, self.along), len(plane_Z)), voxels_V2, cut, between.planes, rows.start_ZY, plane_Z,
            self.roots, rows.half, between.limit2, part.start, part.stop - part.start, wide=rows.start_ZY.dtype == torch.int64,
        )  # fmt: skip

    def outside(self, map_ZYX: Tensor, z_A: Tensor, first_y: int) -> Tensor:
        """(sum of a part of a map times its share outside of the sphere, sum of these shares), float64 [2]."""
        planes, rows, _ = map_ZYX.shape
        blocks = self._summing_blocks(planes * rows)
        sums_B2 = torch.empty(blocks, 2, dtype=torch.float64, device=map_ZYX.device)
        self._launch("sum_outside", (blocks, 1), sums_B2, map_ZYX, z_A, planes * rows, rows, first_y)
        return sums_B2.sum(0)

    def finish(self, map_ZYX: Tensor, mean: Tensor | None, z_A: Tensor, first_y: int) -> None:
        """Blend a part of a map into its mean [1] outside of the sphere, if there is one; divide by the gridding correction."""
        planes, rows, _ = map_ZYX.shape
        self._launch("finish", (self._summing_blocks(planes * rows), 1), map_ZYX, mean, z_A, planes * rows, rows, first_y)

    @property
    def roots(self) -> Tensor:
        """exp(-2 pi i j / P), complex64 [P]."""
        return _roots(self.size, self.device)

    def _tiles(self, part: slice, cut: Cut) -> int:
        return -(-(part.stop - part.start) // cut.lines)

    def _summing_blocks(self, lines: int) -> int:
        return min(SUMMING_BLOCKS, -(-lines * 32 // SUMMERS))

    def _launch(
        self, name: str, grid: tuple[int, int], *arguments: Tensor | int | float | None, wide: bool = False, kind: str = ""
    ) -> None:
        if 0 in grid:
            return
        others = {"to_y": self.filling, "to_x": self.across, "from_x": self.across, "sum_outside": None, "finish": None}
        cut = others.get(name, self.along)
        shared, threads = (16 * SUMMERS, SUMMERS) if cut is None else (cut.shared, cut.threads)
        with on(self.device):
            kernel(name, self.device, self.defines(wide, kind), shared)(grid, threads, *arguments)

    def defines(self, wide: bool, kind: str = "") -> tuple[str, ...]:
        """What axes.cu is compiled with."""
        along, across = self.filling if kind else self.along, self.across
        numbers = {
            "P": self.size, "BOX": self.box, "COLUMNS": along.lines, "WORKERS": along.workers, "BLOCKS": along.blocks,
            "LINES": across.lines, "LINE_WORKERS": across.workers, "LINE_BLOCKS": across.blocks, "SUMMERS": SUMMERS,
            "WIDE": int(wide),
        }  # fmt: skip
        for name, cut in (("FULL", along), ("HALVED", across)):
            numbers[name] = int("".join(f"{radix:02d}" for radix in cut.radices))
        return *(f"{name}={number}" for name, number in numbers.items()), f"EDGE={EDGE}f", *([f"KIND={kind}"] if kind else [])


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
