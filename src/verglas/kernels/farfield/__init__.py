"""`farfield`: misfit of far fields its gradient, and along a step. README.md: formulas; `reference.py`: the definition."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verglas.kernels.along import NoiseOfPixels

EDGES = (32, 64, 128, 256, 512, 1024)  # px of a window that the GPU's kernels are written for


@dataclass(frozen=True)
class Lit:
    """Positions of a batch: object_YX, light_MYX complex; corner_B2 int64, windows inside the object.

    fraction_B2: float64 px by which the light is moved at each position; light_MYX is then its unitary transform.
    """

    object_YX: Tensor
    light_MYX: Tensor
    corner_B2: Tensor
    fraction_B2: Tensor | None = None


@dataclass(frozen=True)
class Counted:
    """Their patterns: counts_NYX, scale_N of all positions, rows_B (int64) of which are the batch; weight_YX, background_YX."""

    counts_NYX: Tensor
    scale_N: Tensor
    rows_B: Tensor
    weight_YX: Tensor
    background_YX: Tensor
    noise: NoiseOfPixels


class Step(NamedTuple):
    """A change of object and light; light_MYX as in `Lit`, None: the light stays."""

    object_YX: Tensor
    light_MYX: Tensor | None


class Gradient(NamedTuple):
    """totals_3: float64: loss, sum of weight (sqrt I - sqrt n)^2, of weight n; light_MYX: gradient of the light, if asked for;
    exit_BMYX: of the exit waves, as `products` of the same implementation takes it."""

    totals_3: Tensor
    light_MYX: Tensor | None
    exit_BMYX: Tensor


def why_not(device: torch.device, dtype: torch.dtype, window: tuple[int, int]) -> str | None:
    """Why the kernels cannot serve (real) `dtype` and window; None if they can. On the CPU they serve any."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device {device}"
    if dtype != torch.float32:
        return f"{dtype}"
    if any(edge not in EDGES for edge in window):
        return f"a window of {window[0]} x {window[1]} px, not of {EDGES}"
    from verglas.kernels.farfield.cuda import unavailable

    return unavailable(device)


def farfield(
    lit: Lit, counted: Counted, object_gradient_YX: Tensor | None, with_light: bool, light_curvature_YX: Tensor | None = None,
    implementation: str = "auto",
) -> Gradient:  # fmt: skip
    """Misfit and gradient. That of the object is added to object_gradient_YX, the light's curvature, sum_b scale_b
    |object(. + corner_b)|^2 as of light that is not moved, to light_curvature_YX (real). None: not asked for.

    implementation: "auto", "reference", "cpu" or "cuda".
    """
    run = _function("farfield", lit, implementation)
    return run(lit, counted, object_gradient_YX, with_light, light_curvature_YX)  # type: ignore[no-any-return]


def along(lit: Lit, step: Step, counted: Counted, length_K: Tensor, implementation: str = "auto") -> Tensor:
    """[K, 3] float64: misfit and two derivatives at lengths (float64 on the device) of a step of object and light.

    implementation: as of `farfield`.
    """
    return _function("along", lit, implementation)(lit, step, counted, length_K)  # type: ignore[no-any-return]


def products(
    lit: Lit, step: Step, counted: Counted, exit_BMYX: Tensor | None = None, implementation: str = "auto"
) -> Tensor:  # fmt: skip
    """[B, 5] float64: |a|^2, |p|^2, Re conj(a) p, Re conj(a) c, Re conj(p) c, summed over pixels and modes, of
    a = light d object, p = d light object and c, the gradient of the exit wave.

    Products with p are 0 where the light stays. exit_BMYX: what `farfield` found there (None: it is found again);
    implementation: as of `farfield`.
    """
    return _function("products", lit, implementation)(lit, step, counted, exit_BMYX)  # type: ignore[no-any-return]


def implementation_for(device: torch.device, dtype: torch.dtype) -> str:
    """'cpu' on the CPU, 'cuda' on a GPU in single precision, else 'reference'."""
    if device.type == "cuda":
        return "cuda" if dtype == torch.float32 else "reference"
    return "cpu"


def _function(name: str, lit: Lit, implementation: str) -> Any:
    """Compiled kernels are imported only here."""
    if implementation == "auto":
        implementation = implementation_for(lit.object_YX.device, lit.object_YX.real.dtype)
    if implementation not in ("reference", "cpu", "cuda"):
        raise ValueError(f"farfield has no implementation {implementation!r}")
    return getattr(import_module(f"verglas.kernels.farfield.{implementation}"), f"{name}_{implementation}")
