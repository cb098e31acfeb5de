"""`farfield`: misfit of far fields with its gradient, and along a step. README.md gives formulas; `reference.py` is the definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.kernels.along import NoiseOfPixels

EDGES = (32, 64, 128, 256, 512, 1024)  # px of a window that the GPU's kernels are written for


@dataclass(frozen=True)
class Lit:
    """Positions of a batch: object_YX complex; light_BMYX, of one for all or of each; corner_B2 int64, windows inside the object."""

    object_YX: Tensor
    light_BMYX: Tensor
    corner_B2: Tensor


@dataclass(frozen=True)
class Counted:
    """Their patterns: counts_NYX, scale_N of all positions, of which rows_B (int64) are the batch; weight_YX, background_YX real."""

    counts_NYX: Tensor
    scale_N: Tensor
    rows_B: Tensor
    weight_YX: Tensor
    background_YX: Tensor
    noise: NoiseOfPixels


def why_not(device: torch.device, dtype: torch.dtype, window: tuple[int, int]) -> str | None:
    """Why the GPU's kernels cannot serve (real) `dtype` and window; None if they can."""
    if device.type != "cuda":
        return f"device {device}"
    if dtype != torch.float32:
        return f"{dtype}"
    if any(edge not in EDGES for edge in window):
        return f"a window of {window[0]} x {window[1]} px, not of {EDGES}"
    from verglas.kernels.farfield.cuda import unavailable

    return unavailable(device)


def farfield(
    lit: Lit, counted: Counted, object_gradient_YX: Tensor | None, with_light: bool, reference: bool = False
) -> tuple[Tensor, Tensor | None]:
    """([3] float64: loss, sum of weight (sqrt I - sqrt n)^2, of weight n; gradient of the light [1 or B, M, Y, X] if asked for).

    The object's gradient is added to object_gradient_YX (None: not asked for). reference: by the definition, on any device.
    """
    if reference:
        from verglas.kernels.farfield.reference import farfield_reference as run
    else:
        from verglas.kernels.farfield.cuda import farfield_cuda as run
    return run(lit, counted, object_gradient_YX, with_light)


def along(lit: Lit, step: Lit, counted: Counted, length_K: Tensor, reference: bool = False) -> Tensor:
    """[K, 3] float64: misfit and two derivatives at lengths (float64 on the device) of a step of object and light.

    step: its corners are those of `lit`; a light of no elements means that the light stays. reference: by the definition.
    """
    if reference:
        from verglas.kernels.farfield.reference import along_reference as run
    else:
        from verglas.kernels.farfield.cuda import along_cuda as run
    return run(lit, step, counted, length_K)
