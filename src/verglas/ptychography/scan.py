"""What is measured (`Scan`), how light reached the detector (`Geometry`), and what is found (`Reconstruction`).

Axes: B scan positions, Y X pixels (rows, columns), M incoherent modes of the probe, O incoherent modes of the object, L slices of
the object along the beam, first met first, K modes of the probe's change over the scan. Lengths are metres, positions pixels of
the object, patterns counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from verglas.errors import InputError

PLANCK_TIMES_LIGHT = 1.2398419843e-6  # eV m


@dataclass(frozen=True)
class Geometry:
    """From the object to the detector.

    kind: "far", the pattern is |Fourier transform of the exit wave|^2; "near", it is |Fresnel propagation|^2 over `distance` (m).
    wavelength, distance, detector_pixel: metres; None where unknown, and then the object's pixel is unknown, too ("near" and
    several slices need them; one slice in the far field is reconstructed in pixels without). In a near field lit by a cone
    they are those of the equivalent parallel beam: see `cone`. slice_distances: m, from each slice to the next, L - 1 of them.
    binning: each pixel of the detector adds up binning x binning pixels of the wave, whose window is as many times larger.
    """

    kind: Literal["far", "near"] = "far"
    wavelength: float | None = None
    distance: float | None = None
    detector_pixel: float | None = None
    slice_distances: tuple[float, ...] = ()
    binning: int = 1

    def __post_init__(self) -> None:
        for name in ("wavelength", "distance", "detector_pixel"):
            value = getattr(self, name)
            if value is None:
                if self.kind == "near" or self.slice_distances:
                    what = "a near field" if self.kind == "near" else "an object of several slices"
                    raise InputError(name, "missing", f"a length in metres for {what}", "Give it with the data.")
            elif not (abs(value) > 0 and abs(value) < float("inf")) or (value < 0 and name != "distance"):
                raise InputError(name, f"{value:g} m", "a positive length in metres")
        if self.binning < 1:
            raise InputError("binning", str(self.binning), "1 or more pixels of the wave along an edge of a detector pixel")

    @staticmethod
    def wavelength_of(energy: float) -> float:
        """Wavelength (m) of photons of `energy` (eV): 8,000 eV give 1.5498e-10 m."""
        return PLANCK_TIMES_LIGHT / energy

    @staticmethod
    def cone(wavelength: float, focus_to_object: float, object_to_detector: float, detector_pixel: float) -> Geometry:
        """Near field of a cone of light from a focus, as its equivalent parallel beam (Fresnel scaling theorem); metres.

        With z1 from focus to object and z2 from there to the detector the magnification is M = (z1 + z2) / z1, the
        equivalent distance z2 / M and the equivalent pixel detector_pixel / M.
        """
        magnification = (focus_to_object + object_to_detector) / focus_to_object
        return Geometry("near", wavelength, object_to_detector / magnification, detector_pixel / magnification)

    def object_pixel(self, shape: tuple[int, int]) -> tuple[float, float] | None:
        """(y, x) edge of an object pixel, m, for patterns of `shape` px; None if unknown.

        Far field: wavelength distance / (n detector_pixel), n the pattern's pixels along the axis. Near field: detector_pixel
        / binning, as the wave is sampled.
        """
        if self.wavelength is None or self.distance is None or self.detector_pixel is None:
            return None
        if self.kind == "near":
            return self.detector_pixel / self.binning, self.detector_pixel / self.binning
        y, x = (self.wavelength * abs(self.distance) / (n * self.detector_pixel) for n in shape)
        return y, x


@dataclass(frozen=True)
class Scan:
    """A ptychographic data set, in host memory or wherever `patterns_BYX` lies.

    patterns_BYX: counts per detector pixel (float32, uint16, ...), >= 0, as the detector sees them: in the far field the direct
        beam (zero frequency) is at pixel (Y // 2, X // 2). Engines turn them into the order of the FFT themselves.
    positions_B2: float64, (row, column) in object pixels, of where pixel (0, 0) of the window of pattern b lies: the object
        seen at (y, x) of the window is the object at (y, x) + positions_B2[b]. Any origin; whole numbers need not be.
    geometry: see `Geometry`; its `object_pixel` turns positions into metres.
    mask_YX: bool, True where a detector pixel is good; None: all are.
    background_YX: counts that do not come from the object (dark noise, air scatter), added to every pattern; None: 0.
    probe_MYX: complex, a first guess of the probe, its zero at the middle pixel of the window; None: not known.
    object_OLYX: a first guess of the object or, of simulated data, the truth, with `object_origin_2`: (row, column) of its
        pixel (0, 0) in the frame of positions_B2.
    name: where the data come from, for messages.
    """

    patterns_BYX: Tensor
    positions_B2: Tensor
    geometry: Geometry = field(default_factory=Geometry)
    mask_YX: Tensor | None = None
    background_YX: Tensor | None = None
    probe_MYX: Tensor | None = None
    object_OLYX: Tensor | None = None
    object_origin_2: tuple[float, float] = (0.0, 0.0)
    name: str = "scan"

    def __post_init__(self) -> None:
        if self.patterns_BYX.dim() != 3 or not self.patterns_BYX.numel():
            raise InputError(self.name, f"patterns of shape {list(self.patterns_BYX.shape)}", "[positions, rows, columns]")
        if self.positions_B2.shape != (len(self), 2):
            found = f"positions of shape {list(self.positions_B2.shape)}"
            raise InputError(self.name, found, f"a (row, column) for each of {len(self)} patterns")
        if not bool(torch.isfinite(self.positions_B2).all()):
            raise InputError(self.name, "positions that are not numbers", "finite rows and columns, in object pixels")
        for what, array in (("mask", self.mask_YX), ("background", self.background_YX)):
            if array is not None and tuple(array.shape) != self.shape:
                raise InputError(self.name, f"{what} of {list(array.shape)} px", f"{list(self.shape)} px, as the patterns")
        if self.probe_MYX is not None and tuple(self.probe_MYX.shape[1:]) != self.window:
            found = f"probe of shape {list(self.probe_MYX.shape)}"
            raise InputError(self.name, found, f"[modes, {self.window[0]}, {self.window[1]}], as the window")

    def __len__(self) -> int:
        return len(self.patterns_BYX)

    @property
    def shape(self) -> tuple[int, int]:
        """Pixels (Y, X) of a pattern."""
        return self.patterns_BYX.shape[1], self.patterns_BYX.shape[2]

    @property
    def window(self) -> tuple[int, int]:
        """Pixels (Y, X) of the wave: `shape` times the binning."""
        return self.shape[0] * self.geometry.binning, self.shape[1] * self.geometry.binning

    @property
    def object_pixel(self) -> tuple[float, float] | None:
        """Edges (y, x) of an object pixel, m."""
        return self.geometry.object_pixel(self.shape)

    def subset(self, index_B: Tensor) -> Scan:
        """The positions of `index_B` alone, in its order."""
        return replace(self, patterns_BYX=self.patterns_BYX[index_B], positions_B2=self.positions_B2[index_B])


@dataclass(frozen=True)
class Reconstruction:
    """What an engine found; every field a tensor on one device. Predicted counts of position b, in a unitary transform F:

        I_b = scale_B[b] sum_mo |F(probe_bm x patch_b(object_o))|^2 + background_YX

    object_OLYX: complex, transmission of O incoherent modes of L slices. probe_MYX: complex; sum |probe|^2 is the counts of an
    empty pattern. Positions may each have a probe of their own (orthogonal probe relaxation), in mode 0:
    probe_b0 = probe_MYX[0] + sum_k opr_BK[b, k] eigen_KYX[k]; eigen_KYX of norm 1, None: no such change.
    positions_B2: float64, as in `Scan`, corrected if asked for, but **in pixels of object_OLYX**: scan positions minus origin_2.
    scale_B: relative intensity of the light at each position, mean 1. background_YX: counts, in the detector's order.
    error_P: of each pass so far, sum w (sqrt(I) - sqrt(counts))^2 / sum w counts over good pixels. pixel: (y, x) m or None.
    """

    object_OLYX: Tensor
    probe_MYX: Tensor
    positions_B2: Tensor
    scale_B: Tensor
    background_YX: Tensor
    eigen_KYX: Tensor | None = None
    opr_BK: Tensor | None = None
    origin_2: tuple[float, float] = (0.0, 0.0)
    pixel: tuple[float, float] | None = None
    error_P: tuple[float, ...] = ()

    def to(self, device: torch.device | str) -> Reconstruction:
        """The same on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)
