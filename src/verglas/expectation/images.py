"""From real-space images to what the expectation compares and the maximization adds (RELION facts 2.1).

Everything that belongs to a particle goes to the image's side: CTF C, noise sigma, group scale s, norm, aberrations. With
the common spectrum sigma_c (so that operands are of order one and fit half precision), the arrays of a particle are

    scored  = s C X sigma_c / sigma^2      X: masked image        weight = s^2 C^2 sigma_c^2 / sigma^2
    mapped  = s C X' sigma_c / sigma^2     X': unmasked image

and slices of the reference are divided by sigma_c. The origin (0, 0) does not count in scores but is kept in the map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from verglas.core.fourier import PixelList, half_plane_pixels, nested_pixels, signed_frequencies
from verglas.core.masks import fill_outside, soft_circle
from verglas.optics.aberrations import aberration_phase_K
from verglas.optics.ctf import CtfParameters, GroupCtf
from verglas.optics.group import OpticsGroup
from verglas.particles.preprocess import shift_whole_pixels

ALIGNED = 16  # coefficients: rows of half-precision numbers then start where 16-byte loads and stores may


@dataclass(frozen=True)
class ModelGrid:
    """The model's grid and what this iteration keeps of it. box: px; pixel_size: Å; radius, coarse_radius: shells;
    scored_radius: shells that count in scores, None for all that are kept."""

    box: int
    pixel_size: float
    radius: int
    coarse_radius: int
    padding: float = 2.0
    scored_radius: int | None = None

    @property
    def last_scored(self) -> int:
        return self.radius if self.scored_radius is None else min(self.scored_radius, self.radius)

    @property
    def shells(self) -> int:
        return self.box // 2 + 1


@dataclass(frozen=True)
class Prepared:
    """A batch ready to be compared; see the module's text. K: kept coefficients, those of the coarse disc first.

    scored_B2K, weight_BK: origin zero; mapped_B2K, mapped_weight_BK: with it. constant_B: 1/2 sum |X|^2 / sigma^2 over the
    scored disc; power_BS: sum |X|^2 of the masked image per model shell, half plane, all shells; finer_B: the same beyond
    the model's shells, in the image's own units. origin_B, seen_B: X and s C at the origin (0, 0), where a difference does
    not depend on the pose.
    """

    scored_B2K: Tensor
    weight_BK: Tensor
    mapped_B2K: Tensor
    mapped_weight_BK: Tensor
    constant_B: Tensor
    power_BS: Tensor
    finer_B: Tensor
    origin_B: Tensor
    seen_B: Tensor

    def __getitem__(self, part: slice) -> Prepared:
        return Prepared(*(getattr(self, name)[part] for name in self.__dataclass_fields__))

    def moved(self, shift_B2: Tensor, pixels: PixelList) -> Prepared:
        """The images moved by fractions of a pixel, each by its own: times exp(-2 pi i k.t / N). shift_B2: px."""
        shift_B2 = shift_B2.to(self.scored_B2K.dtype)
        angle_BK = (-2 * torch.pi / pixels.box) * (shift_B2[:, :1] * pixels.x_K + shift_B2[:, 1:] * pixels.y_K)
        turn_BK = torch.polar(torch.ones_like(angle_BK), angle_BK)
        scored_B2K, mapped_B2K = (
            torch.view_as_real(torch.complex(*image_B2K.unbind(1)) * turn_BK).movedim(-1, 1).contiguous()
            for image_B2K in (self.scored_B2K, self.mapped_B2K)
        )
        return replace(self, scored_B2K=scored_B2K, mapped_B2K=mapped_B2K)


class ImagePreparer:
    """Prepares batches of one optics group; its tables are not changed (`image_preparer`).

    coarse_count: how many coefficients belong to the coarse disc; shell_K: model shell of each coefficient;
    coordinates_K3: where they lie in the model, in its integer frequencies; common_K: sigma_c; detail: the last shell of what
    makes a particle look like one.
    """

    def __init__(
        self, group: OpticsGroup, grid: ModelGrid, diameter: float, mask_edge: float, device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        scale = group.box * group.pixel_size / (grid.box * grid.pixel_size)
        radius = min(group.box // 2, int(-(-grid.radius * scale // 1)))
        pixels = half_plane_pixels(group.box, radius, device)
        multiple = ALIGNED if torch.device(device).type == "cuda" else 1
        pixels, self.coarse_count, real_K = nested_pixels(pixels, grid.coarse_radius * scale, multiple)
        self.counts_K = real_K.to(dtype)  # 0 for repeats that fill the rows
        self.detail = detail_shell(grid.box * grid.pixel_size, diameter, grid.last_scored)
        self.group, self.grid, self.pixels, self.dtype, self.device = group, grid, pixels, dtype, torch.device(device)
        frequency_K2 = pixels.frequency_K2(group.pixel_size, torch.float64)
        coordinates = group.model_coordinates_K3(frequency_K2, grid.box, grid.pixel_size)
        self.coordinates_K3 = coordinates.to(dtype)
        self.shell_K = coordinates.norm(dim=-1).add(0.5).floor().long()
        self.ctf = None if group.ctf_corrected else GroupCtf.build(frequency_K2, group, dtype)
        odd_K = aberration_phase_K(frequency_K2, group)
        self.odd_K = None if odd_K is None else odd_K.to(self.device, dtype)
        # The forward transform's 1/N^2 would make images of a larger field weaker than the model's: undone by the areas.
        self.sign_K = scale**2 * (1 - 2 * ((pixels.x_K + pixels.y_K) % 2)).to(dtype)
        self.mask_YX = soft_circle(group.box, diameter / (2 * group.pixel_size), mask_edge, device).to(dtype)
        self.shell_YX, self.field = self._all_shells(scale), scale**2
        self.not_origin_K = ((pixels.x_K != 0) | (pixels.y_K != 0)).to(dtype)
        self.origin = int((self.not_origin_K == 0).nonzero()[0])
        self.scored_K = self.not_origin_K
        if grid.scored_radius is not None:
            self.scored_K = self.not_origin_K * (self.shell_K <= grid.last_scored)

    def _all_shells(self, scale: float) -> Tensor:
        """Model shell of every coefficient of a transform [Y, X/2+1]: `shells` for all beyond the model's, one more for
        repeats on x = 0 and the corners."""
        box, shells = self.group.box, self.grid.shells
        y, x = signed_frequencies(box, self.device)[:, None], torch.arange(box // 2 + 1, device=self.device)[None]
        image_shell = (x.double() ** 2 + y.double() ** 2).sqrt().add(0.5).floor()
        shell = (image_shell / scale).add(0.5).floor().long()
        outside = (image_shell > box // 2) | ((x == 0) & (y < 0))
        # RELION's transforms of `size` px hold the rows -size/2 + 1 .. size/2: the noise of the last shell is summed without
        # row -size/2. Followed, so that spectra agree; it lacks the few coefficients beyond the disc of that row.
        outside |= (y == -self.pixels.radius) & (shell == self.grid.radius)
        return torch.where(outside, shells + 1, shell.clamp_max(shells)).flatten()

    def __call__(
        self, image_BYX: Tensor, whole_shift_B2: Tensor, ctf: CtfParameters | None, gain_B: Tensor, scale_B: Tensor,
        spectra: NoiseSpectra,
    ) -> Prepared:  # fmt: skip
        """Images as they were read, whole-pixel shifts that centre them, CTFs, factors of the norm and of the group's scale."""
        image_BYX = image_BYX.to(self.device, self.dtype) * gain_B.to(self.device, self.dtype)[:, None, None]
        image_BYX = shift_whole_pixels(image_BYX, whole_shift_B2)
        mapped_BK = self._coefficients(torch.fft.rfft2(image_BYX, norm="forward"))
        fourier_BYX = torch.fft.rfft2(fill_outside(image_BYX, self.mask_YX), norm="forward")
        power_BS, finer_B = self._power(fourier_BYX)
        scored_BK = self._coefficients(fourier_BYX)
        scale_B1 = scale_B.to(self.device, self.dtype)[:, None]
        contrast_BK = self._contrast(ctf, len(image_BYX))
        seen_BK = self._seen(contrast_BK, scale_B1)
        added_BK = scale_B1 if self.group.ctf_premultiplied else seen_BK
        factor_K = (spectra.common_S / spectra.sigma2_S)[self.shell_K].to(self.dtype)
        weight_K = self._weight(spectra)
        shell_S = torch.arange(self.grid.shells, device=self.device)
        inverse_S = torch.where((shell_S > 0) & (shell_S <= self.grid.last_scored), 0.5 / spectra.sigma2_S, 0)
        return Prepared(
            _planes(scored_BK, seen_BK * (factor_K * self.scored_K)), seen_BK.square() * (weight_K * self.scored_K),
            _planes(mapped_BK, added_BK * (factor_K * self.counts_K)),
            (scale_B1 * contrast_BK).square() * (weight_K * self.counts_K), power_BS @ inverse_S, power_BS,
            finer_B, scored_BK[:, self.origin].real.double(), seen_BK[:, self.origin].double(),
        )  # fmt: skip

    def weights(self, ctf: CtfParameters | None, scale_B: Tensor, spectra: NoiseSpectra) -> Tensor:
        """`Prepared.weight_BK` of particles whose images nobody needs."""
        seen_BK = self._seen(self._contrast(ctf, len(scale_B)), scale_B.to(self.device, self.dtype)[:, None])
        return seen_BK.square() * (self._weight(spectra) * self.scored_K)

    def _seen(self, contrast_BK: Tensor, scale_B1: Tensor) -> Tensor:
        """What slices are multiplied with: premultiplied images hold C X, are compared with C^2 P, and C X is what the map's sums
        need."""
        return scale_B1 * (contrast_BK.square() if self.group.ctf_premultiplied else contrast_BK)

    def _weight(self, spectra: NoiseSpectra) -> Tensor:
        """sigma_c^2 / sigma^2 of each coefficient [K]."""
        return (spectra.common_S**2 / spectra.sigma2_S)[self.shell_K].to(self.dtype)

    def _coefficients(self, fourier_BYX: Tensor) -> Tensor:
        """Kept coefficients about the centre, without odd aberrations, complex [B, K]."""
        value_BK = self.pixels.gather(fourier_BYX) * self.sign_K
        if self.odd_K is not None:
            value_BK = value_BK * torch.polar(torch.ones_like(self.odd_K), -self.odd_K)
        return value_BK

    def _contrast(self, ctf: CtfParameters | None, n: int) -> Tensor:
        if ctf is None or self.ctf is None:
            return torch.ones(n, self.pixels.count, dtype=self.dtype, device=self.device)
        return self.ctf(ctf.to(self.device))

    def _power(self, fourier_BYX: Tensor) -> tuple[Tensor, Tensor]:
        """sum |X|^2 over the half plane, float64: per model shell [B, S], and beyond them in the image's own units [B]."""
        power_BP = (fourier_BYX.real.square() + fourier_BYX.imag.square()).flatten(1)
        sums = power_BP.new_zeros(len(power_BP), self.grid.shells + 2, dtype=torch.float64)
        sums.index_add_(1, self.shell_YX, power_BP.double())
        return sums[:, :-2] * self.field**2, sums[:, -2]


@lru_cache(maxsize=8)
def image_preparer(
    group: OpticsGroup, grid: ModelGrid, diameter: float, mask_edge: float, device: torch.device, dtype: torch.dtype
) -> ImagePreparer:
    """The same for both half-sets, and while sizes stay: its tables are made on the host, and a lattice is looked for in its
    coordinates."""
    return ImagePreparer(group, grid, diameter, mask_edge, device, dtype)


@dataclass(frozen=True)
class NoiseSpectra:
    """sigma2_S: noise of the optics group per component; common_S: sigma_c, what all groups are scaled by; float64 [S]."""

    sigma2_S: Tensor
    common_S: Tensor


def detail_shell(field: float, diameter: float, finest: int) -> int:
    """Shell of a tenth of the diameter, at most `finest`: domains differ there, and junk does not look like a particle.

    field: width of the box, Å, as the diameter.
    """
    return min(math.ceil(10 * field / diameter), finest)


def common_noise(sigma2_GS: Tensor) -> Tensor:
    """sigma_c [S]: root of the geometric mean over the optics groups of the noise variance."""
    return torch.exp(0.5 * torch.log(sigma2_GS.clamp_min(1e-30)).mean(0))


def _planes(value_BK: Tensor, factor_BK: Tensor) -> Tensor:
    """Complex [B, K] times real factors as real and imaginary planes [B, 2, K]."""
    out = torch.empty(len(value_BK), 2, value_BK.shape[1], dtype=factor_BK.dtype, device=value_BK.device)
    torch.mul(value_BK.real, factor_BK, out=out[:, 0])
    torch.mul(value_BK.imag, factor_BK, out=out[:, 1])
    return out
