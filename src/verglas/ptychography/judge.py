"""How near a reconstructed object is to the truth, or to another reconstruction, once what data cannot tell is removed.

A scan leaves open: a complex factor (global phase; power between probe and object), a linear phase over the object (against one
over the probe), and a shift (of object and probe together). `aligned` finds all of them, `judge` then compares, `frc` correlates
the Fourier transforms of two objects ring by ring. numpy, float64. Axes: Y X pixels, S rings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

FINE_STEPS = 30  # of the search for shift and phase slope
FITTED = 200_000  # pixels, about, that this search looks at
SETTLED = 1e-6  # px, and rad over the whole width: a search that moves less is over
PADDING = 32  # px, mirrored, about an object that is moved
SSIM_WINDOW = 7  # px
K1, K2 = 0.01, 0.03  # of the structural similarity (Wang et al. 2004)
TAPER = 0.1  # share of each edge over which objects fade before their transforms are compared


@dataclass(frozen=True)
class Alignment:
    """What was removed: object(r) -> factor exp(i slope.r) object(r - shift); slope rad/px, shift px, (row, column)."""

    factor: complex
    slope_2: tuple[float, float]
    shift_2: tuple[float, float]


@dataclass(frozen=True)
class Judgement:
    """error: rms of the difference over rms of the truth; ssim_amplitude, ssim_phase: mean structural similarity (1: alike);
    phase_error: rms, rad."""

    error: float
    ssim_amplitude: float
    ssim_phase: float
    phase_error: float
    alignment: Alignment


def judge(found_YX: np.ndarray, truth_YX: np.ndarray, seen_YX: np.ndarray) -> tuple[Judgement, np.ndarray]:
    """Compare where seen_YX (bool) holds. Both objects complex [Y, X] on one grid (within a few pixels); returns the numbers
    and the object aligned with the truth."""
    aligned_YX, alignment = aligned(found_YX, truth_YX, seen_YX)
    turn_YX = np.angle(aligned_YX * truth_YX.conj())[seen_YX]
    difference = np.abs(aligned_YX - truth_YX)[seen_YX]
    error = math.sqrt((difference**2).sum() / (np.abs(truth_YX[seen_YX]) ** 2).sum())
    # The phase is compared on the truth's branch, so that a wrap of one and not the other counts for nothing.
    branch_YX = np.angle(truth_YX) + np.angle(aligned_YX * truth_YX.conj())
    amplitude = ssim(np.abs(aligned_YX), np.abs(truth_YX), seen_YX)
    phase = ssim(branch_YX, np.angle(truth_YX), seen_YX)
    return Judgement(error, amplitude, phase, math.sqrt((turn_YX**2).mean()), alignment), aligned_YX


def aligned(found_YX: np.ndarray, truth_YX: np.ndarray, seen_YX: np.ndarray) -> tuple[np.ndarray, Alignment]:
    """`found` with factor, phase slope and shift such that it differs least from `truth` where seen_YX (bool) holds.

    A coarse shift from the moduli of the objects' gradients, which neither slope nor factor changes; a coarse slope from the
    peak of the transform of found conj(truth); then Gauss-Newton steps of all together.
    """
    found_YX, truth_YX, weight_YX = found_YX.astype(complex), truth_YX.astype(complex), seen_YX.astype(float)
    shift_2 = _coarse_shift(found_YX, truth_YX, weight_YX)
    slope_2 = _coarse_slope(shifted(found_YX, shift_2), truth_YX, weight_YX)
    rows, columns = (np.arange(edge) - edge / 2 for edge in truth_YX.shape)
    y_YX, x_YX = np.meshgrid(rows, columns, indexing="ij")
    fitted_YX = seen_YX & (np.cumsum(seen_YX).reshape(seen_YX.shape) % (1 + seen_YX.sum() // FITTED) == 0)
    for _ in range(FINE_STEPS):
        now_YX = shifted(found_YX, shift_2) * np.exp(1j * (slope_2[0] * y_YX + slope_2[1] * x_YX))
        dy_YX, dx_YX = np.gradient(now_YX)
        now_N, target_N = now_YX[fitted_YX], truth_YX[fitted_YX]
        slopes = (-dy_YX[fitted_YX], -dx_YX[fitted_YX], 1j * y_YX[fitted_YX] * now_N, 1j * x_YX[fitted_YX] * now_N)
        columns_N5 = np.stack([now_N, *slopes], -1)
        factor = np.vdot(now_N, target_N) / np.vdot(now_N, now_N)
        step_4 = _real_step(factor * columns_N5, target_N - factor * now_N)
        shift_2, slope_2 = shift_2 + step_4[:2], slope_2 + step_4[2:]
        if np.abs(step_4[:2]).max() < SETTLED and np.abs(step_4[2:]).max() * max(truth_YX.shape) < SETTLED:
            break
    now_YX = shifted(found_YX, shift_2) * np.exp(1j * (slope_2[0] * y_YX + slope_2[1] * x_YX))
    factor = np.vdot(now_YX[seen_YX], truth_YX[seen_YX]) / np.vdot(now_YX[seen_YX], now_YX[seen_YX])
    made = Alignment(complex(factor), (float(slope_2[0]), float(slope_2[1])), (float(shift_2[0]), float(shift_2[1])))
    return factor * now_YX, made


def _real_step(columns_N5: np.ndarray, residual_N: np.ndarray) -> np.ndarray:
    """Least-squares step of shift and slope (real, 4 numbers), the complex factor (column 0) fitted along."""
    basis_NC = np.concatenate([columns_N5, 1j * columns_N5[:, :1]], 1)
    normal_CC = (basis_NC.conj().T @ basis_NC).real
    return np.linalg.lstsq(normal_CC, (basis_NC.conj().T @ residual_N).real, rcond=None)[0][1:5]


def shifted(object_YX: np.ndarray, shift_2: np.ndarray | tuple[float, float]) -> np.ndarray:
    """The object moved by shift_2 px towards larger rows and columns, by a phase slope of its transform, so that noise stays what
    it is; about it, its mirror image fades into its mean, so that nothing rings at the edges."""
    least = PADDING + int(np.abs(shift_2).max())
    pads = [(least, fft.next_fast_len(edge + 2 * least) - edge - least) for edge in object_YX.shape]
    fades = [np.concatenate([_rise(a), np.ones(edge), _rise(b)[::-1]]) for edge, (a, b) in zip(object_YX.shape, pads)]
    mean = object_YX.mean()
    wave_YX = fft.fft2(np.pad(object_YX - mean, pads, "symmetric") * np.outer(*fades))
    ramps = [np.exp(-2j * math.pi * fft.fftfreq(edge) * shift) for edge, shift in zip(wave_YX.shape, shift_2)]
    moved_YX = fft.ifft2(wave_YX * np.outer(*ramps))
    return mean + moved_YX[least : least + object_YX.shape[0], least : least + object_YX.shape[1]]


def _coarse_shift(found_YX: np.ndarray, truth_YX: np.ndarray, weight_YX: np.ndarray) -> np.ndarray:
    """Whole pixels by which `found` has to move: peak of the correlation of the moduli of the gradients."""
    edges = [np.hypot(*np.abs(np.gradient(one))) * weight_YX for one in (found_YX, truth_YX)]
    edges = [(one - one[weight_YX > 0].mean()) * weight_YX for one in edges]
    correlation_YX = fft.irfft2(fft.rfft2(edges[1]) * fft.rfft2(edges[0]).conj(), truth_YX.shape)
    peak = np.unravel_index(int(correlation_YX.argmax()), truth_YX.shape)
    return np.array([at if at <= edge // 2 else at - edge for at, edge in zip(peak, truth_YX.shape)], float)


def _coarse_slope(found_YX: np.ndarray, truth_YX: np.ndarray, weight_YX: np.ndarray) -> np.ndarray:
    """Phase slope (rad/px) that `found` lacks: peak of |transform of truth conj(found)|, to a quarter of a Fourier pixel."""
    shape = [4 * edge for edge in truth_YX.shape]
    spectrum_YX = np.abs(fft.fft2(weight_YX * truth_YX * found_YX.conj(), shape))
    peak = np.unravel_index(int(spectrum_YX.argmax()), spectrum_YX.shape)
    return 2 * math.pi * np.array([fft.fftfreq(edge)[at] for at, edge in zip(peak, shape)])


def ssim(first_YX: np.ndarray, second_YX: np.ndarray, seen_YX: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004) over windows of 7 px that lie in seen_YX; the range is the second's there."""
    span = float(np.ptp(second_YX[seen_YX]))
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2

    def mean(image_YX: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(image_YX, SSIM_WINDOW)

    mean1_YX, mean2_YX = mean(first_YX), mean(second_YX)
    power_YX = mean(first_YX**2) + mean(second_YX**2) - mean1_YX**2 - mean2_YX**2
    cross_YX = mean(first_YX * second_YX) - mean1_YX * mean2_YX
    similarity_YX = (2 * mean1_YX * mean2_YX + c1) * (2 * cross_YX + c2)
    similarity_YX /= (mean1_YX**2 + mean2_YX**2 + c1) * (power_YX + c2)
    inner_YX = ndimage.binary_erosion(seen_YX, np.ones((SSIM_WINDOW, SSIM_WINDOW)))
    return float(similarity_YX[inner_YX].mean())


def frc(first_YX: np.ndarray, second_YX: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fourier ring correlation of two aligned complex objects [Y, X] that are seen everywhere.

    Returns frequency_S (1/px, up to 0.5), correlation_S = |sum F1 F2*| / sqrt(sum |F1|^2 sum |F2|^2), and halfbit_S, the
    threshold of half a bit per pixel (van Heel and Schatz 2005). Means are removed and edges faded first.
    """
    fade_YX = np.outer(*(_fade(edge) for edge in first_YX.shape))
    wave1_YX, wave2_YX = (fft.fft2((one - one.mean()) * fade_YX) for one in (first_YX, second_YX))
    rows, columns = (fft.fftfreq(edge) for edge in first_YX.shape)
    count = min(first_YX.shape) // 2
    ring_YX = np.round(np.hypot(rows[:, None], columns) * 2 * count).astype(int)
    inside_YX = ring_YX <= count

    def over_rings(values_YX: np.ndarray) -> np.ndarray:
        return np.bincount(ring_YX[inside_YX], values_YX[inside_YX], minlength=count + 1)

    cross_YX = wave1_YX * wave2_YX.conj()
    cross_S = np.hypot(over_rings(cross_YX.real), over_rings(cross_YX.imag))
    power_S = over_rings(np.abs(wave1_YX) ** 2) * over_rings(np.abs(wave2_YX) ** 2)
    # Fading leaves the square of its mean power as the share of independent coefficients; complex objects have no Friedel pairs.
    independent_S = np.maximum(over_rings(np.ones(ring_YX.shape)) * (fade_YX**2).mean(), 1.0)
    root_S = 1 / np.sqrt(independent_S)
    halfbit_S = (0.2071 + 1.9102 * root_S) / (1.2071 + 0.9102 * root_S)
    return np.arange(count + 1) / (2 * count), cross_S / np.sqrt(np.maximum(power_S, 1e-300)), halfbit_S


def resolution(frequency_S: np.ndarray, correlation_S: np.ndarray, threshold_S: np.ndarray) -> float:
    """Period (px) of the last ring of the longest run of rings in which the correlation reaches the threshold, but for ring 0.

    A run, as the longest periods are weakly determined, above all in a near field, and may differ where all shorter ones agree.
    inf: it is reached in no ring.
    """
    agree_S = np.concatenate([[False], correlation_S[1:] >= threshold_S[1:], [False]])
    turns = np.flatnonzero(agree_S[1:] != agree_S[:-1])
    first, last = turns[::2] + 1, turns[1::2]
    if not len(first):
        return math.inf
    return float(1 / frequency_S[last[int((last - first).argmax())]])


def _fade(edge: int) -> np.ndarray:
    """1 in the middle, cosine edges of `TAPER` of the length."""
    wide = max(1, round(TAPER * edge))
    return np.concatenate([_rise(wide), np.ones(edge - 2 * wide), _rise(wide)[::-1]])


def _rise(wide: int) -> np.ndarray:
    """From 0 to 1 along a cosine."""
    return 0.5 - 0.5 * np.cos(np.pi * (np.arange(wide) + 0.5) / wide)


def seen_region(position_B2: np.ndarray, probe_MYX: np.ndarray, shape: tuple[int, int], least: float = 0.05) -> np.ndarray:
    """Where the object (of `shape`) got at least `least` of the median light of the lit part, bool [Y, X].

    position_B2: (row, column) px of the window's first pixel in the object.
    """
    light_YX = (np.abs(probe_MYX) ** 2).sum(0)
    hits_YX = np.zeros(shape)
    whole_B2 = np.clip(np.round(position_B2).astype(int), 0, np.array(shape) - 1)
    np.add.at(hits_YX, (whole_B2[:, 0], whole_B2[:, 1]), 1)
    padded = [a + b - 1 for a, b in zip(shape, light_YX.shape)]
    dose_YX = fft.irfft2(fft.rfft2(hits_YX, padded) * fft.rfft2(light_YX, padded), padded)[: shape[0], : shape[1]]
    lit = dose_YX > 1e-3 * dose_YX.max()
    return dose_YX > least * np.median(dose_YX[lit])


def position_error(found_B2: np.ndarray, truth_B2: np.ndarray) -> float:
    """rms distance (px) of positions from the truth, once an affine map of all of them (shift, drift, scale, shear: what object
    and probe can take up) is fitted and taken off."""
    basis_B3 = np.concatenate([found_B2, np.ones((len(found_B2), 1))], 1)
    fitted_32 = np.linalg.lstsq(basis_B3, truth_B2, rcond=None)[0]
    return float(np.sqrt(((basis_B3 @ fitted_32 - truth_B2) ** 2).sum(1).mean()))


def largest_square(seen_YX: np.ndarray) -> tuple[slice, slice]:
    """The largest square about the middle of what is seen, all of it seen; for Fourier rings."""
    inside = ndimage.distance_transform_cdt(np.pad(seen_YX, 1), "chessboard")[1:-1, 1:-1]
    row, column = np.unravel_index(int(inside.argmax()), seen_YX.shape)
    half = int(inside[row, column]) - 1
    return slice(int(row) - half, int(row) + half), slice(int(column) - half, int(column) + half)
