"""What a ptychographic pattern is, as a physicist would write it: one pattern, one mode, one slice at a time, in float64.

Slow and differentiable by autograd; `model.py` is the same for batches, with gradients of its own, and is tested against this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fft import fft2, fftfreq, ifft2, ifftshift

from verglas.ptychography.scan import Geometry, Reconstruction


def moved(field_YX: Tensor, by_2: Tensor) -> Tensor:
    """A field moved by `by_2` (row, column) px, positive towards +, by the Fourier shift theorem (the window wraps around)."""
    row_Y = fftfreq(field_YX.shape[0], dtype=torch.float64)[:, None]
    column_X = fftfreq(field_YX.shape[1], dtype=torch.float64)[None, :]
    return ifft2(fft2(field_YX) * torch.exp(-2j * torch.pi * (row_Y * by_2[0] + column_X * by_2[1])))


def propagated(field_YX: Tensor, wavelength: float, distance: float, pixel_2: tuple[float, float]) -> Tensor:
    """A field after `distance` of free space (all in metres), by Fresnel's formula: exp(-i pi wavelength distance (u^2 + v^2)).

    The phase common to all pixels, exp(2 pi i distance / wavelength), is left out.
    """
    u_Y = fftfreq(field_YX.shape[0], pixel_2[0], dtype=torch.float64)[:, None]
    v_X = fftfreq(field_YX.shape[1], pixel_2[1], dtype=torch.float64)[None, :]
    return ifft2(fft2(field_YX) * torch.exp(-1j * torch.pi * wavelength * distance * (u_Y**2 + v_X**2)))


def pattern_reference(found: Reconstruction, geometry: Geometry, b: int) -> Tensor:
    """[Y, X] predicted counts of position b, in the order of the FFT in the far field (zero frequency first).

    The position is split into whole pixels, by which the object's window is chosen, and the fraction, at most half a pixel,
    by which the probe is moved. So the exit wave is moved, too: a far field does not see that; a near field is moved back.
    """
    rows, columns = found.probe_MYX.shape[1:]
    corner_2 = found.positions_B2[b].detach().round().long()
    fraction_2 = found.positions_B2[b] - corner_2
    pattern_YX = torch.zeros(rows, columns, dtype=torch.float64)
    for object_LYX in found.object_OLYX:
        for mode, probe_YX in enumerate(found.probe_MYX):
            if mode == 0 and found.eigen_KYX is not None and found.opr_BK is not None:
                for weight, eigen_YX in zip(found.opr_BK[b], found.eigen_KYX, strict=True):
                    probe_YX = probe_YX + weight * eigen_YX
            wave_YX = moved(probe_YX, fraction_2)
            for number, slice_YX in enumerate(object_LYX):
                y, x = int(corner_2[0]), int(corner_2[1])
                wave_YX = wave_YX * slice_YX[y : y + rows, x : x + columns]
                if number < len(object_LYX) - 1:
                    assert geometry.wavelength is not None and found.pixel is not None
                    wave_YX = propagated(wave_YX, geometry.wavelength, geometry.slice_distances[number], found.pixel)
            if geometry.kind == "far":
                wave_YX = fft2(wave_YX, norm="ortho")
            else:
                assert geometry.wavelength is not None and geometry.distance is not None and found.pixel is not None
                wave_YX = moved(propagated(wave_YX, geometry.wavelength, geometry.distance, found.pixel), -fraction_2)
            pattern_YX = pattern_YX + wave_YX.abs().square()
    n = geometry.binning
    binned_YX = pattern_YX.reshape(rows // n, n, columns // n, n).sum((1, 3))
    background_YX = ifftshift(found.background_YX) if geometry.kind == "far" else found.background_YX
    return found.scale_B[b] * binned_YX + background_YX


def loss_reference(found: Reconstruction, geometry: Geometry, counts_BYX: Tensor, mask_YX: Tensor, poisson: bool) -> Tensor:
    """Sum over positions and good pixels of (sqrt(I) - sqrt(n))^2, or of I - n ln I + n ln n - n; counts in the order of I."""
    total = torch.zeros((), dtype=torch.float64)
    for b, counts_YX in enumerate(counts_BYX):
        intensity_YX = pattern_reference(found, geometry, b)
        if poisson:
            term_YX = intensity_YX - counts_YX * intensity_YX.log() + torch.xlogy(counts_YX, counts_YX) - counts_YX
        else:
            term_YX = (intensity_YX.sqrt() - counts_YX.sqrt()).square()
        total = total + term_YX[mask_YX].sum()
    return total
