"""Options of post-processing, declared once: the command line, the run record and the functions read the same fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """How a mask is made from a map."""

    mask_lowpass: Annotated[float, arg(metavar="Å")] = 15.0
    """Low-pass filter before thresholding; 0: none."""
    mask_threshold: Annotated[float | None, arg(metavar="DENSITY", help_behavior_hint="(default: from the histogram)")] = None
    """Density that counts as particle."""
    mask_extend: Annotated[float, arg(metavar="PX")] = 3.0
    """Grow the thresholded region by this much (negative: shrink)."""
    mask_edge: Annotated[float, arg(metavar="PX")] = 6.0
    """Width of the raised-cosine edge outside the grown region."""


@dataclass(frozen=True, kw_only=True)
class FscOptions:
    """How the resolution is judged."""

    randomise_at_fsc: float = 0.8
    """Randomise phases from the first shell where the unmasked FSC is below this."""
    randomise_at: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: by --randomise-at-fsc)")] = None
    """Randomise phases from this resolution instead."""
    force_mask: FlagCreatePairsOff[bool] = False
    """Keep the masked curve even where the unmasked one reaches a higher resolution."""
    molecular_weight: Annotated[float | None, arg(metavar="kDa", help_behavior_hint="(default: not drawn)")] = None
    """Ordered mass of the particle, for the particle-fraction FSC."""


@dataclass(frozen=True, kw_only=True)
class SharpenOptions:
    """How the summed map is corrected, weighted, sharpened and filtered."""

    mtf: Annotated[Path | None, arg(metavar="STAR", help_behavior_hint="(default: none)")] = None
    """STAR file with the detector's MTF (rlnResolutionInversePixel, rlnMtfValue); the map is divided by it."""
    mtf_pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: that of the map)")] = None
    """Pixel size the MTF refers to (of the movies)."""
    bfactor: Annotated[float | None, arg(metavar="Å²", help_behavior_hint="(default: fitted to the Guinier plot)")] = None
    """B-factor to apply, negative sharpens, 0 does nothing."""
    autob_lowres: Annotated[float, arg(metavar="Å")] = 10.0
    """Lowest resolution of the Guinier fit."""
    autob_highres: Annotated[float, arg(metavar="Å")] = 0.0
    """Highest resolution of the Guinier fit; 0: as far as there is signal."""
    skip_fsc_weighting: FlagCreatePairsOff[bool] = False
    """Do not weight shells by sqrt(2 FSC / (1 + FSC))."""
    low_pass: Annotated[float, arg(metavar="Å")] = 0.0
    """Low-pass filter at the end; 0: none, negative: at the resolution found."""
    filter_edge: Annotated[int, arg(metavar="SHELLS")] = 2
    """Width of the low-pass filter's raised-cosine edge."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How the local resolution is measured and the map filtered by it."""

    sampling: Annotated[float, arg(metavar="Å")] = 25.0
    """Distance between the windows in which the resolution is measured."""
    window_radius: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: half the sampling)")] = None
    """Radius of the window's flat part."""
    window_edge: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: the sampling)")] = None
    """Width of the window's raised-cosine edge."""
    randomise_at: Annotated[float, arg(metavar="Å")] = 25.0
    """Phases beyond this resolution are randomised to measure what the window itself correlates."""
    lowest_resolution: Annotated[float, arg(metavar="Å")] = 50.0
    """Windows without better resolution get this one."""
    mtf: Annotated[Path | None, arg(metavar="STAR", help_behavior_hint="(default: none)")] = None
    """STAR file with the detector's MTF; the map is divided by it."""
    mtf_pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: that of the map)")] = None
    """Pixel size the MTF refers to (of the movies)."""
    bfactor: Annotated[float, arg(metavar="Å²")] = 0.0
    """B-factor to apply to the filtered map, negative sharpens."""
    window_padding: float = 1.0
    """Box in which a window is transformed, relative to the window (1: just larger; the map's box at most)."""
