"""Fourier conventions of verglas, fixed once (docs/conventions.md).

Letters at the end of a name are its axes: B particles, K kept Fourier coefficients, Y X image, Z Y X volume, S shells.

* The forward transform carries 1/n (n = number of real-space elements); the inverse carries no factor. Unit-variance
  white noise of an N x N image therefore has <|F|^2> = 1/N^2, the unit of every spectrum that verglas writes.
* Phases refer to the centre, pixel N/2 of every axis (N even).
* The half plane keeps x >= 0 (last axis, 0..N/2); on x = 0 the rows y < 0 repeat their partners and are left out, so
  every coefficient counts once. The Nyquist column x = N/2 belongs to the stored half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from verglas.core.ordering import morton_order


def centred_rfft2(image_BYX: Tensor) -> Tensor:
    """Transform of images about their centre pixel; [..., Y, X] real -> [..., Y, X/2+1] complex, forward 1/N^2."""
    fourier = torch.fft.rfft2(image_BYX, norm="forward")
    return fourier.mul_(checkerboard(image_BYX.shape[-2:], fourier.device, fourier.real.dtype))


def centred_irfft2(fourier_BYX: Tensor, box: int) -> Tensor:
    """Inverse of `centred_rfft2`: [..., Y, X/2+1] complex -> [..., Y, X] real."""
    signs = checkerboard((box, box), fourier_BYX.device, fourier_BYX.real.dtype)
    return torch.fft.irfft2(fourier_BYX * signs, s=(box, box), norm="forward")


def centred_rfft3(map_ZYX: Tensor) -> Tensor:
    """Transform of a map about its centre voxel, forward 1/N^3; [Z, Y, X] real -> [Z, Y, X/2+1] complex."""
    fourier = torch.fft.rfftn(map_ZYX, norm="forward")
    return fourier.mul_(checkerboard(map_ZYX.shape, fourier.device, fourier.real.dtype))


def centred_irfft3(fourier_ZYX: Tensor, box: int) -> Tensor:
    """Inverse of `centred_rfft3`: [Z, Y, X/2+1] complex -> [Z, Y, X] real."""
    signs = checkerboard((box, box, box), fourier_ZYX.device, fourier_ZYX.real.dtype)
    return torch.fft.irfftn(fourier_ZYX * signs, s=(box, box, box), norm="forward")


def checkerboard(shape: tuple[int, ...] | torch.Size, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """(-1)^(sum of indices) on the stored half of a real transform of `shape`: a shift of the origin by N/2, N even."""
    return _checkerboard(tuple(shape), str(device), dtype)


@lru_cache(maxsize=8)
def _checkerboard(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    half_shape = (*shape[:-1], shape[-1] // 2 + 1)
    parity = torch.zeros(half_shape, dtype=torch.int8, device=device)
    for axis, length in enumerate(half_shape):
        view = [1] * len(half_shape)
        view[axis] = length
        parity = parity ^ (torch.arange(length, device=device) % 2).to(torch.int8).view(view)
    return 1 - 2 * parity.to(dtype)


def signed_frequencies(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Integer frequency of each index of a full axis in FFT order: 0..N/2, -(N/2-1)..-1 (Nyquist counted positive)."""
    index = torch.arange(length, device=device)
    return torch.where(index <= length // 2, index, index - length)


@dataclass(frozen=True)
class PixelList:
    """The kept Fourier half plane of one image geometry as run-time data; every coefficient once, DC included.

    x_K, y_K: integer frequencies (int32); index_K: flat position in the [box, box/2+1] transform (int64);
    shell_K: round(sqrt(x^2 + y^2)) (int64); radius: largest frequency kept.
    """

    box: int
    radius: int
    x_K: Tensor
    y_K: Tensor
    index_K: Tensor
    shell_K: Tensor

    @property
    def count(self) -> int:
        return len(self.x_K)

    @property
    def device(self) -> torch.device:
        return self.x_K.device

    def coordinates_K3(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Integer frequencies as 3-vectors (x, y, 0): what `project` samples at; Ewald curvature would set z."""
        return torch.stack([self.x_K, self.y_K, torch.zeros_like(self.x_K)], -1).to(dtype)

    def frequency_K2(self, pixel_size: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Frequencies (x, y) in 1/Å of a box of `pixel_size` Å."""
        return torch.stack([self.x_K, self.y_K], -1).to(dtype) / (self.box * pixel_size)

    def to(self, device: torch.device | str) -> PixelList:
        """The same list on another device."""
        moved = [getattr(self, name).to(device) for name in ("x_K", "y_K", "index_K", "shell_K")]
        return PixelList(self.box, self.radius, *moved)

    def gather(self, fourier_BYX: Tensor) -> Tensor:
        """[..., box, box/2+1] -> [..., K]."""
        return fourier_BYX.flatten(-2)[..., self.index_K]

    def scatter(self, values_BK: Tensor) -> Tensor:
        """[..., K] -> [..., box, box/2+1]; the partners on x = 0 are filled in, everything else is zero."""
        out = values_BK.new_zeros(*values_BK.shape[:-1], self.box * (self.box // 2 + 1))
        out[..., self.index_K] = values_BK
        out = out.unflatten(-1, (self.box, self.box // 2 + 1))
        half = self.box // 2
        out[..., half + 1 :, 0] = out[..., 1:half, 0].flip(-1).conj()
        return out


def half_plane_pixels(
    box: int, radius: int | None = None, device: torch.device | str = "cpu", order: str | None = None
) -> PixelList:
    """Pixels of a `box` px image with r <= `radius` (default box/2); as in RELION, y = -N/2 counts as +N/2.

    order: "rows" (y from 0 up, then < 0) or "morton" (compact patches, what GPU kernels want); default by device.
    """
    if box % 2:
        raise ValueError(f"box must be even, got {box}")
    radius = box // 2 if radius is None else min(radius, box // 2)
    y = signed_frequencies(box)[:, None].expand(box, box // 2 + 1)
    x = torch.arange(box // 2 + 1)[None, :].expand(box, box // 2 + 1)
    keep = (x * x + y * y <= radius * radius) & ~((x == 0) & (y < 0))
    index = keep.flatten().nonzero().squeeze(1)
    x, y = x.flatten()[index], y.flatten()[index]
    if (order or ("morton" if torch.device(device).type == "cuda" else "rows")) == "morton":
        curve = morton_order(x, y)
        x, y, index = x[curve], y[curve], index[curve]
    shell = (x.double() ** 2 + y.double() ** 2).sqrt().add(0.5).floor().long()
    return PixelList(box, radius, x.int(), y.int(), index, shell).to(device)


def nested_pixels(pixels: PixelList, inner_radius: float, multiple: int = 1) -> tuple[PixelList, int, Tensor]:
    """The same pixels with those of r <= `inner_radius` first; how many come first; which are real, bool [K].

    A coarse comparison then reads the first part of every row. multiple: both counts are rounded up to multiples of it by
    repeats of the origin, which must not count (rows of aligned length are what GPUs read fast).
    """
    inside_K = pixels.x_K.double() ** 2 + pixels.y_K.double() ** 2 <= inner_radius**2
    origin = ((pixels.x_K == 0) & (pixels.y_K == 0)).nonzero()[0]
    runs, real = [], []
    for run in (inside_K.nonzero().squeeze(1), (~inside_K).nonzero().squeeze(1)):
        fill = -len(run) % multiple
        runs += [run, origin.expand(fill)]
        real += [torch.ones_like(run, dtype=torch.bool), torch.zeros(fill, dtype=torch.bool, device=run.device)]
    order = torch.cat(runs)
    parts = [getattr(pixels, name)[order] for name in ("x_K", "y_K", "index_K", "shell_K")]
    return PixelList(pixels.box, pixels.radius, *parts), len(runs[0]) + len(runs[1]), torch.cat(real)


def shells_of_half_volume(box: int, device: torch.device | str = "cpu") -> Tensor:
    """round(r) of every voxel of a [N, N, N/2+1] transform, int64."""
    f = signed_frequencies(box, device).float()
    r2 = f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None, : box // 2 + 1] ** 2
    return r2.sqrt_().add_(0.5).floor_().long()


def crop_half_plane(fourier_BYX: Tensor, box: int) -> Tensor:
    """Fourier crop (or zero-pad) a centred 2-D half transform to `box`; amplitudes per coefficient are unchanged."""
    old = fourier_BYX.shape[-2]
    half = min(old, box) // 2
    out = fourier_BYX.new_zeros(*fourier_BYX.shape[:-2], box, box // 2 + 1)
    out[..., :half, : half + 1] = fourier_BYX[..., :half, : half + 1]
    out[..., box - half :, : half + 1] = fourier_BYX[..., old - half :, : half + 1]
    return out


def fourier_resize(map_ZYX: Tensor, box: int) -> Tensor:
    """The same volume on `box` px per side by cropping or padding its transform; densities are kept."""
    return centred_irfft3(crop_half_volume(centred_rfft3(map_ZYX), box), box)


def crop_half_volume(fourier_ZYX: Tensor, box: int) -> Tensor:
    """Fourier crop (or zero-pad) a centred 3-D half transform to `box`; amplitudes per coefficient are unchanged."""
    old = fourier_ZYX.shape[0]
    half = min(old, box) // 2
    out = fourier_ZYX.new_zeros(box, box, box // 2 + 1)
    parts = ((slice(0, half), slice(0, half)), (slice(box - half, box), slice(old - half, old)))
    for z_new, z_old in parts:
        for y_new, y_old in parts:
            out[z_new, y_new, : half + 1] = fourier_ZYX[z_old, y_old, : half + 1]
    return out
