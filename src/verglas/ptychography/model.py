"""Predicted patterns of a batch of positions, and the way back: gradients. The formula is in `reference.py`.

Forward, for positions B of a batch (every array a polynomial along a step, see polynomial.py; of degree 0 without a step):

    light_BMYX      probe of each position, moved by the fraction of a pixel of its position
    patch_BOLYX     the object's window at the whole pixels of its position
    exit_BOMYX      light x patch, slice after slice, with free space between slices
    detector_BOMYX  unitary Fourier transform (far) or Fresnel propagation (near)
    intensity_BYX   scale sum_OM |detector|^2, binned, + background

Back, with the transpose conjugate of every line from below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fft import fft2, fftfreq, ifft2

from verglas.kernels.overlay import overlay
from verglas.kernels.patches import patches
from verglas.ptychography.polynomial import Polynomial, plus, power, times
from verglas.ptychography.scan import Geometry
from verglas.ptychography.unknowns import Line, Unknowns


@dataclass(frozen=True)
class Place:
    """Where a batch lies: rows_B of the data set, corner_B2 whole pixels, fraction_B2 the rest (None: not followed)."""

    rows_B: Tensor
    corner_B2: Tensor
    fraction_B2: Tensor | None


@dataclass(frozen=True)
class Waves:
    """Everything between probe and detector for one batch; see the module. incident: what falls on each slice; spectrum_BMYX: the
    transform of the light before it is moved, coefficient 0 alone (None: the light is the probe itself, not moved)."""

    place: Place
    light: Polynomial
    spectrum_BMYX: Tensor | None
    patch: Polynomial
    incident: list[Polynomial]
    exit: Polynomial
    detector: Polynomial
    power: Polynomial
    intensity: Polynomial


class Model:
    """The optics of one data set, on one device in one precision."""

    def __init__(
        self, geometry: Geometry, window: tuple[int, int], pixel: tuple[float, float] | None, like: Tensor, moves: bool = True
    ) -> None:
        """window: (Y, X) px of the wave; pixel: m of the object, (y, x); like: a real tensor of the device and precision;
        moves: whether fractions of a pixel in positions are followed (without, a Fourier transform is saved)."""
        self.geometry, self.window, self.moves = geometry, window, moves
        self.row_Y = fftfreq(window[0], dtype=torch.float64, device=like.device)
        self.column_X = fftfreq(window[1], dtype=torch.float64, device=like.device)
        self.dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        self.between = [self._transfer(distance, pixel) for distance in geometry.slice_distances]
        self.to_detector = self._transfer(geometry.distance, pixel) if geometry.kind == "near" else None

    def _transfer(self, distance: float | None, pixel: tuple[float, float] | None) -> Tensor:
        """exp(-i pi wavelength distance (u^2 + v^2)) in the order of the FFT."""
        assert distance is not None and pixel is not None and self.geometry.wavelength is not None  # Geometry saw to it
        square_YX = (self.row_Y[:, None] / pixel[0]).square() + (self.column_X[None, :] / pixel[1]).square()
        return torch.polar(torch.ones_like(square_YX), -math.pi * self.geometry.wavelength * distance * square_YX).to(self.dtype)

    def place(self, positions_B2: Tensor, rows_B: Tensor) -> Place:
        """Whole pixels and fractions of the batch's positions."""
        position_B2 = positions_B2[rows_B].double()
        corner_B2 = position_B2.round()
        return Place(rows_B, corner_B2.long(), position_B2 - corner_B2 if self.moves else None)

    def ramp(self, fraction_B2: Tensor) -> Tensor:
        """[B, 1, Y, X] exp(-2 pi i k.fraction), which moves a field by the fraction; taken in float64."""
        row_BY = torch.exp(-2j * math.pi * self.row_Y * fraction_B2[:, :1])
        column_BX = torch.exp(-2j * math.pi * self.column_X * fraction_B2[:, 1:])
        return row_BY.to(self.dtype)[:, None, :, None] * column_BX.to(self.dtype)[:, None, None, :]

    def _probe(self, line: Line, place: Place) -> Polynomial:
        """[B or 1, M, Y, X] probe of each position, not moved: mode 0 may differ between positions."""
        probe = [one[None] for one in line.of("probe_MYX")]
        if not line.has("eigen_KYX"):
            return probe
        weight = [one[:, :, None, None] for one in line.of("opr_BK", place.rows_B)]
        change = [one.sum(1, keepdim=True) for one in times(weight, [one[None] for one in line.of("eigen_KYX")])]
        count = len(place.rows_B)
        first = [one.expand(count, -1, -1, -1) for one in plus([one[:, :1] for one in probe], change)]
        others = [one[:, 1:].expand(count, -1, -1, -1) for one in probe]
        others += [torch.zeros_like(others[0])] * (len(first) - len(others))
        return [torch.cat(both, 1) for both in zip(first, others, strict=True)]

    def light(self, line: Line, place: Place) -> tuple[Polynomial, Tensor | None]:
        """([B or 1, M, Y, X] light on the object, its transform before it is moved; None where light is the probe)."""
        probe = self._probe(line, place)
        if place.fraction_B2 is None:
            return probe, None
        ramp_B1YX = self.ramp(place.fraction_B2)
        spectrum = [fft2(one, norm="ortho") for one in probe]
        return [ifft2(one * ramp_B1YX, norm="ortho") for one in spectrum], spectrum[0]

    def waves(self, line: Line, rows_B: Tensor) -> Waves:
        """Prediction of the positions `rows_B` along the line."""
        place = self.place(line.at["positions_B2"], rows_B)
        light, spectrum = self.light(line, place)
        patch = [patches(one, place.corner_B2, self.window) for one in line.of("object_OLYX")]
        incident, wave = self._exits([one[:, None] for one in light], patch)
        detector = [self.to_the_detector(one, place) for one in wave]
        squares = [self.binned(one) for one in power(detector, (1, 2))]
        scaled = times([one[:, None, None] for one in line.of("scale_B", rows_B)], squares)
        intensity = plus(scaled, line.of("background_YX"))
        return Waves(place, light, spectrum, patch, incident, wave, detector, squares, intensity)

    def _exits(self, wave: Polynomial, patch: Polynomial) -> tuple[list[Polynomial], Polynomial]:
        """(what falls on each slice, exit wave) of light [B, 1, M, Y, X] and patches."""
        incident = []
        for number in range(patch[0].shape[2]):
            incident.append(wave)
            wave = times([one[:, :, number, None] for one in patch], wave)
            if number < len(self.between):
                wave = [ifft2(fft2(one) * self.between[number]) for one in wave]
        return incident, wave

    def exit_wave(self, light_BMYX: Tensor, patch_BOLYX: Tensor) -> Tensor:
        """[B, O, M, Y, X] what leaves patches of the object under a light."""
        return self._exits([light_BMYX[:, None]], [patch_BOLYX])[1][0]

    def derivatives_of_position(self, waves: Waves) -> Iterator[Tensor]:
        """Derivatives of the waves at the detector, [B, O, M, Y, X], with respect to the row and the column of the positions."""
        place = waves.place
        assert place.fraction_B2 is not None and waves.spectrum_BMYX is not None, "positions to be fitted have fractions"
        moved_BMYX = waves.spectrum_BMYX * self.ramp(place.fraction_B2)
        for frequency in (self.row_Y[:, None], self.column_X[None, :]):
            turn = (2j * math.pi * frequency).to(self.dtype)
            _, wave = self._exits([ifft2(-turn * moved_BMYX, norm="ortho")[:, None]], waves.patch)
            derivative = self.to_the_detector(wave[0], place)
            if self.to_detector is not None:
                derivative = derivative + ifft2(turn * fft2(waves.detector[0]))
            yield derivative

    def binned(self, fine_BYX: Tensor) -> Tensor:
        """Sums over binning x binning pixels."""
        n = self.geometry.binning
        if n == 1:
            return fine_BYX
        rows, columns = fine_BYX.shape[-2] // n, fine_BYX.shape[-1] // n
        return fine_BYX.unflatten(-2, (rows, n)).unflatten(-1, (columns, n)).sum((-3, -1))

    def unbinned(self, coarse_BYX: Tensor) -> Tensor:
        """The transpose of `binned`: every pixel's value for all that it adds up."""
        n = self.geometry.binning
        return coarse_BYX if n == 1 else coarse_BYX.repeat_interleave(n, -2).repeat_interleave(n, -1)

    def to_the_detector(self, exit_BOMYX: Tensor, place: Place) -> Tensor:
        """From the exit wave to the wave at the detector; a near field is moved back by the fraction of the position."""
        if self.to_detector is None:
            return fft2(exit_BOMYX, norm="ortho")
        return ifft2(fft2(exit_BOMYX) * self._near(place))

    def from_the_detector(self, detector_BOMYX: Tensor, place: Place) -> Tensor:
        """The inverse, which is the adjoint, of `to_the_detector`."""
        if self.to_detector is None:
            return ifft2(detector_BOMYX, norm="ortho")
        return ifft2(fft2(detector_BOMYX) * self._near(place).conj())

    def _near(self, place: Place) -> Tensor:
        """[Y, X], or [B, 1, 1, Y, X] where positions have fractions."""
        assert self.to_detector is not None
        if place.fraction_B2 is None:
            return self.to_detector
        return self.to_detector * self.ramp(-place.fraction_B2)[:, None]

    def at_detector(self, waves: Waves, scale_B: Tensor, slope_BYX: Tensor) -> Tensor:
        """Gradient with respect to the wave at the detector, of a loss whose slope in the intensity is given."""
        slope_BYX = self.unbinned(2 * scale_B[waves.place.rows_B, None, None] * slope_BYX)
        return slope_BYX[:, None, None] * waves.detector[0]

    def through(self, waves: Waves, gradient_BOMYX: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the exit wave to those of (light [B, M, Y, X], patch [B, O, L, Y, X])."""
        patch_BOLYX = waves.patch[0]
        parts = []
        for number in reversed(range(patch_BOLYX.shape[2])):
            if number < len(self.between):
                gradient_BOMYX = ifft2(fft2(gradient_BOMYX) * self.between[number].conj())
            parts.append((waves.incident[number][0].conj() * gradient_BOMYX).sum(2))
            gradient_BOMYX = patch_BOLYX[:, :, number, None].conj() * gradient_BOMYX
        return gradient_BOMYX.sum(1), torch.stack(parts[::-1], 2)

    def add_gradient(self, line: Line, waves: Waves, slope_BYX: Tensor, into: Unknowns) -> None:
        """Add the gradient of this batch to the fields of `into` that are there.

        slope_BYX: derivative of the loss with respect to each predicted count, 0 where a pixel is bad.
        """
        place, at = waves.place, line.at
        at_detector = self.at_detector(waves, at["scale_B"], slope_BYX)
        if into.scale_B is not None:
            into.scale_B[place.rows_B] += (slope_BYX * waves.power[0]).sum((1, 2))
        if into.background_YX is not None:
            into.background_YX.add_(slope_BYX.sum(0))
        unmoved_BMYX = self.spread(at, waves, self.from_the_detector(at_detector, place), into)
        if into.positions_B2 is not None:
            assert waves.spectrum_BMYX is not None, "positions to be fitted have fractions"
            moved_B2 = self._slopes(waves.spectrum_BMYX, unmoved_BMYX, (1,))
            if self.to_detector is not None:  # moved back at the detector
                moved_B2 -= self._slopes(fft2(waves.detector[0], norm="ortho"), fft2(at_detector, norm="ortho"), (1, 2))
            into.positions_B2[place.rows_B] += moved_B2

    def spread(self, at: Unknowns, waves: Waves, exit_BOMYX: Tensor, into: Unknowns) -> Tensor:
        """Add exit waves, spread over object (times conj(light)) and probe (times conj(patch)), to the fields of `into` there.

        The transpose conjugate of the exit wave's dependence on each. Returns what falls to the light before it is moved,
        transformed where positions have fractions.
        """
        place = waves.place
        light_BMYX, patch_BOLYX = self.through(waves, exit_BOMYX)
        if into.object_OLYX is not None:
            overlay(patch_BOLYX, place.corner_B2, into.object_OLYX)
        if place.fraction_B2 is not None:
            light_BMYX = fft2(light_BMYX, norm="ortho") * self.ramp(place.fraction_B2).conj()
        self._add_probe(at, place, light_BMYX, into)
        return light_BMYX

    def _add_probe(self, at: Unknowns, place: Place, unmoved_BMYX: Tensor, into: Unknowns) -> None:
        """Gradients of probe, its modes of change and their weights; from a transform where positions have fractions."""
        transformed = place.fraction_B2 is not None

        def field_of(sum_YX: Tensor) -> Tensor:
            return ifft2(sum_YX, norm="ortho") if transformed else sum_YX

        if into.probe_MYX is not None:
            into.probe_MYX.add_(field_of(unmoved_BMYX.sum(0)))
        if at.eigen_KYX is None:
            return
        first_BYX = unmoved_BMYX[:, 0]
        weight_BK = at["opr_BK"][place.rows_B].to(first_BYX.dtype)
        if into.eigen_KYX is not None:
            into.eigen_KYX.add_(field_of(torch.einsum("bk,byx->kyx", weight_BK, first_BYX)))
        if into.opr_BK is not None:
            eigen_KYX = fft2(at.eigen_KYX, norm="ortho") if transformed else at.eigen_KYX
            into.opr_BK[place.rows_B] += torch.einsum("kyx,byx->bk", eigen_KYX.conj(), first_BYX).real

    def _slopes(self, spectrum: Tensor, gradient: Tensor, over: tuple[int, ...]) -> Tensor:
        """[B, 2] derivative with respect to a move (row, column) of a field of this spectrum, from the gradient of the spectrum.

        Both before the move, or both after it. d spectrum = -2 pi i k spectrum; axes `over` and pixels are summed.
        """
        product_BYX = (gradient.conj() * spectrum).imag.sum(over) * (2 * math.pi)
        row = (product_BYX.sum(2) * self.row_Y).sum(1)
        column = (product_BYX.sum(1) * self.column_X).sum(1)
        return torch.stack([row, column], 1)
