"""What can be chosen in a simulated scan. Imports nothing heavy: the command line shows these without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

from verglas.errors import InputError

Flag = FlagCreatePairsOff[bool]


def _need(holds: bool, option: str, found: object, expected: str) -> None:
    if not holds:
        raise InputError(option, f"{found:g}" if isinstance(found, float) else str(found), expected)


@dataclass(frozen=True, kw_only=True)
class StarOptions:
    """The object: a Siemens star with rings, on a support of slowly varying thickness."""

    spokes: Annotated[int, arg(metavar="N")] = 36
    """Spokes of the star."""
    phase: Annotated[float, arg(metavar="RAD")] = -0.8
    """Phase shift of the star's bars (matter shifts X-rays by a negative phase)."""
    absorption: Annotated[float, arg(metavar="F")] = 0.2
    """Share of the amplitude that the bars take away."""
    support: Annotated[float, arg(metavar="RAD")] = 0.3
    """Phase shift by the support, from its thinnest to its thickest place."""

    def check(self) -> None:
        """InputError for numbers that make no object."""
        _need(self.spokes >= 1, "--spokes", self.spokes, "at least 1")
        _need(0 <= self.absorption < 1, "--absorption", self.absorption, "a share from 0 to below 1")
        _need(abs(self.phase) <= 3.1, "--phase", self.phase, "-3.1 to 3.1 rad: more could not be told from less")


@dataclass(frozen=True, kw_only=True)
class LightOptions:
    """The light: an optic, seen out of its focus, that fills a part of the window."""

    optic: Annotated[Literal["aperture", "zone-plate"], arg(metavar="aperture|zone-plate")] = "aperture"
    """A full aperture, or one with a central stop of 0.4 of its diameter."""
    cone: Annotated[float, arg(metavar="F")] = 0.25
    """Radius of the cone of light on the detector, in half widths of the detector (far field)."""
    width: Annotated[float, arg(metavar="F")] = 0.4
    """Diameter of the beam on the object, in widths of the window; the defocus follows from it."""
    modes: Annotated[int, arg(metavar="N")] = 1
    """Incoherent modes of the probe, each with half the power of the one before."""
    photons: Annotated[float, arg(metavar="N")] = 1e6
    """Counts of a pattern without an object."""
    fluctuation: Annotated[float, arg(metavar="F")] = 0.0
    """Relative spread (rms) of the intensity from position to position."""

    def check(self) -> None:
        """InputError for numbers that make no beam."""
        _need(0 < self.cone < 0.9, "--cone", self.cone, "above 0, below 0.9: the detector must hold the cone")
        _need(0 < self.width < 0.9, "--width", self.width, "above 0, below 0.9: the window must hold the beam")
        _need(1 <= self.modes <= 20, "--modes", self.modes, "1 to 20")
        _need(0 < self.photons < float("inf"), "--photons", self.photons, "above 0")
        _need(0 <= self.fluctuation < 0.5, "--fluctuation", self.fluctuation, "0 to below 0.5")


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """Where the beam goes."""

    path: Annotated[Literal["raster", "spiral", "fermat"], arg(metavar="raster|spiral|fermat")] = "fermat"
    """raster: rows of equal step; spiral: an Archimedean one; fermat: a sunflower's, equally dense everywhere."""
    positions: Annotated[int, arg(metavar="N")] = 400
    """Number of positions, one pattern each."""
    overlap: Annotated[float, arg(metavar="F")] = 0.7
    """1 - step / diameter of the beam."""
    jitter: Annotated[float, arg(metavar="PX")] = 0.5
    """Positions stray from the path by this (rms of the distance), which the file knows."""
    position_error: Annotated[float, arg(metavar="PX")] = 0.0
    """And by this, which the file does not know."""
    whole_pixels: Flag = False
    """Round the true positions to whole pixels."""

    def check(self) -> None:
        """InputError for numbers that make no scan."""
        _need(self.positions >= 2, "--positions", self.positions, "at least 2")
        _need(0 <= self.overlap < 1, "--overlap", self.overlap, "a share from 0 to below 1")
        _need(self.jitter >= 0, "--jitter", self.jitter, "0 or more pixels")
        _need(self.position_error >= 0, "--position-error", self.position_error, "0 or more pixels")


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """How the light is seen."""

    window: Annotated[int, arg(metavar="PX")] = 128
    """Edge of the patterns and of the probe's window, even."""
    near_field: Flag = False
    """Fresnel propagation over a short distance instead of a far-field pattern."""
    pixel: Annotated[float, arg(metavar="NM")] = 10.0
    """Edge of an object pixel."""
    energy: Annotated[float, arg(metavar="KEV")] = 8.8
    """Of the photons."""
    background: Annotated[float, arg(metavar="N")] = 0.0
    """Mean counts per pixel that do not come from the object."""
    bits: Annotated[Literal[16, 32], arg(metavar="16|32")] = 16
    """Of a stored count; with 16, counts beyond 65,535 saturate."""
    noiseless: Flag = False
    """Write expected intensities instead of counts drawn from them."""

    def check(self) -> None:
        """InputError for numbers that make no detector."""
        even = self.window >= 16 and self.window % 2 == 0
        _need(even, "--window", self.window, "an even number of at least 16 px")
        _need(self.pixel > 0, "--pixel", self.pixel, "above 0 nm")
        _need(self.energy > 0, "--energy", self.energy, "above 0 keV")
        _need(self.background >= 0, "--background", self.background, "0 or more counts")
