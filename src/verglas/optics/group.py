"""What all particles of one optics group share: microscope, pixel size, box, aberrations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Matrix2 = tuple[tuple[float, float], tuple[float, float]]
IDENTITY: Matrix2 = ((1.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class OpticsGroup:
    """One row of RELION's data_optics table.

    number: 1-based, as in the file; pixel_size, original_pixel_size: Å (the second is the detector's, for the MTF);
    box: px; even_zernike, odd_zernike: radians, polynomials in frequencies of 1/Å (verglas.optics.aberrations);
    magnification: acts on frequencies (x, y) before anything else; ctf_premultiplied: the images are already
    multiplied by their CTF; ctf_corrected: the images need no CTF at all.
    """

    name: str
    number: int
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float
    pixel_size: float
    box: int
    even_zernike: tuple[float, ...] = ()
    odd_zernike: tuple[float, ...] = ()
    beam_tilt_mrad: tuple[float, float] = (0.0, 0.0)
    magnification: Matrix2 = IDENTITY
    ctf_premultiplied: bool = False
    ctf_corrected: bool = False
    mtf_file: str | None = None
    original_pixel_size: float | None = None

    @cached_property
    def wavelength_angstrom(self) -> float:
        """Relativistic electron wavelength in Å: 0.0197 at 300 kV (Reimer & Kohl, Transmission Electron Microscopy, 2.1)."""
        volts = 1e3 * self.voltage_kv
        return 12.2643247 / math.sqrt(volts * (1 + 0.978466e-6 * volts))

    @property
    def cs_angstrom(self) -> float:
        return 1e7 * self.cs_mm

    def magnified(self, frequency_K2: Tensor) -> Tensor:
        """Frequencies (x, y) after the magnification matrix, same unit."""
        if self.magnification == IDENTITY:
            return frequency_K2
        return frequency_K2 @ torch.tensor(self.magnification, dtype=frequency_K2.dtype, device=frequency_K2.device).T

    def model_coordinates_K3(self, frequency_K2: Tensor, model_box: int, model_pixel_size: float) -> Tensor:
        """Where frequencies (1/Å) of this group's images lie in the transform of a model, in its integer frequencies.

        Sampling the model at A^T times these undoes anisotropic magnification and differences in pixel size and box.
        """
        xy_K2 = self.magnified(frequency_K2) * (model_box * model_pixel_size)
        return torch.nn.functional.pad(xy_K2, (0, 1))
