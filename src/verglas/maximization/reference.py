"""References: brought to the particles' grid, filtered, masked, judged.

Maps are [Z, Y, X], float32, centre voxel N/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft3, centred_rfft3, fourier_resize, shells_of_half_volume
from verglas.core.masks import low_pass_filter, radius_grid, raised_cosine, soft_sphere
from verglas.core.symmetry import symmetry_matrices
from verglas.errors import InputError
from verglas.io.mrc import Map
from verglas.projection.volume import FourierVolume, coordinate_chunks, radius2

FILTER_WIDTH = 2.0  # shells, of the initial low pass's edge
SAME_GRID = 0.05  # px: voxel sizes count as equal if they move the box's edge by less
_JUDGED_BOX = 48  # px to which maps are reduced to be compared with their turned copies


def initial_reference(
    map: Map, box: int, pixel_size: float, initial_resolution: float, where: str = "--reference"
) -> tuple[Tensor, list[str]]:
    """The starting reference on the particles' grid (box px, pixel_size Å), low-passed, and notices for the user.

    Another pixel size is resampled (exactly, band-limited), another box cropped or padded with 0 about the centre.
    Raises InputError (naming `where`) for values or sizes that cannot be meant.
    """
    _check_map(map, where)
    if initial_resolution > box * pixel_size:
        raise InputError("--initial-resolution", f"{initial_resolution:g} Å",
                         f"less than the width of the particles' box, {box * pixel_size:.0f} Å")  # fmt: skip
    notices = []
    volume_ZYX = torch.tensor(map.data_ZYX).double()
    if not same_pixel_size(map.pixel_size, pixel_size, box):
        notices.append(
            f"The reference has voxels of {map.pixel_size:.4g} Å; it was resampled to the particles' {pixel_size:.4g} Å."
        )
        volume_ZYX = resample(volume_ZYX, map.pixel_size, box, pixel_size)
    elif map.box != box:
        volume_ZYX = window(volume_ZYX, box)
    field, wanted = map.box * map.pixel_size, box * pixel_size
    if abs(field - wanted) > SAME_GRID * pixel_size:
        notices.append(_field_notice(map, volume_ZYX, box, pixel_size))
    if float(volume_ZYX.std()) == 0:
        raise InputError(where, f"nothing of it lies within the particles' box of {wanted:.0f} Å", "a centred reference")
    return low_pass(volume_ZYX, initial_resolution, pixel_size).float(), notices


def same_pixel_size(a: float, b: float, box: int) -> bool:
    """Whether two voxel sizes (Å) agree as far as a box of `box` px can tell."""
    return abs(a / b - 1) * box / 2 < SAME_GRID


def resample(map_ZYX: Tensor, pixel_size: float, box: int, new_pixel_size: float) -> Tensor:
    """The band-limited function that a map stands for, at another pixel size (Å) and box, about the same centre.

    Exact for any ratio: each axis is multiplied by the matrix of its discrete Fourier sum, frequencies beyond either
    grid's Nyquist left out (what cropping or padding the transform does where the ratio allows it). 0 outside the map.
    """
    old = map_ZYX.shape[0]
    device = map_ZYX.device
    target = (torch.arange(box, dtype=torch.float64, device=device) - box // 2) * (new_pixel_size / pixel_size)
    source = torch.arange(old, dtype=torch.float64, device=device) - old // 2
    highest = min(old / 2, old * pixel_size / (2 * new_pixel_size)) - 1e-9
    k = torch.arange(1, math.ceil(highest), dtype=torch.float64, device=device)
    turn = 2 * math.pi / old * k[:, None]
    matrix = 1 + 2 * (
        torch.cos(turn * target).T @ torch.cos(turn * source) + torch.sin(turn * target).T @ torch.sin(turn * source)
    )
    matrix *= ((target >= source[0]) & (target <= source[-1]))[:, None] / old
    values = map_ZYX.double()
    for _ in range(3):
        values = torch.tensordot(values, matrix, dims=([0], [1]))  # the axis worked on goes last: thrice is the old order
    return values.to(map_ZYX.dtype)


def window(map_ZYX: Tensor, box: int) -> Tensor:
    """Crop or pad (with 0) every axis to `box` px about the centre voxel."""
    before = box // 2 - map_ZYX.shape[0] // 2
    return torch.nn.functional.pad(map_ZYX, [before, box - map_ZYX.shape[0] - before] * 3)


def low_pass(map_ZYX: Tensor, resolution: float, pixel_size: float) -> Tensor:
    """Raised cosine of two shells' width through 0.5 at `resolution` (Å), not rounded to a shell (facts 2.3)."""
    box = map_ZYX.shape[0]
    axis = torch.fft.fftfreq(box, 1 / box, device=map_ZYX.device)
    r2 = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[: box // 2 + 1].abs() ** 2
    passed = low_pass_filter(r2.sqrt(), box * pixel_size / resolution, FILTER_WIDTH)
    return centred_irfft3(centred_rfft3(map_ZYX) * passed.to(map_ZYX.dtype), box)


def flatten(map_ZYX: Tensor, radius_px: float, edge_px: float, mask_ZYX: Tensor | None = None) -> Tensor:
    """The map times a mask, or times a sphere with a raised-cosine edge outside its radius: solvent becomes 0 (facts 4.7)."""
    mask = soft_sphere(map_ZYX.shape[0], radius_px, edge_px, map_ZYX.device) if mask_ZYX is None else mask_ZYX
    return map_ZYX * mask.to(map_ZYX)


def reference_spectrum(map_ZYX: Tensor, padding: float, radius: int) -> Tensor:
    """Power per shell and component of the padded reference (facts 1.5), float64 [N/2 + 1], 0 beyond `radius`."""
    return volume_spectrum(FourierVolume.from_map(map_ZYX, radius, padding))


def volume_spectrum(volume: FourierVolume) -> Tensor:
    """`reference_spectrum` of a transform that is there already: mean of |V|^2 / 2 over shells round(r / padding)."""
    values_V2 = volume.values
    total = torch.zeros(volume.box // 2 + 1, dtype=torch.float64, device=values_V2.device)
    count = torch.zeros_like(total)
    for part, coordinates in coordinate_chunks(volume.rows):
        r2 = radius2(coordinates)
        inside = r2 <= volume.rows.radius**2
        shell = (r2.sqrt() / volume.padding + 0.5).long().clamp_max(len(total) - 1)
        power = values_V2[part].double().square().sum(1) / 2
        total += torch.bincount(shell, torch.where(inside, power, 0), len(total))
        count += torch.bincount(shell, inside.double(), len(total))
    return total / count.clamp_min(1)


def initial_ssnr(map_ZYX: Tensor, sigma2_noise_GS: Tensor, particles: float, tau2_fudge: float = 1.0) -> tuple[Tensor, Tensor]:
    """(tau2_S, ssnr_S) before anything is reconstructed, [N/2 + 1] float64, from the reference and the noise (facts 2.4).

    sigma2_noise_GS: per optics group; groups without any noise estimate are left out. `particles`: how many will be used.
    """
    box = map_ZYX.shape[0]
    shells = shells_of_half_volume(box, map_ZYX.device).flatten()
    power = centred_rfft3(map_ZYX.double()).abs().square().flatten()
    mean_S = (torch.bincount(shells, power) / torch.bincount(shells))[: box // 2 + 1]
    tau2_S = tau2_fudge * box**2 * mean_S / 2
    noise_S = sigma2_noise_GS[sigma2_noise_GS.sum(1) > 0].mean(0).to(tau2_S)
    slices_per_voxel = particles / (2 * torch.arange(box // 2 + 1, device=tau2_S.device)).clamp_min(1)
    return tau2_S, torch.where(noise_S > 0, slices_per_voxel * tau2_S / noise_S, 0)


def check_mask(mask: Map, box: int, pixel_size: float, where: str = "--mask") -> Tensor:
    """The mask as a tensor [N, N, N] within [0, 1]; InputError if it cannot serve as one for these particles."""
    values = torch.tensor(mask.data_ZYX).float()
    make = "Make one with `verglas mask` from a map of the particles' box and pixel size."
    if tuple(values.shape) != (box,) * 3:
        raise InputError(
            where, f"a box of {' x '.join(map_size(values))} voxels", f"{box} x {box} x {box}, the particles' box", make
        )
    if not same_pixel_size(mask.pixel_size, pixel_size, box):
        raise InputError(where, f"voxels of {mask.pixel_size:.4g} Å", f"the particles' {pixel_size:.4g} Å", make)
    low, high = float(values.min()), float(values.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN is caught here, too
        raise InputError(where, f"values from {low:.4g} to {high:.4g}", "values from 0 (solvent) to 1 (particle)", make)
    if not bool((values > 0.5).any()):
        raise InputError(where, f"empty: no voxel is above 0.5 (largest: {high:.4g})", "a region of ones", make)
    return values.clamp(0, 1)


def map_size(values_ZYX: Tensor) -> list[str]:
    """Sizes along x, y, z as words."""
    return [str(n) for n in reversed(values_ZYX.shape)]


def symmetry_correlation(map_ZYX: Tensor, symmetry: str) -> float:
    """Correlation of a map with its copies turned by the point group, within the inscribed sphere; the lowest of them.

    1 for a map that has the symmetry (about 0.99 after interpolation); judged at no more than 48 px a side.
    """
    box = min(map_ZYX.shape[0], _JUDGED_BOX)
    small = fourier_resize(map_ZYX.float(), box)
    soft = raised_cosine(radius_grid(box, 3, small.device), 0.42 * box, 0.08 * box)
    axis = torch.arange(box, device=small.device, dtype=torch.float32) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    position_P3 = torch.stack([x, y, z], -1)[soft > 0]
    weight_P, value_P = soft[soft > 0], small[soft > 0]
    lowest = 1.0
    for operator in symmetry_matrices(symmetry)[1:]:
        grid = (position_P3 @ operator.T.to(position_P3) + box // 2) * (2 / (box - 1)) - 1
        turned_P = torch.nn.functional.grid_sample(small[None, None], grid[None, None, None], align_corners=True).flatten()
        lowest = min(lowest, _correlation(value_P, turned_P, weight_P))
    return lowest


def _correlation(a: Tensor, b: Tensor, weight: Tensor) -> float:
    a, b, weight = a.double(), b.double(), weight.double()
    a, b = a - (a * weight).sum() / weight.sum(), b - (b * weight).sum() / weight.sum()
    norm = ((a * a * weight).sum() * (b * b * weight).sum()).sqrt()
    return float((a * b * weight).sum() / norm.clamp_min(1e-300))


def _check_map(map: Map, where: str) -> None:
    shape = map.data_ZYX.shape
    if len(set(shape)) != 1 or shape[0] % 2:
        raise InputError(where, f"a box of {' x '.join(str(n) for n in reversed(shape))} voxels", "an even cube",
                         "Pad or crop it with `verglas map --box`.")  # fmt: skip
    if not (map.pixel_size > 0 and math.isfinite(map.pixel_size)):
        raise InputError(where, f"voxel size {map.pixel_size:g} Å", "a size above 0",
                         "Put it right with `verglas map --pixel`.")  # fmt: skip
    volume = torch.tensor(map.data_ZYX)
    if not bool(volume.isfinite().all()):
        raise InputError(where, f"{int((~volume.isfinite()).sum())} voxels are not finite numbers", "a map without NaN")
    if bool(volume.min() == volume.max()):
        raise InputError(where, f"every voxel holds {float(volume.min()):g}", "a map of the particle")


def _field_notice(map: Map, kept_ZYX: Tensor, box: int, pixel_size: float) -> str:
    """What cropping or padding did, with the share of the map's power that was cut off where it is noticeable."""
    if map.box * map.pixel_size < box * pixel_size:
        what, lost = "padded with 0", 0.0
    else:
        what = "cropped around its centre"
        whole = torch.tensor(map.data_ZYX).double().square().sum() * map.pixel_size**3
        lost = 1 - float(kept_ZYX.double().square().sum() * pixel_size**3 / whole)
    text = f"The reference has a box of {map.box} px ({map.box * map.pixel_size:.0f} Å); it was {what} to the particles' {box} px"
    text += f" ({box * pixel_size:.0f} Å)."
    if lost > 0.01:
        text += f" {100 * lost:.0f} % of its power lay outside: is it centred, and of the same particle?"
    return text
