"""Scans whose truth is known: a Siemens star, a defocused beam, a path, counted photons.

numpy in float64, apart from the engines' code. Axes: B positions, M modes of the probe, Y X pixels. Positions and windows
as `scan.Scan` has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import fft

from verglas.ptychography.scan import Geometry
from verglas.ptychography.simulation_options import DetectorOptions, LightOptions, PathOptions, StarOptions

STOP = 0.4  # diameter of a zone plate's central stop, in its own
EDGE_PX = 1.5  # over which apertures fall off, so that the beam has no far tails
BAND = 32  # rows that a thread computes at once
SUPERSAMPLING = 4  # points along an edge of an object pixel
NEAR_FRESNEL = 0.3  # distance of a near field: wavelength z / (pixel^2 window)
FAR_DETECTOR_PIXEL = 75e-6  # m
RINGS = (0.25, 0.5, 0.75, 1.0)  # radii that interrupt the spokes, in the star's radius
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
AT_ONCE_BYTES = 2e8  # of exit waves


@dataclass(frozen=True)
class Setting:
    """All that a simulated scan is made from."""

    star: StarOptions = field(default_factory=StarOptions)
    light: LightOptions = field(default_factory=LightOptions)
    path: PathOptions = field(default_factory=PathOptions)
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    seed: int = 0

    def geometry(self) -> Geometry:
        """Lengths that give object pixels of `detector.pixel`."""
        wavelength = Geometry.wavelength_of(1e3 * self.detector.energy)
        pixel, window = 1e-9 * self.detector.pixel, self.detector.window
        if self.detector.near_field:
            return Geometry("near", wavelength, NEAR_FRESNEL * pixel**2 * window / wavelength, pixel)
        return Geometry("far", wavelength, pixel * window * FAR_DETECTOR_PIXEL / wavelength, FAR_DETECTOR_PIXEL)


@dataclass(frozen=True)
class Truth:
    """What the patterns of a simulated scan show.

    object_YX complex128; probe_MYX complex128, sum |probe|^2 = counts of an empty pattern; position_B2 true, recorded_B2 as the
    file tells, (row, column) px of object_YX; scale_B relative intensities, mean 1.
    """

    object_YX: np.ndarray
    probe_MYX: np.ndarray
    position_B2: np.ndarray
    recorded_B2: np.ndarray
    scale_B: np.ndarray
    geometry: Geometry


def make_truth(setting: Setting) -> Truth:
    """Object, probe and positions of a setting; the same for the same seed."""
    random = np.random.default_rng(setting.seed)
    window, path = setting.detector.window, setting.path
    position_B2 = walk(path, (1 - path.overlap) * setting.light.width * window)
    position_B2 = position_B2 + random.normal(0, path.jitter / math.sqrt(2), position_B2.shape)
    error_B2 = random.normal(0, path.position_error / math.sqrt(2), position_B2.shape)
    true_B2 = position_B2 + error_B2
    if path.whole_pixels:
        true_B2 = np.round(true_B2)
    margin = 2 + math.ceil(np.abs(error_B2).max())  # so that the window stays on the object at the recorded positions, too
    corner_2 = np.floor(true_B2.min(0)) - margin
    true_B2 = true_B2 - corner_2
    edges = tuple(int(edge) for edge in np.ceil(true_B2.max(0)) + window + margin)
    scale_B = np.clip(1 + random.normal(0, setting.light.fluctuation, len(true_B2)), 0.1, None)
    object_YX = siemens_star((edges[0], edges[1]), setting.star)
    probe_MYX = beam(setting.light, window, setting.detector.near_field)
    return Truth(object_YX, probe_MYX, true_B2, true_B2 - error_B2, scale_B / scale_B.mean(), setting.geometry())


def siemens_star(shape: tuple[int, int], star: StarOptions) -> np.ndarray:
    """Transmission (1 - absorption s) exp(i phase s + i support), complex128 [Y, X]; s: share of a pixel that bars cover."""
    tops = range(0, shape[0], BAND)
    with ThreadPoolExecutor() as threads:
        covered_YX = np.concatenate(list(threads.map(lambda top: _covered(shape, star, top), tops)))
    wave_Y1 = np.cos(2 * math.pi * 1.3 * np.arange(shape[0]) / shape[0])[:, None]
    support_YX = 0.25 * star.support * (wave_Y1 + np.sin(2 * math.pi * 0.9 * np.arange(shape[1]) / shape[1]))
    return (1 - star.absorption * covered_YX) * np.exp(1j * (star.phase * covered_YX + support_YX))


def _covered(shape: tuple[int, int], star: StarOptions, top: int) -> np.ndarray:
    """Share of each pixel that bars cover, of BAND rows from `top` on."""
    radius = 0.48 * min(shape)
    rows = np.arange(top, min(top + BAND, shape[0]))
    covered_YX = np.zeros((len(rows), shape[1]))
    offsets = (np.arange(SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    for dy in offsets:
        y_Y1 = (rows + dy - shape[0] / 2)[:, None]
        for dx in offsets:
            x_X = np.arange(shape[1]) + dx - shape[1] / 2
            distance_YX = np.hypot(y_Y1, x_X)
            spoke_YX = np.cos(star.spokes * np.arctan2(y_Y1, x_X)) > 0
            gap_YX = sum(np.abs(distance_YX - ring * radius) < 0.012 * radius for ring in RINGS) > 0
            covered_YX += spoke_YX & (distance_YX < radius) & ~gap_YX
    return covered_YX / SUPERSAMPLING**2


def beam(light: LightOptions, window: int, near_field: bool) -> np.ndarray:
    """Modes of the probe at the object, complex128 [M, window, window], their centre at the middle pixel; orthogonal.

    Far field: a disc (or ring) of frequencies up to cone x window / 2, with the quadratic phase of a defocus that spreads its
    rays over `width` x window px: a ray of frequency k px^-1 arrives c k px from the middle under the phase -pi c k^2.
    Near field: a disc of that width, its edge blurred, with the curvature of light that comes from a focus.
    """
    axis = np.arange(window) - window // 2
    y_Y1, x_X = axis[:, None], axis
    distance_YX = np.hypot(y_Y1, x_X)
    wide = light.width * window / 2
    if near_field:
        lit_YX = disc(distance_YX, wide, STOP * wide if light.optic == "zone-plate" else 0.0, 2 * EDGE_PX)
        first_YX = lit_YX * np.exp(1j * math.pi * distance_YX**2 / (4 * window * light.width))
    else:
        cone = light.cone * window / 2
        open_YX = disc(distance_YX, cone, STOP * cone if light.optic == "zone-plate" else 0.0, EDGE_PX)
        spread = wide * window / cone  # c, px^2
        wave_YX = open_YX * np.exp(-1j * math.pi * spread * (distance_YX / window) ** 2)
        first_YX = fft.fftshift(fft.ifft2(fft.ifftshift(wave_YX), norm="ortho"))
    return ladder_of_modes(first_YX, light.modes, math.sqrt(light.photons), wide)


def disc(distance_YX: np.ndarray, radius: float, stop: float, edge: float) -> np.ndarray:
    """1 inside `radius` and outside `stop`, falling off over about `edge` px."""
    inside_YX = 0.5 - 0.5 * np.tanh((distance_YX - radius) / edge)
    return inside_YX * (0.5 + 0.5 * np.tanh((distance_YX - stop) / edge)) if stop else inside_YX


def ladder_of_modes(first_YX: np.ndarray, count: int, norm: float, width: float) -> np.ndarray:
    """`count` orthogonal modes made of the first one times powers of y and x, each of half the power of the one before;
    sum |.|^2 = norm^2."""
    axis = (np.arange(len(first_YX)) - len(first_YX) // 2) / width
    powers = [(total - right, right) for total in range(count) for right in range(total + 1)][:count]
    raw = [first_YX * axis[:, None] ** up * axis**right for up, right in powers]
    columns, _ = np.linalg.qr(np.stack([one.ravel() for one in raw], 1))
    columns *= np.exp(1j * np.angle(np.vdot(columns[:, 0], raw[0].ravel())))
    weight_M = 0.5 ** np.arange(count)
    return (columns * np.sqrt(weight_M / weight_M.sum())).T.reshape(count, *first_YX.shape) * norm


def walk(path: PathOptions, step: float) -> np.ndarray:
    """Positions (row, column) px, float64 [B, 2], `step` apart, about the origin."""
    n = path.positions
    if path.path == "raster":
        columns = math.ceil(math.sqrt(n))
        return np.stack(np.divmod(np.arange(n), columns), 1) * step
    number_B = np.arange(n)
    if path.path == "fermat":  # each position has an area of step^2
        radius_B, angle_B = step * np.sqrt(number_B / math.pi), GOLDEN_ANGLE * number_B
    else:  # r = step angle / 2 pi; the length of the spiral up to an angle is about step angle^2 / 4 pi
        angle_B = np.sqrt(4 * math.pi * number_B)
        radius_B = step * angle_B / (2 * math.pi)
    return np.stack([radius_B * np.sin(angle_B), radius_B * np.cos(angle_B)], 1)


def patterns(truth: Truth, setting: Setting) -> Iterator[np.ndarray]:
    """Batches of patterns in the order of the positions, [b, Y, X] with the direct beam in the middle: counts, uint16 or uint32,
    which saturate, or with `noiseless` expected intensities, float32.

    A position of y + f (f from 0 to 1) px shows the object from pixel y on through the probe moved by f px; a near field is moved
    back by f, so that the probe stands still and the object moves.
    """
    random = np.random.default_rng((setting.seed, 1))
    at_once = max(1, int(AT_ONCE_BYTES / (16 * truth.probe_MYX.size)))
    for start in range(0, len(truth.position_B2), at_once):
        chosen = slice(start, start + at_once)
        expected_BYX = intensities(truth, truth.position_B2[chosen], truth.scale_B[chosen]) + setting.detector.background
        kind = stored_as(setting)
        if kind is np.float32:
            yield expected_BYX.astype(kind)
        else:
            yield np.minimum(random.poisson(expected_BYX), np.iinfo(kind).max).astype(kind)


def stored_as(setting: Setting) -> type:
    """The type of the patterns."""
    return np.float32 if setting.detector.noiseless else np.uint16 if setting.detector.bits == 16 else np.uint32


def intensities(truth: Truth, position_B2: np.ndarray, scale_B: np.ndarray) -> np.ndarray:
    """Expected counts without background at these positions, float64 [B, Y, X], the direct beam in the middle."""
    window = truth.probe_MYX.shape[-1]
    whole_B2 = np.floor(position_B2).astype(int)
    patch_BYX = sliding_window_view(truth.object_YX, (window, window))[whole_B2[:, 0], whole_B2[:, 1]]
    probe_BMYX = moved(truth.probe_MYX, position_B2 - whole_B2)
    wave_BMYX = fft.fft2(probe_BMYX * patch_BYX[:, None], norm="ortho")
    if truth.geometry.kind == "near":
        back_BYX = phase_slopes(window, whole_B2 - position_B2)  # the detector stands still
        wave_BMYX = fft.ifft2(wave_BMYX * back_BYX[:, None] * fresnel(truth.geometry, window), norm="ortho")
        return scale_B[:, None, None] * (np.abs(wave_BMYX) ** 2).sum(1)
    return scale_B[:, None, None] * fft.fftshift((np.abs(wave_BMYX) ** 2).sum(1), axes=(-2, -1))


def moved(probe_MYX: np.ndarray, shift_B2: np.ndarray) -> np.ndarray:
    """The probe moved by each shift (px, towards larger rows and columns), [B, M, Y, X], exact for what the window samples."""
    return fft.ifft2(fft.fft2(probe_MYX) * phase_slopes(probe_MYX.shape[-1], shift_B2)[:, None])


def phase_slopes(window: int, shift_B2: np.ndarray) -> np.ndarray:
    """What moves a field by each shift (px) when it multiplies its transform, in the order of the FFT, [B, Y, X]."""
    frequency = fft.fftfreq(window)
    return np.exp(-2j * math.pi * (shift_B2[:, 0, None, None] * frequency[:, None] + shift_B2[:, 1, None, None] * frequency))


def fresnel(geometry: Geometry, window: int) -> np.ndarray:
    """Transfer of free space, exp(-i pi wavelength distance |s|^2), in the order of the FFT, [Y, X]."""
    assert geometry.wavelength and geometry.distance and geometry.detector_pixel
    s2 = (fft.fftfreq(window) / geometry.detector_pixel) ** 2
    return np.exp(-1j * math.pi * geometry.wavelength * geometry.distance * (s2[:, None] + s2))
