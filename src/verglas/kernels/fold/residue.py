"""One residue of a convolution by strides on the GPU, in five passes over its transform (residue.cu)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.fold import RadialTable
from verglas.kernels.nvrtc import Kernel, NvrtcError, load

SOURCE = Path(__file__).with_name("residue.cu")
MOST_SHARED = 200_000  # bytes of a block
RADICES = (2, 3, 5, 7)
AXES = {"fold_planes": 0, "unfold_planes": 0, "along_rows": 1, "back": 1, "multiply_lines": 2}  # 0: z, 1: y, 2: x


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
            lines = 32 if planes <= 200 else 16 if planes <= 800 else 8
            return cls(phase, planes, lines, 256 if planes <= 400 else 512, 3 if planes <= 400 else 1)
        if phase == 1:
            return cls(phase, size, 8 if size <= 1024 else 4, 512, 2)
        return cls(phase, size // 2, 4 if size >= 1024 else 8 if size >= 512 else 16, 384, 2)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 8 * self.lines * (self.length + (self.phase == 2))

    def defines(self, planes: int, size: int, wide: bool) -> tuple[str, ...]:
        """For the preprocessor."""
        words: tuple[str, ...] = (f"PLANES={planes}", f"SIZE={size}", f"PHASE={self.phase}", f"LINES={self.lines}")
        words += f"THREADS={self.threads}", f"BLOCKS={self.blocks}"
        return (*words, "WIDE=1") if wide else words


@dataclass(frozen=True)
class Residues:
    """rows: where the voxels lie; planes: M; size: P."""

    rows: RowTable
    planes: int
    size: int

    def part(self) -> Tensor:
        """Memory of one residue, not filled: complex, rows of a multiple of eight."""
        columns = (self.size // 2 + 1 + 7) // 8 * 8
        return torch.empty(self.planes, self.size, columns, 2, device=self.rows.device)

    def __call__(
        self, values_V: Tensor, part: Tensor, table: RadialTable, phase_Z2: Tensor, weight: float, residue: int, out_V: Tensor,
        fresh: bool,
    ) -> None:  # fmt: skip
        """Add what the planes strides m + residue find to `out_V`, times `weight`. fresh: what it held does not count."""
        for kernel in ("fold_planes", "along_rows", "multiply_lines", "back", "unfold_planes"):
            self.one(kernel, values_V, part, table, phase_Z2, weight, out_V, residue=residue, fresh=fresh)

    def one(
        self, kernel: str, values_V: Tensor, part: Tensor, table: RadialTable, phase_Z2: Tensor, weight: float, out_V: Tensor,
        cut: Cut | None = None, residue: int = 0, fresh: bool = False,
    ) -> None:  # fmt: skip
        """One of the five passes; "back": along_rows forward again. cut: of its lines, if not the usual one."""
        rows, half, columns = self.rows, self.rows.half, self.size // 2 + 1
        cut = cut or Cut.of(AXES[kernel], self.planes, self.size)
        addresses, turns = (rows.start_ZY, rows.length_ZY), turns_of(self.size, rows.device)
        arguments: tuple[Tensor | float, ...]
        match kernel:
            case "fold_planes":
                across, arguments = (columns, self.size), (values_V, *addresses, phase_Z2, turns, part, half)
            case "unfold_planes":
                across = min(columns, half + 2), rows.edge
                arguments = part, *addresses, weight * phase_Z2, turns, out_V, half, int(fresh)
            case "multiply_lines":
                steps = 1 / (self.size * table.step), float(len(table.values_T) - 2)
                across, arguments = (self.size, self.planes), (part, table.values_T, turns, *steps, self.strides, residue)
            case _:
                across, arguments = (columns, self.planes), (part, turns, int(kernel == "along_rows"))
        with torch.cuda.device(rows.device):
            name = "along_rows" if kernel == "back" else kernel
            self._kernel(cut, name)((math.ceil(across[0] / cut.lines), across[1]), cut.threads, *arguments)

    @property
    def strides(self) -> int:
        """Planes of a residue are so many apart."""
        return self.size // self.planes

    def _kernel(self, cut: Cut, name: str) -> Kernel:
        defines = cut.defines(self.planes, self.size, self.rows.start_ZY.dtype == torch.int64)
        return load(SOURCE, name, self.rows.device, defines, shared=cut.shared)


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


@lru_cache(maxsize=16)
def _available(planes: int, size: int, device: torch.device, wide: bool) -> bool:
    try:
        for phase, name in enumerate(("fold_planes", "along_rows", "multiply_lines")):
            cut = Cut.of(phase, planes, size)
            load(SOURCE, name, device, cut.defines(planes, size, wide), shared=cut.shared)
    except NvrtcError as error:
        warnings.warn(f"convolution: transforms of torch, two to three times slower, because {error}", stacklevel=4)
        return False
    return True

