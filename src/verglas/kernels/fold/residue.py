"""One residue of a convolution by strides on the GPU, in five passes over its transform (residue.cu)."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.fold import RadialTable
from verglas.kernels.nvrtc import Kernel, NvrtcError, load

SOURCE = Path(__file__).with_name("residue.cu")
MOST_SHARED = 200_000  # bytes of a block
RADICES = (2, 3, 5, 7)
AXES = {"fold_planes": 0, "unfold_planes": 0, "back_along_rows": 1, "along_rows": 1, "multiply_lines": 2}  # 0: z, 1: y, 2: x
PASSES = ("fold_planes", "back_along_rows", "multiply_lines", "along_rows", "unfold_planes")
NO_MIRROR = 2  # the other mirrors: residue.cu
_ASKING = Lock()


@dataclass(frozen=True)
class Cut:
    """How the lines of one axis are worked on: so many side by side by a block of so many threads, at least so many blocks at a
    time on a multiprocessor. length: of a line."""

    phase: int
    length: int
    lines: int
    threads: int
    blocks: int

    @classmethod
    def of(cls, phase: int, planes: int, size: int) -> Cut:
        """phase 0: z, 1: y, 2: x."""
        if phase == 0:
            if 1000 < planes <= 1700:  # beyond, two blocks of eight lines are more than there is room for
                return cls(phase, planes, 8, 512, 2)
            return cls(phase, planes, *((8, 128, 3) if planes <= 400 else (4, 256, 4 if planes <= 1000 else 3)))
        if phase == 1:
            return cls(phase, size, *((4, 512, 2) if size > 1024 else (4, 448, 1)))
        return cls(phase, size // 2, *((1, 96, 6) if size > 1024 else (8, 384, 2) if size >= 512 else (16, 384, 2)))

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 8 * self.lines * (self.length + (self.phase == 2))

    def defines(self, planes: int, size: int, wide: bool, mirror: int) -> tuple[str, ...]:
        """For the preprocessor."""
        words: tuple[str, ...] = (f"SIZE={size}", f"PHASE={self.phase}", f"LINES={self.lines}")
        words += f"THREADS={self.threads}", f"BLOCKS={self.blocks}"
        if self.phase == 0:
            words += f"PLANES={planes}", f"MIRROR={mirror}", *(("WIDE=1",) if wide else ())
        return words


@dataclass(frozen=True)
class Residues:
    """rows: where the voxels lie; planes: M; size: P."""

    rows: RowTable
    planes: int
    size: int

    @property
    def strides(self) -> int:
        """Planes of a residue are so many apart."""
        return self.size // self.planes

    def mirror(self, residue: int) -> int:
        """Which plane holds the complex conjugates of plane m's numbers (residue.cu)."""
        return 0 if residue == 0 else 1 if 2 * residue == self.strides else NO_MIRROR

    def kept(self, residue: int) -> int:
        """Planes of a residue that are transformed."""
        return (self.planes // 2 + 1, (self.planes + 1) // 2, self.planes)[self.mirror(residue)]

    def part(self) -> Tensor:
        """Memory of one residue, not filled: complex, rows of a multiple of eight."""
        columns = (self.size // 2 + 1 + 7) // 8 * 8
        return torch.empty(most_kept(self.planes, self.size), self.size, columns, 2, device=self.rows.device)

    @cached_property
    def places_YZ2(self) -> Tensor:
        """(first voxel, voxels) of each row, z the fastest: a line along z finds those of its row together."""
        pairs = torch.stack([self.rows.start_ZY.T, self.rows.length_ZY.T.to(self.rows.start_ZY)], -1)
        return pairs.contiguous()

    @cached_property
    def reach_Y(self) -> Tensor:
        """Columns of row y, in the order of a transform, that hold voxels in any plane, there or at a larger |y|: int32."""
        half, longest = self.rows.half, self.rows.length_ZY.amax(0).clamp_max(self.size // 2 + 1)
        longest = torch.maximum(longest, longest.flip(0))[half:].flip(0).cummax(0).values.flip(0)  # of |y| or more
        reach_Y = torch.zeros(self.size, dtype=torch.int32, device=self.rows.device)
        reach_Y[: half + 1] = longest.int()
        reach_Y[self.size - half :] = longest[1:].flip(0).int()
        return reach_Y

    @cached_property
    def top_X(self) -> Tensor:
        """The largest |y| whose `reach_Y` is beyond column x, -1 if none is: int32 [P / 2 + 1]."""
        falling = self.reach_Y[: self.rows.half + 1].flip(0).contiguous()
        columns = torch.arange(self.size // 2 + 1, dtype=torch.int32, device=self.rows.device)
        return (len(falling) - torch.searchsorted(falling, columns, right=True) - 1).int()

    def __call__(
        self, values_V: Tensor, part: Tensor, table: RadialTable, phase_Z2: Tensor, weight: float, residue: int, out_V: Tensor,
        fresh: bool, divided_V: Tensor | None = None, least: float = 0,
    ) -> None:  # fmt: skip
        """Add what the planes strides m + residue find to `out_V`, times `weight`. fresh: what it held does not count.

        divided_V: divided by the absolute sum, no less than `least`, in place of writing it to `out_V`; may be the values.
        """
        for kernel in PASSES:
            self.one(kernel, values_V, part, table, phase_Z2, weight, out_V, residue=residue, fresh=fresh, divided_V=divided_V,
                     least=least)  # fmt: skip

    def one(
        self, kernel: str, values_V: Tensor, part: Tensor, table: RadialTable, phase_Z2: Tensor, weight: float, out_V: Tensor,
        cut: Cut | None = None, residue: int = 0, fresh: bool = False, divided_V: Tensor | None = None, least: float = 0,
    ) -> None:  # fmt: skip
        """One of the five passes. cut: of its lines, if not the usual one."""
        rows, half, columns, mirror = self.rows, self.rows.half, self.size // 2 + 1, self.mirror(residue)
        cut = cut or Cut.of(AXES[kernel], self.planes, self.size)
        turns, width = turns_of(self.size, rows.device), 1 if mirror == NO_MIRROR else 2  # columns of a line along z
        addresses = self.places_YZ2, self.reach_Y
        arguments: tuple[Tensor | float | None, ...]
        across: tuple[float, int]
        match kernel:
            case "fold_planes":
                across, arguments = (columns / width, self.size), (values_V, *addresses, phase_Z2, turns, part, half)
            case "unfold_planes":
                across = min(columns, half + 2) / width, rows.edge
                found = part, *addresses, weight * phase_Z2, turns
                arguments = *found, out_V, half, int(fresh), divided_V, float(least)
            case "multiply_lines":
                steps = 1 / (self.size * table.step), float(len(table.values_T) - 2)
                # The kernel's product is twice what it should be, and so is what is folded where a plane has a mirror.
                table_T2 = pairs_of(table.values_T * (0.5 if mirror == NO_MIRROR else 0.25))
                across, arguments = (self.size, self.kept(residue)), (part, table_T2, turns, *steps, self.strides, residue)
            case _:
                across, arguments = (columns, self.kept(residue)), (part, self.top_X, turns)
        with torch.cuda.device(rows.device):
            launched = self.load(kernel, cut, mirror)
            launched((math.ceil(across[0] / cut.lines), across[1]), cut.threads, *arguments)

    def load(self, name: str, cut: Cut, mirror: int) -> Kernel:
        """A kernel, compiled."""
        defines = cut.defines(self.planes, self.size, self.rows.start_ZY.dtype == torch.int64, mirror)
        return load(SOURCE, name, self.rows.device, defines, shared=cut.shared)

    def compiled(self) -> None:
        """Have the kernels compiled, those of different axes at a time; NvrtcError if they cannot be."""
        mirrors = sorted({self.mirror(residue) for residue in range(self.strides // 2 + 1)})
        wanted = [("fold_planes", mirror) for mirror in mirrors] + [("along_rows", NO_MIRROR), ("multiply_lines", NO_MIRROR)]
        with ThreadPoolExecutor(len(wanted)) as pool:
            list(pool.map(lambda one: self.load(one[0], Cut.of(AXES[one[0]], self.planes, self.size), one[1]), wanted))


def most_kept(planes: int, size: int) -> int:
    """Most planes of any residue of P / M strides that are transformed: about half, if none is without a mirror."""
    return planes if size // planes > 2 else planes // 2 + 1


def pairs_of(values_T: Tensor) -> Tensor:
    """(value, what the next one is more) of a table [T, 2]."""
    return torch.stack([values_T, torch.cat([values_T[1:], values_T[-1:]]) - values_T], 1).contiguous()


@lru_cache(maxsize=16)
def turns_of(size: int, device: torch.device) -> Tensor:
    """exp(-2 pi i j / size) for j < size, float32 [size, 2]."""
    angle = torch.arange(size, dtype=torch.float64) * (-2 * math.pi / size)
    return torch.stack([angle.cos(), angle.sin()], 1).float().to(device)


def served(rows: RowTable, planes: int, size: int, like: Tensor) -> Residues | None:
    """What works on residues, where it can: on a GPU in single precision, for lengths that it knows."""
    if like.device.type != "cuda" or like.dtype != torch.float32 or not suits(rows, planes, size):
        return None
    if not _available(planes, size, rows.device, rows.start_ZY.dtype == torch.int64):
        return None
    return Residues(rows, planes, size)


def suits(rows: RowTable, planes: int, size: int) -> bool:
    """Whether lines of these lengths can be transformed, and no voxel meets its own alias along y."""
    smooth = all(_rest(n) == 1 for n in (planes, size // 2)) and size % 2 == 0
    return smooth and 2 * rows.half < size and max(Cut.of(phase, planes, size).shared for phase in range(3)) <= MOST_SHARED


def _rest(n: int) -> int:
    for radix in RADICES:
        while n % radix == 0:
            n //= radix
    return n


def _available(planes: int, size: int, device: torch.device, wide: bool) -> bool:
    """Whether the kernels can be had; found out once, also if several threads ask at a time."""
    with _ASKING:
        return _found(planes, size, device, wide)


@lru_cache(maxsize=16)
def _found(planes: int, size: int, device: torch.device, wide: bool) -> bool:
    places_ZY = torch.empty(0, 0, dtype=torch.int64 if wide else torch.int32, device=device)
    try:
        Residues(RowTable(0, 0, places_ZY, places_ZY, 0), planes, size).compiled()
    except NvrtcError as error:
        warnings.warn(f"convolution: transforms of torch, two to three times slower, because {error}", stacklevel=4)
        return False
    return True
