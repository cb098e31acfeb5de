"""A first guess of the light where the file has none: how far out of focus it is, found by short trials.

In the far field the mean pattern shows the cone of light that lights the object, nearly; what it does not show is its phase,
which is that of a defocus first of all. A fit seldom finds its way from a wrong defocus to the right one; but of fits that start
with different ones the right one is better at once. So a few are tried on a part of the scan. In the near field the mean pattern
is nearly the light itself, but for the curvature of light from a focus, or towards one. Axes: B positions, Y X pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fft import fftshift, ifft2, ifftshift

from verglas.distributed.ranks import ALONE, Ranks
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.reconstruct import reconstruct
from verglas.ptychography.scan import Scan

WIDTHS = (0.0, 0.15, -0.15, 0.25, -0.25, 0.4, -0.4, 0.6, -0.6, 0.85, -0.85)  # of windows
CURVATURES = (0.0, 0.1, -0.1, 0.2, -0.2, 0.4, -0.4, 0.8, -0.8)  # of a near field, see `bent`
MOST_POSITIONS, PASSES = 120, 4  # of a trial
AT_ONCE = 256  # patterns


@dataclass(frozen=True)
class Beam:
    """probe_MYX: the guess, its power not settled; width: of the beam on the object, in windows (below 0: its focus lies behind
    the object), in a near field its curvature (`bent`); error: of the best trial and of the second best (NaN without trials)."""

    probe_MYX: Tensor
    width: float
    error: tuple[float, float]


def guessed_beam(scan: Scan, device: torch.device | str, width: float | None = None, ranks: Ranks = ALONE) -> Beam:
    """The light of a scan; width: of a far field, if it is known, else that of the best trial. ranks: share the trials."""
    mean_YX = mean_pattern(scan)
    near = scan.geometry.kind == "near"
    made = bent if near else defocused
    if width is not None:
        return Beam(made(mean_YX, scan.geometry.binning, width), width, (math.nan, math.nan))
    part = scan.subset(middle_of(scan.positions_B2))
    options = PtychoOptions(engine="rpie", passes=PASSES)
    tried: list[tuple[float, float]] = []
    for one in (CURVATURES if near else WIDTHS)[ranks.rank :: ranks.size]:
        ranks.doing("looking for the focus", len(tried))
        *_, last = reconstruct(replace(part, probe_MYX=made(mean_YX, scan.geometry.binning, one)), options, device)
        tried.append((last.error, one))
    best, second = sorted(trial for some in ranks.everyones(tried, "trials") for trial in some)[:2]
    return Beam(made(mean_YX, scan.geometry.binning, best[1]), best[1], (best[0], second[0]))


def mean_pattern(scan: Scan) -> Tensor:
    """[Y, X] float64 mean counts, 0 in bad pixels, without the known background."""
    total_YX = sum((some_BYX.double().sum(0) for some_BYX in scan.patterns_BYX.split(AT_ONCE)), torch.zeros(scan.shape).double())
    mean_YX = total_YX.cpu() / len(scan)
    if scan.background_YX is not None:
        mean_YX = (mean_YX - scan.background_YX.double()).clamp_min(0)
    return mean_YX if scan.mask_YX is None else mean_YX * scan.mask_YX


def defocused(mean_YX: Tensor, binning: int, width: float) -> Tensor:
    """[1, Y, X] complex128: a wave with this empty pattern and the phase -pi c |k|^2, which takes a ray of frequency k (1/px)
    to c k px from the middle: the edge of the cone to width / 2 windows. A disc of radius a has the mean square radius a^2 / 2.
    """
    mean_YX = mean_YX.repeat_interleave(binning, 0).repeat_interleave(binning, 1)
    rows, columns = mean_YX.shape
    y_Y1 = (torch.arange(rows, dtype=torch.float64)[:, None] - rows // 2) / rows
    x_X = (torch.arange(columns, dtype=torch.float64) - columns // 2) / columns
    k2_YX = y_Y1.square() + x_X.square()
    cone = math.sqrt(2 * float((mean_YX * k2_YX).sum() / mean_YX.sum()))
    spread = width * min(rows, columns) / 2 / cone
    wave_YX = torch.polar(mean_YX.sqrt(), -math.pi * spread * k2_YX)
    return fftshift(ifft2(ifftshift(wave_YX)))[None]


def bent(mean_YX: Tensor, binning: int, curvature: float) -> Tensor:
    """[1, Y, X] complex128: a wave of this intensity with the phase pi curvature r^2 / n, r px from the middle of the window's
    n px: below 0 it runs together."""
    mean_YX = mean_YX.repeat_interleave(binning, 0).repeat_interleave(binning, 1)
    rows, columns = mean_YX.shape
    y_Y1 = torch.arange(rows, dtype=torch.float64)[:, None] - rows // 2
    x_X = torch.arange(columns, dtype=torch.float64) - columns // 2
    return torch.polar(mean_YX.sqrt(), math.pi * curvature / min(rows, columns) * (y_Y1.square() + x_X.square()))[None]


def middle_of(position_B2: Tensor) -> Tensor:
    """Rows of the positions nearest to the middle of the scan, in their order: neighbours, which overlap as all do."""
    away_B = (position_B2 - position_B2.median(0).values).abs().amax(1)
    return away_B.argsort()[:MOST_POSITIONS].sort().values
