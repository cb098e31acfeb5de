"""MTF correction, FSC weighting, Guinier plot, B-factor and final filter (Rosenthal & Henderson 2003, JMB 333, 721)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import shells_of_half_volume
from verglas.core.masks import low_pass_filter
from verglas.postprocess.curves import FscCurves, half_transform, stored_shell_sum
from verglas.postprocess.options import SharpenOptions
from verglas.postprocess.random_phases import squared_radius

# Transfer of the detector at frequencies in 1/Å, any shape.
Mtf = Callable[[Tensor], Tensor]
_NO_SIGNAL = 1e-4


@dataclass(frozen=True)
class GuinierLine:
    """Straight line through ln(mean amplitude) over 1/d^2: slope Å^2; correlation is r^2; points in the fit."""

    slope: float
    intercept: float
    correlation: float
    points: int


@dataclass(frozen=True)
class Guinier:
    """Guinier plot per shell, [N/2+1]: 1/d^2 (1/Å^2), ln of the mean amplitude after each step (-99: no signal)."""

    resolution_squared_S: Tensor
    original_S: Tensor
    mtf_S: Tensor | None
    weighted_S: Tensor
    sharpened_S: Tensor
    line: GuinierLine | None


@dataclass(frozen=True)
class Sharpened:
    """The map [Z, Y, X] float64, its Guinier plot, the B-factor applied (Å^2), the low pass applied (Å or None)."""

    map_ZYX: Tensor
    guinier: Guinier
    bfactor: float
    low_pass: float | None
    warnings: list[str]


def log_amplitudes(fourier_ZYX: Tensor, shells_ZYX: Tensor) -> Tensor:
    """ln of the mean amplitude of each shell's stored coefficients, [N/2+1]; -99 where there is no signal."""
    total = stored_shell_sum(fourier_ZYX.abs(), shells_ZYX)
    count = stored_shell_sum(torch.ones_like(shells_ZYX, dtype=torch.float64), shells_ZYX)
    return torch.where(total > 0, (total / count).clamp_min(1e-300).log(), torch.full_like(total, -99.0))


def fit_guinier(resolution_squared_S: Tensor, log_S: Tensor, low: float, high: float) -> GuinierLine | None:
    """Least-squares line through the points with high <= d <= low (Å) that have signal; None with fewer than two."""
    d_S = resolution_squared_S.clamp_min(1e-30).rsqrt()
    used = (d_S <= low) & (d_S >= high) & (log_S > -99)
    if int(used.sum()) < 2:
        return None
    x, y = resolution_squared_S[used], log_S[used]
    dx, dy = x - x.mean(), y - y.mean()
    slope = float((dx * dy).sum() / (dx * dx).sum())
    correlation = float((dx * dy).sum() ** 2 / ((dx * dx).sum() * (dy * dy).sum()).clamp_min(1e-300))
    return GuinierLine(slope, float(y.mean()) - slope * float(x.mean()), correlation, len(x))


def fsc_weights(fsc_S: Tensor) -> Tensor:
    """sqrt(2 FSC / (1 + FSC)) up to the first shell below 0.0001, zero from there on; [N/2+1]."""
    below = (fsc_S < _NO_SIGNAL).nonzero()
    end = int(below[0]) if len(below) else len(fsc_S)
    weights = torch.zeros_like(fsc_S)
    weights[:end] = (2 * fsc_S[:end] / (1 + fsc_S[:end])).sqrt()
    return weights


def per_shell(values_S: Tensor, shells_ZYX: Tensor, beyond: float) -> Tensor:
    """Spread one value per shell over the stored half [N, N, N/2+1]; coefficients beyond shell N/2 get `beyond`."""
    extended = torch.cat([values_S, values_S.new_tensor([beyond])])
    return extended[shells_ZYX.clamp_max(len(values_S))]


def _frequency(fourier_ZYX: Tensor, pixel_size: float) -> Tensor:
    """Length of each stored coefficient's frequency, 1/Å."""
    box = fourier_ZYX.shape[0]
    return squared_radius(box, fourier_ZYX.device).double().sqrt() / (box * pixel_size)


def divide_by_mtf(fourier_ZYX: Tensor, pixel_size: float, mtf: Mtf) -> Tensor:
    """Undo the detector's transfer below Nyquist; corners beyond it lie outside the MTF's table and stay as they are."""
    frequency = _frequency(fourier_ZYX, pixel_size)
    return torch.where(frequency < 0.5 / pixel_size, fourier_ZYX / mtf(frequency), fourier_ZYX)


def apply_bfactor(fourier_ZYX: Tensor, pixel_size: float, bfactor: float) -> Tensor:
    """Multiply by exp(-B/4 u^2) (B in Å^2, u in 1/Å) up to Nyquist, zero beyond."""
    frequency = _frequency(fourier_ZYX, pixel_size)
    return fourier_ZYX * torch.exp(-bfactor / 4 * frequency**2) * (frequency <= 0.5 / pixel_size)


def _choose_bfactor(options: SharpenOptions, line: GuinierLine | None) -> tuple[float, list[str]]:
    if options.bfactor is not None:
        return options.bfactor, []
    if line is None:
        return 0.0, [
            f"Fewer than two shells with signal lie beyond {options.autob_lowres:g} Å, so no B-factor could be fitted "
            "and the map is not sharpened. Give --bfactor, or raise --autob-lowres."
        ]
    return 4 * line.slope, []


def low_pass(fourier_ZYX: Tensor, pixel_size: float, cutoff: float, edge: int = 2) -> Tensor:
    """Raised-cosine low pass of `edge` shells centred on the shell nearest to `cutoff` Å."""
    box = fourier_ZYX.shape[0]
    radius = squared_radius(box, fourier_ZYX.device).double().sqrt()
    return fourier_ZYX * low_pass_filter(radius, int(box * pixel_size / cutoff + 0.5), 2 * (edge // 2))


def sharpen(map_ZYX: Tensor, curves: FscCurves, options: SharpenOptions, mtf: Mtf | None) -> Sharpened:
    """Correct, weight, sharpen and filter one map; see the module's title for the order and source."""
    box, pixel_size = curves.box, curves.pixel_size
    shells_ZYX = shells_of_half_volume(box, map_ZYX.device)
    shell_S = torch.arange(box // 2 + 1, device=map_ZYX.device, dtype=torch.float64)
    resolution_squared_S = (shell_S / (box * pixel_size)) ** 2
    fourier_ZYX = half_transform(map_ZYX)
    original_S, mtf_S = log_amplitudes(fourier_ZYX, shells_ZYX), None
    if mtf is not None:
        fourier_ZYX = divide_by_mtf(fourier_ZYX, pixel_size, mtf)
        mtf_S = log_amplitudes(fourier_ZYX, shells_ZYX)
    if not options.skip_fsc_weighting:
        fourier_ZYX = fourier_ZYX * per_shell(fsc_weights(curves.best_S), shells_ZYX, 0.0)
    weighted_S = log_amplitudes(fourier_ZYX, shells_ZYX)
    line = fit_guinier(resolution_squared_S, weighted_S, options.autob_lowres, options.autob_highres)
    bfactor, warnings = _choose_bfactor(options, line)
    if bfactor:
        fourier_ZYX = apply_bfactor(fourier_ZYX, pixel_size, bfactor)
    sharpened_S = log_amplitudes(fourier_ZYX, shells_ZYX)
    cutoff = None
    if options.low_pass:
        cutoff = options.low_pass if options.low_pass > 0 else curves.resolution
        fourier_ZYX = low_pass(fourier_ZYX, pixel_size, cutoff, options.filter_edge)
    sharp_ZYX = torch.fft.irfftn(fourier_ZYX, s=(box, box, box), norm="forward")
    guinier = Guinier(resolution_squared_S, original_S, mtf_S, weighted_S, sharpened_S, line)
    return Sharpened(sharp_ZYX, guinier, bfactor, cutoff, warnings)
