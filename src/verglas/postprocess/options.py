"""Options of post-processing, declared once: the command line, the run record and the functions read the same fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """How a mask is made from a map."""

    mask_lowpass: Annotated[float, tyro.conf.arg(metavar="Å")] = 15.0
    """Low-pass filter before thresholding; 0: none."""
    mask_threshold: Annotated[float | None, tyro.conf.arg(metavar="DENSITY")] = None
    """Density that counts as particle; default: found from the map's histogram."""
    mask_extend: Annotated[float, tyro.conf.arg(metavar="PX")] = 3.0
    """Grow the thresholded region by this much (negative: shrink)."""
    mask_edge: Annotated[float, tyro.conf.arg(metavar="PX")] = 6.0
    """Width of the raised-cosine edge outside the grown region."""


@dataclass(frozen=True, kw_only=True)
class FscOptions:
    """How the resolution is judged."""

    randomise_at_fsc: float = 0.8
    """Randomise phases from the first shell where the unmasked FSC is below this."""
    randomise_at: Annotated[float | None, tyro.conf.arg(metavar="Å")] = None
    """Randomise phases from this resolution instead."""
    force_mask: bool = False
    """Keep the masked curve even where the unmasked one reaches a higher resolution."""
    molecular_weight: Annotated[float | None, tyro.conf.arg(metavar="kDa")] = None
    """Ordered mass of the particle, for the particle-fraction FSC."""


@dataclass(frozen=True, kw_only=True)
class SharpenOptions:
    """How the summed map is corrected, weighted, sharpened and filtered."""

    mtf: Annotated[Path | None, tyro.conf.arg(metavar="STAR")] = None
    """STAR file with the detector's MTF (rlnResolutionInversePixel, rlnMtfValue); the map is divided by it."""
    mtf_pixel: Annotated[float | None, tyro.conf.arg(metavar="Å")] = None
    """Pixel size the MTF refers to (of the movies); default: that of the map."""
    bfactor: Annotated[float | None, tyro.conf.arg(metavar="Å²")] = None
    """B-factor to apply, negative sharpens, 0 does nothing; default: fitted to the Guinier plot."""
    autob_lowres: Annotated[float, tyro.conf.arg(metavar="Å")] = 10.0
    """Lowest resolution of the Guinier fit."""
    autob_highres: Annotated[float, tyro.conf.arg(metavar="Å")] = 0.0
    """Highest resolution of the Guinier fit; 0: as far as there is signal."""
    skip_fsc_weighting: bool = False
    """Do not weight shells by sqrt(2 FSC / (1 + FSC))."""
    low_pass: Annotated[float, tyro.conf.arg(metavar="Å")] = 0.0
    """Low-pass filter at the end; 0: none, negative: at the resolution found."""
    filter_edge: Annotated[int, tyro.conf.arg(metavar="SHELLS")] = 2
    """Width of the low-pass filter's raised-cosine edge."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How the local resolution is measured and the map filtered by it."""

    sampling: Annotated[float, tyro.conf.arg(metavar="Å")] = 25.0
    """Distance between the windows in which the resolution is measured."""
    window_radius: Annotated[float | None, tyro.conf.arg(metavar="Å")] = None
    """Radius of the window's flat part; default: half the sampling."""
    window_edge: Annotated[float | None, tyro.conf.arg(metavar="Å")] = None
    """Width of the window's raised-cosine edge; default: the sampling."""
    randomise_at: Annotated[float, tyro.conf.arg(metavar="Å")] = 25.0
    """Phases beyond this resolution are randomised to measure what the window itself correlates."""
    lowest_resolution: Annotated[float, tyro.conf.arg(metavar="Å")] = 50.0
    """Windows without better resolution get this one."""
    mtf: Annotated[Path | None, tyro.conf.arg(metavar="STAR")] = None
    """STAR file with the detector's MTF; the map is divided by it."""
    mtf_pixel: Annotated[float | None, tyro.conf.arg(metavar="Å")] = None
    """Pixel size the MTF refers to (of the movies); default: that of the map."""
    bfactor: Annotated[float, tyro.conf.arg(metavar="Å²")] = 0.0
    """B-factor to apply to the filtered map, negative sharpens."""
    window_padding: float = 1.0
    """Box in which a window is transformed, relative to the window (1: just larger; the map's box at most)."""
