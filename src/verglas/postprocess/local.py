"""Local resolution: FSC in soft windows over the map, and the map filtered by it.

The measure is that of the field's reference program: windows
on a grid, FSC of the windowed half-maps, corrected by the FSC of windowed phase-randomised maps, resolution where that
drops below 0.143; a voxel gets the window-weighted mean of 1/resolution. Two things make it fast and change nothing else:

* A window is transformed in a box just larger than itself, not in the map's box. Windowing blurs shells over
  1/(window diameter) anyway, so the coarser shells carry the same curve; it is interpolated back to the map's shells.
* The filtered map, sum_p w(x - p) (sum_s g_ps band_s(x)) / sum_p w(x - p), is a sum over shells s of the map's band
  times a weight map, sum_p w(x - p) g_ps: two transforms per shell instead of one per window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from verglas.core.fourier import shells_of_half_volume
from verglas.core.masks import low_pass_filter, radius_grid, raised_cosine
from verglas.postprocess.curves import correct_for_mask, half_transform, last_good_shell
from verglas.postprocess.options import LocalOptions
from verglas.postprocess.random_phases import GlibcRandom, randomise_phases
from verglas.postprocess.sharpening import Mtf, apply_bfactor, divide_by_mtf, fsc_weights

_BATCH_VOXELS = 2**23
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Window:
    """Soft spherical window in whole pixels: 1 inside `radius`, a raised cosine of `edge` outside it."""

    radius: int
    edge: int

    @property
    def reach(self) -> int:
        return self.radius + self.edge

    def values(self, box: int) -> Tensor:
        """[box, box, box] float64 about box/2."""
        return raised_cosine(radius_grid(box, 3, dtype=torch.float64), self.radius, self.edge)


@dataclass(frozen=True)
class LocalResolution:
    """resolution_ZYX: Å, 0 where no window reaches; filtered_ZYX: locally filtered map; per window: centre_P3 (z, y, x in
    pixels), fsc_PS (corrected, on the map's shells), resolution_P (Å)."""

    resolution_ZYX: Tensor
    filtered_ZYX: Tensor
    centre_P3: Tensor
    fsc_PS: Tensor
    resolution_P: Tensor


def window_of(options: LocalOptions, pixel_size: float) -> tuple[Window, int]:
    """Window and grid step in pixels (both rounded)."""
    radius = 0.5 * options.sampling if options.window_radius is None else options.window_radius
    edge = options.sampling if options.window_edge is None else options.window_edge
    step = max(round(options.sampling / pixel_size), 1)
    return Window(int(radius / pixel_size + 0.5), int(edge / pixel_size + 0.5)), step


def window_centres(box: int, window: Window, step: int) -> Tensor:
    """Grid points (z, y, x) nearer to the centre than box/2 - radius, int64 [P, 3]; the grid starts at pixel 0."""
    axis = torch.arange(0, box, step)
    grid = torch.cartesian_prod(axis, axis, axis)
    distance = (grid - box // 2).double().square().sum(-1).sqrt()
    return grid[distance < box // 2 - window.radius]


def window_box(box: int, window: Window, padding: float = 1.0) -> int:
    """Even, fast box that holds the window `padding` times over; the map's own box at most."""
    size = next_fast_len((int(2 * window.reach * padding) + 2) // 2, real=True) * 2
    return min(size, box)


def _cut(map_ZYX: Tensor, centre_P3: Tensor, size: int) -> Tensor:
    """Boxes [P, size, size, size] about the centres, zero outside the map."""
    half = size // 2
    padded = torch.nn.functional.pad(map_ZYX, [half] * 6)
    return torch.stack([padded[z : z + size, y : y + size, x : x + size] for z, y, x in centre_P3.tolist()])


def _batch_fsc(a_PZYX: Tensor, b_PZYX: Tensor, shells_K: Tensor, n_shells: int) -> Tensor:
    """FSC of real boxes [P, c, c, c], float64 [P, c/2+1]; stored coefficients count once each."""
    a_PK, b_PK = (torch.fft.rfftn(m, dim=(1, 2, 3)).flatten(1) for m in (a_PZYX, b_PZYX))

    def shell_sums(values_PK: Tensor) -> Tensor:
        total = values_PK.new_zeros(len(values_PK), int(shells_K.max()) + 1)
        return total.index_add_(1, shells_K, values_PK)[:, :n_shells]

    cross = shell_sums(a_PK.real * b_PK.real + a_PK.imag * b_PK.imag)
    power = shell_sums(a_PK.abs().square()) * shell_sums(b_PK.abs().square())
    return torch.where(power > 0, cross / power.clamp_min(1e-300).sqrt(), torch.zeros_like(cross))


def resample_shells(curve_PS: Tensor, size: int, box: int) -> Tensor:
    """Curves on the shells of a `size` px box -> the box/2+1 shells of a `box` px box, linear in frequency."""
    position = torch.arange(box // 2 + 1, dtype=torch.float64, device=curve_PS.device) * size / box
    left = position.floor().long().clamp_max(curve_PS.shape[1] - 2)
    t = position - left
    return curve_PS[:, left] * (1 - t) + curve_PS[:, left + 1] * t


def windowed_fsc(
    halves: tuple[Tensor, Tensor], centre_P3: Tensor, window: Window, padding: float = 1.0, progress: Progress | None = None
) -> Tensor:
    """FSC of the two maps [N, N, N] within a window about each centre, on the map's shells, float64 [P, N/2+1]."""
    box = halves[0].shape[0]
    size = window_box(box, window, padding)
    weight = window.values(size).to(halves[0].device)
    shells_K = shells_of_half_volume(size, halves[0].device).flatten()
    curves = []
    for centre_B3 in centre_P3.split(max(_BATCH_VOXELS // size**3, 1)):
        a, b = (_cut(half.double(), centre_B3, size) * weight for half in halves)
        curves.append(_batch_fsc(a, b, shells_K, size // 2 + 1))
        if progress is not None:
            progress(len(centre_B3))
    return resample_shells(torch.cat(curves), size, box)


def local_curves(
    half1_ZYX: Tensor,
    half2_ZYX: Tensor,
    pixel_size: float,
    options: LocalOptions,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Window centres [P, 3] (z, y, x in pixels) and their corrected FSC [P, N/2+1]."""
    box = half1_ZYX.shape[0]
    window, step = window_of(options, pixel_size)
    centre_P3 = window_centres(box, window, step)
    masked_PS = windowed_fsc((half1_ZYX, half2_ZYX), centre_P3, window, options.window_padding, progress)
    random, first = GlibcRandom(seed), int(box * pixel_size / options.randomise_at)
    scrambled1_ZYX = randomise_phases(half_transform(half1_ZYX), first, random)
    scrambled2_ZYX = randomise_phases(half_transform(half2_ZYX), first, random)
    random_PS = windowed_fsc((scrambled1_ZYX, scrambled2_ZYX), centre_P3, window, options.window_padding, progress)
    for curve_PS in (masked_PS, random_PS):
        curve_PS[:, 0] = torch.where(curve_PS[:, 0] <= 0, torch.ones_like(curve_PS[:, 0]), curve_PS[:, 0])
    fsc_PS = torch.stack([correct_for_mask(m, r, first) for m, r in zip(masked_PS, random_PS)])
    return centre_P3, fsc_PS


class WindowSum:
    """x -> sum_p w(x - p) q_p for values q_P at the window centres, by one convolution (no wrap-around)."""

    def __init__(self, box: int, centre_P3: Tensor, window: Window, device: torch.device) -> None:
        self.box, self.centre_P3, self.device = box, centre_P3.to(device), device
        self.padded = next_fast_len(box + window.reach + 1, real=True)
        size = 2 * window.reach + 2
        kernel = torch.zeros([self.padded] * 3, dtype=torch.float64, device=device)
        kernel[:size, :size, :size] = window.values(size).to(device)
        self.kernel = torch.fft.rfftn(kernel.roll([-(size // 2)] * 3, dims=(0, 1, 2)))

    def __call__(self, values_P: Tensor) -> Tensor:
        sparse = torch.zeros([self.padded] * 3, dtype=torch.float64, device=self.device)
        z, y, x = self.centre_P3.unbind(1)
        sparse[z, y, x] = values_P.to(self.device, torch.float64)
        smooth = torch.fft.irfftn(torch.fft.rfftn(sparse) * self.kernel, s=sparse.shape)
        return smooth[: self.box, : self.box, : self.box]


def shell_gains(fsc_PS: Tensor, resolution_P: Tensor, box_angstrom: float, edge: int = 2) -> Tensor:
    """What each window lets pass per shell: FSC weight times a low pass at the window's resolution, [P, S]."""
    shell_S = torch.arange(fsc_PS.shape[1], dtype=torch.float64)
    gains = [
        fsc_weights(fsc_S) * low_pass_filter(shell_S, int(box_angstrom / resolution + 0.5), edge)
        for fsc_S, resolution in zip(fsc_PS, resolution_P.tolist())
    ]
    return torch.stack(gains)


def filter_locally(fourier_ZYX: Tensor, gain_PS: Tensor, weigh: WindowSum, progress: Progress | None = None) -> Tensor:
    """Blend the windows' filters: sum over shells of band x windowed mean of the gains; [N, N, N], 0 beyond the windows."""
    box = fourier_ZYX.shape[0]
    shells_ZYX = shells_of_half_volume(box, fourier_ZYX.device)
    total = torch.zeros([box] * 3, dtype=torch.float64, device=fourier_ZYX.device)
    for shell in range(gain_PS.shape[1]):
        if gain_PS[:, shell].any():
            band = torch.where(shells_ZYX == shell, fourier_ZYX, torch.zeros_like(fourier_ZYX))
            total += torch.fft.irfftn(band, s=(box, box, box), norm="forward") * weigh(gain_PS[:, shell])
        if progress is not None:
            progress(1)
    return total


def local_resolution(
    half1_ZYX: Tensor,
    half2_ZYX: Tensor,
    pixel_size: float,
    options: LocalOptions,
    seed: int = 0,
    mtf: Mtf | None = None,
    progress: Progress | None = None,
) -> LocalResolution:
    """Local resolution map and locally filtered mean of two half-maps [N, N, N] (any device); see the module's text."""
    box = half1_ZYX.shape[0]
    window, _ = window_of(options, pixel_size)
    centre_P3, fsc_PS = local_curves(half1_ZYX, half2_ZYX, pixel_size, options, seed, progress=progress)
    fsc_PS = fsc_PS.cpu()
    shells = torch.tensor([last_good_shell(curve) for curve in fsc_PS], dtype=torch.float64)
    resolution_P = (box * pixel_size / shells.clamp_min(1)).clamp_max(options.lowest_resolution)
    weigh = WindowSum(box, centre_P3, window, half1_ZYX.device)
    covered = weigh(torch.ones_like(resolution_P))
    inside = covered > 1e-6
    mean = covered.clamp_min(1e-6)
    frequency_ZYX = weigh(1 / resolution_P) / mean
    fourier_ZYX = half_transform(0.5 * (half1_ZYX.double() + half2_ZYX.double()))
    if mtf is not None:
        fourier_ZYX = divide_by_mtf(fourier_ZYX, pixel_size, mtf)
    fourier_ZYX = apply_bfactor(fourier_ZYX, pixel_size, options.bfactor)
    gain_PS = shell_gains(fsc_PS, resolution_P, box * pixel_size)
    filtered_ZYX = filter_locally(fourier_ZYX, gain_PS, weigh, progress) / mean
    zero = torch.zeros_like(mean)
    resolution_ZYX = torch.where(inside, 1 / frequency_ZYX.clamp_min(1e-9), zero)
    return LocalResolution(resolution_ZYX, torch.where(inside, filtered_ZYX, zero), centre_P3, fsc_PS, resolution_P)
