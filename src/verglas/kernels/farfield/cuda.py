"""`farfield` on the GPU: launches of farfield.cu."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verglas.kernels.along import FLOOR
from verglas.kernels.farfield import Counted, Curvature, Lit
from verglas.kernels.nvrtc import Kernel, NvrtcError, load

SOURCE = Path(__file__).with_name("farfield.cu")
MOST_STEPS = 8  # lengths of a launch of columns_along
GROUP = 32  # positions whose light a block sums in registers
COUNTS = {
    torch.int16: "unsigned short", torch.uint8: "unsigned char", torch.int32: "int",
    torch.float32: "float", torch.float16: "Half",
}  # fmt: skip


class Window:
    """Kernels for windows of one shape and counts of one type, and how they are cut (as in farfield.cu)."""

    def __init__(self, lit: Lit, counted: Counted, fitted_light: bool = True) -> None:
        self.modes, self.rows, self.columns = lit.light_BMYX.shape[1:]
        self.defines = (
            f"NY={self.rows}", f"NX={self.columns}",
            f"COUNTS={COUNTS[counted.counts_NYX.dtype]}", f"FITTED_LIGHT={int(fitted_light)}",
        )  # fmt: skip
        self.device = lit.object_YX.device
        self.at_once_rows, self.row_threads = _cut(self.columns, self.rows)
        self.at_once_columns, self.column_threads = _cut(self.rows, self.columns)

    def by_rows(self, name: str, blocks: int, *arguments: Tensor | int | float | None) -> None:
        """Launch over all rows x `blocks`."""
        grid = (self.rows // self.at_once_rows, blocks)
        kernel(name, self.device, self.defines)(grid, self.row_threads, *arguments)

    def by_columns(self, name: str, positions: int, *arguments: Tensor | int | float | None) -> None:
        """Launch over all columns x positions."""
        grid = (self.column_blocks, positions)
        kernel(name, self.device, self.defines)(grid, self.column_threads, *arguments)

    @property
    def column_blocks(self) -> int:
        return self.columns // self.at_once_columns


def _cut(edge: int, others: int) -> tuple[int, int]:
    """(lines of a block, its threads) for lines of `edge` px, of which there are `others`."""
    threads = edge // (16 if edge >= 128 else 8)
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
    lit: Lit, counted: Counted, object_gradient_YX: Tensor | None, with_light: bool, curvature: Curvature | None
) -> tuple[Tensor, Tensor | None]:
    """See README.md; complex64, float32, what is added to contiguous (TypeError for others)."""
    lit, counted = _checked(lit), _checked_counts(counted)
    into = (object_gradient_YX, *(curvature or Curvature(None, None)))
    if not all(one is None or one.is_contiguous() for one in into):
        raise TypeError("gradients and curvatures must be contiguous: they are changed in place")
    window, batch = Window(lit, counted), len(lit.corner_B2)
    of_light = torch.zeros_like(lit.light_BMYX) if with_light else None
    if not batch:
        return torch.zeros(3, dtype=torch.float64, device=window.device), of_light
    with on(window.device):
        wave_BMYX, sums_3 = _slopes(window, lit, counted)
        groups, own = -(-batch // GROUP), _apart(lit.light_BMYX)
        window.by_rows(
            "rows_back", groups * window.modes, object_gradient_YX, of_light, *into[1:], wave_BMYX, lit.object_YX, lit.corner_B2,
            lit.light_BMYX, counted.scale_N, counted.rows_B, lit.object_YX.shape[1], batch, window.modes, own, GROUP,
        )  # fmt: skip
    return sums_3, of_light


def _slopes(window: Window, lit: Lit, counted: Counted) -> tuple[Tensor, Tensor]:
    """(gradient of the waves at the detector with columns transformed back [B, M, Y, X], sums [3])."""
    batch = len(lit.corner_B2)
    wave_BMYX = lit.light_BMYX.new_empty(batch, *lit.light_BMYX.shape[1:])
    sums_BJ3 = torch.empty(batch, window.column_blocks, 3, device=window.device)
    given = (lit.object_YX, lit.corner_B2, lit.light_BMYX, lit.object_YX.shape[1])
    window.by_rows("rows_forward", batch * window.modes, wave_BMYX, *given, window.modes, _apart(lit.light_BMYX))
    window.by_columns("columns_slope", batch, wave_BMYX, sums_BJ3, *_patterns(counted), window.modes, *_noise(counted))
    return wave_BMYX, sums_BJ3.sum((0, 1), dtype=torch.float64)


def products_cuda(lit: Lit, step: Lit, counted: Counted) -> Tensor:
    """See README.md; complex64, float32 (TypeError for others)."""
    lit, step, counted = _checked(lit), _checked(step), _checked_counts(counted)
    fitted = step.light_BMYX.numel() > 0
    window, batch = Window(lit, counted, fitted), len(lit.corner_B2)
    if not batch:
        return torch.zeros(0, 5, dtype=torch.float64, device=window.device)
    sums_BMJ5 = torch.empty(batch, window.modes, window.rows // window.at_once_rows, 5, device=window.device)
    with on(window.device):
        wave_BMYX, _ = _slopes(window, lit, counted)
        window.by_rows(
            "rows_products", batch * window.modes, sums_BMJ5, wave_BMYX, lit.object_YX, step.object_YX, lit.corner_B2,
            lit.light_BMYX, step.light_BMYX if fitted else None, lit.object_YX.shape[1], window.modes, _apart(lit.light_BMYX),
            _apart(step.light_BMYX),
        )  # fmt: skip
    return sums_BMJ5.sum((1, 2), dtype=torch.float64)


def _apart(light_BMYX: Tensor) -> int:
    """Numbers from one position's light to the next; 0: one light for all."""
    return light_BMYX[0].numel() if len(light_BMYX) > 1 else 0


def along_cuda(lit: Lit, step: Lit, counted: Counted, length_K: Tensor) -> Tensor:
    """See README.md; complex64, float32 (TypeError for others)."""
    lit, step, counted = _checked(lit), _checked(step), _checked_counts(counted)
    if not len(lit.corner_B2):
        return torch.zeros(len(length_K), 3, dtype=torch.float64, device=length_K.device)
    fitted = step.light_BMYX.numel() > 0
    window, batch, width = Window(lit, counted, fitted), len(lit.corner_B2), lit.object_YX.shape[1]
    waves = lit.light_BMYX.new_empty(3 if fitted else 2, batch, *lit.light_BMYX.shape[1:])
    second = waves[2] if fitted else None
    own, d_own = _apart(lit.light_BMYX), _apart(step.light_BMYX)
    out = []
    with on(window.device):
        blocks, modes = batch * window.modes, window.modes
        window.by_rows("rows_forward", blocks, waves[0], lit.object_YX, lit.corner_B2, lit.light_BMYX, width, modes, own)
        window.by_rows(
            "rows_step", blocks, waves[1], second, lit.object_YX, step.object_YX, lit.corner_B2, lit.light_BMYX,
            step.light_BMYX if fitted else None, width, modes, own, d_own,
        )  # fmt: skip
        for some_K in length_K.float().split(MOST_STEPS):
            sums_BJK3 = torch.empty(batch, window.column_blocks, len(some_K), 3, device=window.device)
            window.by_columns(
                "columns_along", batch, waves[0], waves[1], second, sums_BJK3, *_patterns(counted), some_K, len(some_K), modes,
                *_noise(counted),
            )  # fmt: skip
            out.append(sums_BJK3.sum((0, 1), dtype=torch.float64))
    return torch.cat(out)


def on(device: torch.device) -> torch.device | torch.cuda.device:
    """Context in which launches go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else device


def _patterns(counted: Counted) -> tuple[Tensor, ...]:
    return counted.counts_NYX, counted.weight_YX, counted.scale_N, counted.background_YX, counted.rows_B


def _noise(counted: Counted) -> tuple[float, float, int]:
    return float(counted.noise.offset), FLOOR, int(counted.noise.poisson)


def _checked(lit: Lit) -> Lit:
    """With contiguous tensors. TypeError for other types, or more positions than a launch takes."""
    if lit.object_YX.dtype != torch.complex64 or lit.light_BMYX.dtype != torch.complex64 or lit.corner_B2.dtype != torch.int64:
        raise TypeError(f"complex64 and int64, got {lit.object_YX.dtype}, {lit.light_BMYX.dtype} and {lit.corner_B2.dtype}")
    if (blocks := len(lit.corner_B2) * lit.light_BMYX.shape[1]) > 65535:
        raise TypeError(f"{blocks} waves in a batch, not the 65,535 at most that a launch takes")
    return Lit(*(one.resolve_conj().contiguous() for one in (lit.object_YX, lit.light_BMYX, lit.corner_B2)))


def _checked_counts(counted: Counted) -> Counted:
    """With contiguous tensors. TypeError for other types."""
    real = (counted.scale_N, counted.weight_YX, counted.background_YX)
    if counted.counts_NYX.dtype not in COUNTS or any(one.dtype != torch.float32 for one in real):
        raise TypeError(f"counts of {list(COUNTS)} and float32, got {counted.counts_NYX.dtype} and {[one.dtype for one in real]}")
    whole: dict[str, Any] = {name: one.contiguous() for name, one in vars(counted).items() if isinstance(one, Tensor)}
    return replace(counted, **whole)
