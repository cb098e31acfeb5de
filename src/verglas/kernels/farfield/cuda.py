"""`farfield` on the GPU: launches of farfield.cu."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verglas.kernels.along import FLOOR
from verglas.kernels.farfield import Counted, Gradient, Lit, Step
from verglas.kernels.nvrtc import Kernel, NvrtcError, load

SOURCE = Path(__file__).with_name("farfield.cu")
MOST_STEPS = 8  # lengths of a launch of columns_along
MOST_GROUP, BLOCKS = 32, 528  # positions whose light a block sums in registers; blocks that keep a GPU busy
COUNTS = {
    torch.int16: "unsigned short", torch.uint8: "unsigned char", torch.int32: "int",
    torch.float32: "float", torch.float16: "Half",
}  # fmt: skip


class Launches:
    """Kernels for windows of one shape and counts of one type, what is lit and counted, how blocks are cut (as in lines.cuh)."""

    def __init__(self, lit: Lit, counted: Counted, fitted_light: bool = True, curvature: bool = False) -> None:
        self.lit, self.counted = _checked(lit), _checked_counts(counted)
        self.batch, (self.modes, self.rows, self.columns) = len(lit.corner_B2), lit.light_MYX.shape
        self.device, self.width = lit.object_YX.device, lit.object_YX.shape[1]
        self.defines = (
            f"NY={self.rows}", f"NX={self.columns}", f"COUNTS={COUNTS[counted.counts_NYX.dtype]}",
            f"FITTED_LIGHT={int(fitted_light)}", f"MOVED={int(lit.fraction_B2 is not None)}", f"CURVATURE={int(curvature)}",
        )  # fmt: skip
        self.at_once_rows, self.row_threads = _cut(self.columns, self.rows)
        self.at_once_columns, self.column_threads = _cut(self.rows, self.columns)
        self.at_once_along, self.along_threads = _cut(self.rows, self.columns, 8)
        self.light = self.moved(self.lit.light_MYX)

    def by_rows(self, name: str, blocks: int, *arguments: Tensor | int | float | None) -> None:
        """Launch over all rows x `blocks`."""
        grid = (self.rows // self.at_once_rows, blocks)
        with on(self.device):
            kernel(name, self.device, self.defines)(grid, self.row_threads, *arguments)

    def by_columns(self, name: str, blocks: int, *arguments: Tensor | int | float | None) -> None:
        """Launch over all columns x `blocks`."""
        with on(self.device):
            kernel(name, self.device, self.defines)((self.column_blocks, blocks), self.column_threads, *arguments)

    def along(self, *arguments: Tensor | int | float | None) -> None:
        """Launch columns_along."""
        grid = (self.columns // self.at_once_along, self.batch)
        with on(self.device):
            kernel("columns_along", self.device, self.defines)(grid, self.along_threads, *arguments)

    @property
    def group(self) -> int:
        """Positions that a block of `rows_back` or `columns_light_back` sums: as many as leave enough blocks."""
        return max(1, min(MOST_GROUP, self.batch * self.modes * self.rows // (self.at_once_rows * BLOCKS)))

    @property
    def column_blocks(self) -> int:
        """Blocks of columns of a window."""
        return self.columns // self.at_once_columns

    def waves(self) -> Tensor:
        """[B, M, Y, X], not filled."""
        return self.lit.light_MYX.new_empty(self.batch, self.modes, self.rows, self.columns)

    def moved(self, light_MYX: Tensor) -> Tensor:
        """Light as kernels take it: as it is, or moved, rows still transformed [B, M, Y, X]."""
        if self.lit.fraction_B2 is None:
            return light_MYX
        light_BMYX = self.waves()
        if self.batch:
            self.by_columns("columns_light", self.batch, light_BMYX, light_MYX, self.lit.fraction_B2, self.modes)
        return light_BMYX

    def exits(self) -> Tensor:
        """Exit waves, rows transformed [B, M, Y, X]."""
        wave_BMYX, lit = self.waves(), self.lit
        given = (lit.object_YX, lit.corner_B2, self.light, self.width, self.modes)
        self.by_rows("rows_forward", self.batch * self.modes, wave_BMYX, *given)
        return wave_BMYX

    def slopes(self) -> tuple[Tensor, Tensor]:
        """(gradient of the waves at the detector with columns transformed back [B, M, Y, X], sums [3])."""
        wave_BMYX = self.exits()
        sums_BJ3 = torch.empty(self.batch, self.column_blocks, 3, device=self.device)
        self.by_columns("columns_slope", self.batch, wave_BMYX, sums_BJ3, *self.patterns, self.modes, *self.noise)
        return wave_BMYX, sums_BJ3.sum((0, 1), dtype=torch.float64)

    @property
    def patterns(self) -> tuple[Tensor, ...]:
        """What kernels are told of them, in their order."""
        one = self.counted
        return one.counts_NYX, one.weight_YX, one.scale_N, one.background_YX, one.rows_B

    @property
    def noise(self) -> tuple[float, float, int]:
        """The last arguments of kernels that compare."""
        return float(self.counted.noise.offset), FLOOR, int(self.counted.noise.poisson)


def _cut(edge: int, others: int, elements: int = 0) -> tuple[int, int]:
    """(lines of a block, its threads) for lines of `edge` px, `elements` px to a thread, of which there are `others`."""
    threads = edge // (elements or (16 if edge >= 128 else 8))
    lines = min(256 // threads, others)
    return lines, lines * threads


def kernel(name: str, device: torch.device, defines: tuple[str, ...]) -> Kernel:
    """A function of farfield.cu."""
    return load(SOURCE, name, device, defines)


@lru_cache(maxsize=16)
def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None if they can."""
    try:
        kernel("rows_forward", device, ("NY=32", "NX=32"))
    except NvrtcError as error:
        return str(error)
    return None


def farfield_cuda(
    lit: Lit, counted: Counted, object_gradient_YX: Tensor | None, with_light: bool, light_curvature_YX: Tensor | None
) -> Gradient:
    """See README.md; complex64, float32, what is added to contiguous (TypeError for others)."""
    into = (object_gradient_YX, light_curvature_YX)
    if not all(one is None or one.is_contiguous() for one in into):
        raise TypeError("gradient and curvature must be contiguous: they are changed in place")
    run = Launches(lit, counted, curvature=light_curvature_YX is not None)
    of_light = torch.zeros_like(run.lit.light_MYX) if with_light else None
    if not run.batch:
        return Gradient(torch.zeros(3, dtype=torch.float64, device=run.device), of_light, run.waves())
    wave_BMYX, sums_3 = run.slopes()
    each = run.light if with_light and lit.fraction_B2 is not None else None  # each position's light is needed no more, once read
    into_light = of_light if each is None else each
    given = (run.lit.object_YX, run.lit.corner_B2, run.light, run.counted.scale_N, run.counted.rows_B, run.width)
    groups = -(-run.batch // run.group) * run.modes
    run.by_rows("rows_back", groups, into[0], into_light, into[1], wave_BMYX, *given, run.batch, run.modes, run.group)
    if each is not None:
        run.by_columns("columns_light_back", groups, of_light, each, run.lit.fraction_B2, run.batch, run.modes, run.group)
    return Gradient(sums_3, of_light, wave_BMYX)


def products_cuda(lit: Lit, step: Step, counted: Counted, exit_BMYX: Tensor | None) -> Tensor:
    """See README.md; complex64, float32 (TypeError for others); exit_BMYX: rows still transformed."""
    run = Launches(lit, counted, step.light_MYX is not None)
    if not run.batch:
        return torch.zeros(0, 5, dtype=torch.float64, device=run.device)
    sums_BMJ5 = torch.empty(run.batch, run.modes, run.rows // run.at_once_rows, 5, device=run.device)
    change = None if step.light_MYX is None else run.moved(step.light_MYX.contiguous())
    given = (run.lit.object_YX, step.object_YX.contiguous(), run.lit.corner_B2, run.light, change, run.width, run.modes)
    back_BMYX = run.slopes()[0] if exit_BMYX is None else exit_BMYX
    run.by_rows("rows_products", run.batch * run.modes, sums_BMJ5, back_BMYX, *given)
    return sums_BMJ5.sum((1, 2), dtype=torch.float64)


def along_cuda(lit: Lit, step: Step, counted: Counted, length_K: Tensor) -> Tensor:
    """See README.md; complex64, float32 (TypeError for others)."""
    fitted = step.light_MYX is not None
    run = Launches(lit, counted, fitted)
    if not run.batch:
        return torch.zeros(len(length_K), 3, dtype=torch.float64, device=run.device)
    wave, first, second = run.exits(), run.waves(), run.waves() if fitted else None
    change = None if step.light_MYX is None else run.moved(step.light_MYX.contiguous())
    given = (run.lit.object_YX, step.object_YX.contiguous(), run.lit.corner_B2, run.light, change, run.width, run.modes)
    run.by_rows("rows_step", run.batch * run.modes, first, second, *given)
    out = []
    for some_K in length_K.float().split(MOST_STEPS):
        sums_BJK3 = torch.empty(run.batch, run.columns // run.at_once_along, len(some_K), 3, device=run.device)
        more = (*run.patterns, some_K, len(some_K), run.modes, *run.noise)
        run.along(wave, first, second, sums_BJK3, *more)
        out.append(sums_BJK3.sum((0, 1), dtype=torch.float64))
    return torch.cat(out)


def on(device: torch.device) -> AbstractContextManager[object]:
    """In which launches go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _checked(lit: Lit) -> Lit:
    """With contiguous tensors. TypeError for other types, or more positions than a launch takes."""
    if lit.object_YX.dtype != torch.complex64 or lit.light_MYX.dtype != torch.complex64 or lit.corner_B2.dtype != torch.int64:
        raise TypeError(f"complex64 and int64, got {lit.object_YX.dtype}, {lit.light_MYX.dtype} and {lit.corner_B2.dtype}")
    if (blocks := len(lit.corner_B2) * len(lit.light_MYX)) > 65535:
        raise TypeError(f"{blocks} waves in a batch, not the 65,535 at most that a launch takes")
    fraction_B2 = None if lit.fraction_B2 is None else lit.fraction_B2.float().contiguous()
    object_YX, light_MYX, corner_B2 = (one.contiguous() for one in (lit.object_YX, lit.light_MYX, lit.corner_B2))
    return Lit(object_YX, light_MYX, corner_B2, fraction_B2)


def _checked_counts(counted: Counted) -> Counted:
    """With contiguous tensors. TypeError for other types."""
    real = (counted.scale_N, counted.weight_YX, counted.background_YX)
    if counted.counts_NYX.dtype not in COUNTS or any(one.dtype != torch.float32 for one in real):
        raise TypeError(f"counts of {list(COUNTS)} and float32, got {counted.counts_NYX.dtype} and {[one.dtype for one in real]}")
    whole: dict[str, Any] = {name: one.contiguous() for name, one in vars(counted).items() if isinstance(one, Tensor)}
    return replace(counted, **whole)
