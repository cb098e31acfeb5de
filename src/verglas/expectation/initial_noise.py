"""Noise spectra before the first iteration, from the images alone (RELION facts 2.2).

sigma2(s) = mean power of the masked images / 2 - power of their average / 2, in shell s: what does not average out is noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import signed_frequencies
from verglas.core.masks import fill_outside, soft_circle
from verglas.errors import InputError
from verglas.particles.loader import ImageBatch
from verglas.particles.preprocess import resample
from verglas.particles.table import ParticleTable

ROUNDING = 1e-6  # of the power: a smaller difference between mean power and power of the mean is float32 rounding


@dataclass(frozen=True)
class InitialNoise:
    """sigma2_noise_GS: float64, variance per real or imaginary component of forward-normalised transforms, by shell of
    the model and in its unit (transforms of images of another field times the ratio of the areas); mean_image_YX: float64,
    average of the masked images on the model's grid.
    """

    sigma2_noise_GS: Tensor
    mean_image_YX: Tensor


@dataclass
class _Sums:
    """Sums over images of one geometry (box, pixel size). power_GYX: |F|^2 by group; image_YX: the images themselves."""

    image_YX: Tensor
    power_GYX: dict[int, Tensor] = field(default_factory=dict)
    count_G: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.count_G.values())

    @property
    def box(self) -> int:
        return self.image_YX.shape[-1]


def first_rows(table: ParticleTable, per_group: int = 1000) -> np.ndarray:
    """Rows of the first `per_group` particles of each optics group, sorted by micrograph (RELION's order), int64.

    Hand them to `Dataset.batches`, or to an `ImageLoader` as its indices.
    """
    order_B = np.arange(len(table))
    if "rlnMicrographName" in table.frame.columns:
        order_B = np.argsort(table.frame["rlnMicrographName"].to_numpy(str), kind="stable")
    group_B = table.group_index_B[order_B]
    chosen = [order_B[group_B == group][:per_group] for group in range(len(table.groups))]
    return np.concatenate(chosen).astype(np.int64)


def initial_noise(
    batches: Iterable[ImageBatch], n_groups: int, box: int, pixel_size: float, diameter: float, mask_edge: float = 5.0
) -> InitialNoise:
    """Noise spectrum of each optics group from all images of `batches`; see `first_rows` for which ones to read.

    box (px), pixel_size (Å): of the model, whose shells the spectra are given for; diameter: of the particle, Å;
    mask_edge: px. A group without images gets zeros. Raises InputError if there is no image, the circle does not fit,
    or no noise is left (all images are the same).
    """
    sums: dict[tuple[int, float], _Sums] = {}
    for batch in batches:
        group = batch.group
        radius = _radius(diameter, batch)
        size = batch.image_BYX.shape[-1]
        image_BYX = fill_outside(batch.image_BYX, soft_circle(size, radius, mask_edge, batch.image_BYX.device))
        one = sums.setdefault((size, group.pixel_size), _Sums(image_BYX.new_zeros(size, size, dtype=torch.float64)))
        _add(one, batch.group_index, image_BYX)
    if not sums:
        raise InputError("the particles", "no image to estimate the noise from", "at least two images")
    sigma2_GS = torch.zeros(n_groups, box // 2 + 1, dtype=torch.float64)
    for (size, own_pixel), one in sums.items():
        scale = (box * pixel_size) / (size * own_pixel)
        shells = _ModelShells(size, scale, box // 2 + 1)
        average_S = shells.mean(torch.fft.rfft2(one.image_YX / one.count, norm="forward").abs().square())
        for index, power_YX in one.power_GYX.items():
            power_S = shells.mean(power_YX / one.count_G[index])
            noise_S = torch.where(power_S - average_S > ROUNDING * power_S, power_S - average_S, 0)
            sigma2_GS[index] = positive(noise_S) / 2 / scale**4
    return InitialNoise(sigma2_GS, _mean_image(sums, box, pixel_size))


def positive(spectrum_S: Tensor) -> Tensor:
    """The spectrum with each value that is not above 0 replaced by the one before it (at the start: the next above 0).

    Raises InputError if no value is above 0.
    """
    good = (spectrum_S > 0).nonzero().flatten()
    if len(good) == 0:
        raise InputError("the noise spectrum", "no shell with power that does not average out", "images that differ",
                         "Check that the stack does not hold one image many times.")  # fmt: skip
    last_good_S = torch.searchsorted(good, torch.arange(len(spectrum_S), device=good.device), right=True) - 1
    return spectrum_S[good[last_good_S.clamp_min(0)]]


def _radius(diameter: float, batch: ImageBatch) -> float:
    """Radius of the particle in the batch's pixels."""
    size, group = batch.image_BYX.shape[-1], batch.group
    radius = diameter / (2 * group.pixel_size)
    if not 0 < radius <= size / 2:
        raise InputError("--diameter", f"{diameter:g} Å", f"at most {size * group.pixel_size:g} Å, the box of '{group.name}'")
    return radius


def _add(one: _Sums, index: int, image_BYX: Tensor) -> None:
    """Add masked images of optics group `index` to the sums of their geometry."""
    power_YX = torch.fft.rfft2(image_BYX, norm="forward").abs().square().sum(0, dtype=torch.float64)
    one.power_GYX[index] = one.power_GYX.get(index, 0) + power_YX
    one.count_G[index] = one.count_G.get(index, 0) + len(image_BYX)
    one.image_YX += image_BYX.sum(0, dtype=torch.float64)


class _ModelShells:
    """Radial means over a whole half transform (x = 0 counted twice, as RELION does), by shell of the model.

    scale: width of the model's box in Å over that of the images: shell i of the images is shell round(scale i) there.
    """

    def __init__(self, size: int, scale: float, n_shells: int) -> None:
        y, x = signed_frequencies(size)[:, None], torch.arange(size // 2 + 1)
        own_YX = (y * y + x * x).double().sqrt().add(0.5).floor()
        self.shell_P = (own_YX * scale + 0.5).floor().long().flatten()
        self.keep_P = (self.shell_P < n_shells) & (own_YX.flatten() <= size // 2)
        self.n_shells = n_shells

    def mean(self, values_YX: Tensor) -> Tensor:
        """Mean of each shell, float64 on the CPU; empty shells are interpolated, those beyond the last repeat it."""
        shell_P, values_P = self.shell_P[self.keep_P], values_YX.double().flatten().cpu()[self.keep_P]
        count_S = torch.bincount(shell_P, minlength=self.n_shells).double()
        mean_S = torch.bincount(shell_P, values_P, self.n_shells) / count_S.clamp_min(1)
        known = count_S.nonzero().flatten().numpy()
        return torch.from_numpy(np.interp(np.arange(self.n_shells), known, mean_S.numpy()[known]))


def _mean_image(sums: dict[tuple[int, float], _Sums], box: int, pixel_size: float) -> Tensor:
    """Average of all images, each geometry resampled to the model's pixels and cut or padded to its box."""
    total_YX = torch.zeros(box, box, dtype=torch.float64)
    for (size, own_pixel), one in sums.items():
        # An even size at the model's pixel size; the rest is a difference of less than two pixels in the field.
        resized = 2 * round(size * own_pixel / pixel_size / 2)
        image_YX = one.image_YX if resized == size else resample(one.image_YX[None], resized)[0]
        half = min(resized, box) // 2
        inner, own = slice(box // 2 - half, box // 2 + half), slice(resized // 2 - half, resized // 2 + half)
        total_YX[inner, inner] += image_YX.cpu()[own, own]
    return total_YX / sum(one.count for one in sums.values())
