"""From weighted images to class averages: sums of all classes, and the images solved from them (RELION facts 4.3, 4.6).

As `accumulate` and `halves.solve_single` do for maps, for all classes at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2, centred_rfft2, signed_frequencies
from verglas.core.masks import fill_outside, low_pass_filter, soft_circle
from verglas.distributed.ranks import Ranks
from verglas.kernels.backproject import backproject
from verglas.maximization.gather import WeightedSlices
from verglas.maximization.solve import FIRST_REGULARISED_SHELL, WEIGHT_FLOOR
from verglas.projection.planes import (
    padded_planes,
    plane_coordinates,
    plane_gridding_correction,
    plane_sampling,
    plane_table,
    voxel_places,
)
from verglas.projection.volume import padded_size

GATHERED_BYTES = 2e9  # sums of turned images that may be kept before they are turned


class PlaneAccumulator:
    """Weighted sums of images of C classes in padded half planes.

    There are few orientations (classes times angles), each of many particles: their images are summed as they are and turned
    into the planes once, when sums are asked for (or images of another geometry come). Where that would take more than
    `GATHERED_BYTES`, every batch is turned at once.
    """

    def __init__(
        self, box: int, classes: int, radius: int, padding: float, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.box, self.classes, self.radius = box, classes, min(radius, box // 2)
        self.size = padded_size(box, padding)
        self.padding = self.size / box
        self.rows = plane_table(self.radius, self.padding, classes, device)
        self.running_V4 = torch.zeros(self.rows.count, 4, dtype=dtype, device=device)
        self._gathered: _Gathered | None = None

    def add(self, slices: WeightedSlices, orientations: int) -> None:
        """Add weighted images; orientations: fine ones of all classes, which slices.index_U counts."""
        pixels = len(slices.coordinates_K3)
        if orientations * 3 * pixels * slices.data_U2K.element_size() > GATHERED_BYTES:
            self.turn(slices)
            return
        if self._gathered is None or self._gathered.coordinates_K3 is not slices.coordinates_K3:
            self._settle()
            self._gathered = _Gathered.empty(orientations, slices)
        self._gathered.add(slices)

    def totals(self) -> Tensor:
        """Sums so far, Friedel partners added: (re, im, weight) [3, C, P, P/2 + 1], float64."""
        self._settle()
        place_V, has_one_V = voxel_places(self.rows, self.size, self.classes)
        columns = self.size // 2 + 1
        total = torch.zeros(3, self.classes * self.size * columns, dtype=torch.float64, device=self.running_V4.device)
        for row in range(3):
            total[row].index_add_(0, place_V, self.running_V4[:, row].double() * has_one_V)
        total_3CYX = total.view(3, self.classes, self.size, columns)
        y = torch.arange(self.size, device=total.device)
        partner_3CY = total_3CYX[:, :, -y % self.size, 0].clone()  # (0, -y) is another word for (0, y)
        partner_3CY[1] *= -1
        total_3CYX[:, :, 1:, 0] += partner_3CY[:, :, 1:]
        return total_3CYX

    def packed(self) -> tuple[Tensor, int]:
        """(Sums so far [V, 3], 0: images are not counted), for `add_packed` of another process."""
        self._settle()
        return self.running_V4[:, :3].contiguous(), 0

    def add_packed(self, values_V3: Tensor, slices: int) -> None:
        """Add the sums that another process has added up, of the same geometry. slices: without effect."""
        self.running_V4[:, :3] += values_V3.to(self.running_V4)

    def begin_adding(self, ranks: Ranks) -> None:
        """Planes are few: nothing is begun before `add_up`."""

    def add_up(self, ranks: Ranks, share: bool = False) -> None:
        """Add the sums of all ranks, in place. share: without effect, planes are solved quickly."""
        if ranks.size > 1:
            self._settle()
            self.running_V4[:, :3] = ranks.add_up(self.running_V4[:, :3].contiguous(), "sums of slices")

    def _settle(self) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            self.turn(gathered.slices())

    def turn(self, slices: WeightedSlices) -> None:
        """Add weighted images to the planes of their classes at once."""
        lifted_K3, inside_K = plane_coordinates(slices.coordinates_K3, self.radius)
        sampling_U33 = plane_sampling(slices.rotation_U33, slices.class_U, self.padding).to(self.running_V4)
        data_U2K, weight_UK = slices.data_U2K * inside_K, slices.weight_UK * inside_K
        backproject(self.running_V4, self.rows, data_U2K, weight_UK, sampling_U33, lifted_K3)


@dataclass
class _Gathered:
    """Sums of images by fine orientation, not turned yet; which orientations were met."""

    sums: WeightedSlices
    met_U: Tensor

    @property
    def coordinates_K3(self) -> Tensor:
        return self.sums.coordinates_K3

    @classmethod
    def empty(cls, orientations: int, like: WeightedSlices) -> _Gathered:
        data, device = like.data_U2K, like.data_U2K.device
        sums = WeightedSlices(
            data.new_zeros(orientations, *data.shape[1:]), like.weight_UK.new_zeros(orientations, data.shape[2]),
            torch.zeros(orientations, 3, 3, dtype=torch.float64, device=device), like.coordinates_K3,
            torch.zeros(orientations, dtype=torch.int64, device=device), torch.arange(orientations, device=device),
        )  # fmt: skip
        return cls(sums, torch.zeros(orientations, dtype=torch.bool, device=device))

    def add(self, slices: WeightedSlices) -> None:
        index_U = slices.index_U.long()
        self.sums.data_U2K.index_add_(0, index_U, slices.data_U2K)
        self.sums.weight_UK.index_add_(0, index_U, slices.weight_UK)
        self.sums.rotation_U33[index_U] = slices.rotation_U33
        self.sums.class_U[index_U] = slices.class_U
        self.met_U[index_U] = True

    def slices(self) -> WeightedSlices:
        """The sums of the orientations that were met."""
        one = self.met_U.nonzero().squeeze(1)
        s = self.sums
        return WeightedSlices(
            s.data_U2K[one], s.weight_UK[one], s.rotation_U33[one], s.coordinates_K3, s.class_U[one], s.index_U[one]
        )  # fmt: skip


@dataclass(frozen=True)
class PlaneSolution:
    """Class averages, not masked yet, float32 [C, N, N], and their spectra [C, N/2 + 1], float64, as in `halves.Solution`."""

    image_CYX: Tensor
    tau2_CS: Tensor
    sigma2_CS: Tensor
    ssnr_CS: Tensor
    coverage_CS: Tensor


def solve_planes(
    sums: PlaneAccumulator, tau2_CS: Tensor | None, tau2_fudge: float = 1.0, total_3CYX: Tensor | None = None
) -> PlaneSolution:
    """Averages data / (weight + 1/tau2): tau2 the power of the references that were used (`plane_spectra`), None for no prior.

    As `solve.SolvedSums.map`: the prior counts from shell 5 on, the weight never under a thousandth of its shell's mean.
    Classes without weight come out as 0. total_3CYX: solved instead of the sums' own totals.
    """
    total_3CYX = sums.totals() if total_3CYX is None else total_3CYX
    weight_CYX = total_3CYX[2]
    shells = PlaneShells(sums.box, sums.size, sums.radius, weight_CYX.device)
    mean_CS = shells.mean(weight_CYX)
    area = sums.padding**2
    sigma2_CS = torch.where(mean_CS > 0, 1 / (area * mean_CS).clamp_min(1e-300), 0)
    tau2 = torch.full_like(sigma2_CS, torch.inf) if tau2_CS is None else tau2_CS.to(sigma2_CS)
    prior_CS = 1 / (area * tau2_fudge * tau2)  # infinite where no signal is expected: the average is 0 there
    coverage_CS = shells.mean((weight_CYX >= shells.spread(prior_CS)).double())
    regularised_S = torch.arange(prior_CS.shape[1], device=prior_CS.device) >= FIRST_REGULARISED_SHELL
    divisor_CYX = weight_CYX + shells.spread(torch.where(regularised_S, prior_CS, 0))
    divisor_CYX = torch.maximum(divisor_CYX, shells.spread(WEIGHT_FLOOR * mean_CS))
    scale_CYX = torch.where(shells.inside_YX & (divisor_CYX > 0), 1 / divisor_CYX.clamp_min(1e-300), 0)
    fourier_CYX = torch.complex(total_3CYX[0] * scale_CYX, total_3CYX[1] * scale_CYX)
    ssnr_CS = torch.where(sigma2_CS > 0, tau2_fudge * torch.where(tau2.isfinite(), tau2, 0) / sigma2_CS.clamp_min(1e-300), 0)
    return PlaneSolution(
        _images(fourier_CYX, sums.box, sums.padding).float(), torch.where(tau2.isfinite(), tau2, 0), sigma2_CS, ssnr_CS,
        coverage_CS,
    )  # fmt: skip


def plane_spectra(image_CYX: Tensor, padding: float) -> Tensor:
    """Power per shell and component of padded references, float64 [C, N/2 + 1]: the tau2 of `solve_planes`."""
    fourier_CYX, _ = padded_planes(image_CYX.double(), padding)
    box = image_CYX.shape[-1]
    shells = PlaneShells(box, fourier_CYX.shape[1], box // 2, image_CYX.device)
    return shells.mean(fourier_CYX.abs().square() / 2)


def low_pass_planes(image_CYX: Tensor, resolution: float, pixel_size: float) -> Tensor:
    """As `reference.low_pass`: a raised cosine of two shells' width through 0.5 at `resolution` (Å)."""
    box = image_CYX.shape[-1]
    y, x = signed_frequencies(box, image_CYX.device)[:, None].double(), torch.arange(box // 2 + 1, device=image_CYX.device)
    passed_YX = low_pass_filter((y * y + x * x).sqrt(), box * pixel_size / resolution)
    return centred_irfft2(centred_rfft2(image_CYX) * passed_YX.to(image_CYX), box)


def moved_planes(image_CYX: Tensor, shift_C2: Tensor) -> Tensor:
    """Images [C, N, N] moved by (x, y) px each, exactly for band-limited images; what leaves the box comes in opposite."""
    box = image_CYX.shape[-1]
    y, x = signed_frequencies(box, image_CYX.device)[:, None], torch.arange(box // 2 + 1, device=image_CYX.device)
    shift_C211 = shift_C2[:, :, None, None].to(image_CYX)
    phase_CYX = (-2 * torch.pi / box) * (shift_C211[:, 0] * x + shift_C211[:, 1] * y)
    return centred_irfft2(centred_rfft2(image_CYX) * torch.polar(torch.ones_like(phase_CYX), phase_CYX), box)


def centring_shifts(image_CYX: Tensor, largest: float) -> Tensor:
    """What would bring the centre of mass of each image's positive pixels to the centre, (x, y) px [C, 2]; at most `largest` px
    long (facts 4.7)."""
    mass_CYX = image_CYX.clamp_min(0).double()
    axis = torch.arange(image_CYX.shape[-1], dtype=torch.float64, device=image_CYX.device) - image_CYX.shape[-1] // 2
    total_C = mass_CYX.sum((1, 2)).clamp_min(1e-300)
    shift_C2 = -torch.stack([(mass_CYX.sum(1) * axis).sum(1), (mass_CYX.sum(2) * axis).sum(1)], 1) / total_C[:, None]
    length_C1 = shift_C2.norm(dim=1, keepdim=True)
    return shift_C2 * (largest / length_C1.clamp_min(1e-300)).clamp_max(1)


class PlaneShells:
    """Shells round(r / padding) of padded half planes [C, P, P/2 + 1]; the plane's column x = 0 counts as stored."""

    def __init__(self, box: int, size: int, radius: int, device: torch.device | str) -> None:
        self.count = box // 2 + 1
        y, x = signed_frequencies(size, device)[:, None].double(), torch.arange(size // 2 + 1, device=device)
        r_YX = (y * y + x * x).sqrt() * (box / size)
        self.inside_YX = r_YX < radius + 0.5 * box / size
        self.shell_YX = (r_YX + 0.5).long().clamp_max(self.count - 1)
        self._counts_S = torch.bincount(self.shell_YX[self.inside_YX], minlength=self.count).double()

    def mean(self, values_CYX: Tensor) -> Tensor:
        """Mean over each shell within the radius, float64 [C, S]; 0 for shells beyond."""
        flat_CP = torch.where(self.inside_YX, values_CYX.double(), 0).flatten(1)
        out = flat_CP.new_zeros(len(flat_CP), self.count)
        return out.index_add_(1, self.shell_YX.flatten(), flat_CP) / self._counts_S.clamp_min(1)

    def spread(self, curve_CS: Tensor) -> Tensor:
        """Each shell's value at its coefficients, [C, P, P/2 + 1]."""
        return curve_CS[:, self.shell_YX]


def _images(fourier_CYX: Tensor, box: int, padding: float) -> Tensor:
    """Images [C, N, N] of padded transforms, corners filled, gridding corrected: the inverse of `padded_planes`."""
    size = fourier_CYX.shape[1]
    first = size // 2 - box // 2
    whole_CYX = centred_irfft2(fourier_CYX, size) * (box**2 / size**2)
    image_CYX = whole_CYX[:, first : first + box, first : first + box]
    image_CYX = fill_outside(image_CYX, soft_circle(box, box / 2, 3, image_CYX.device))
    return image_CYX / plane_gridding_correction(box, padding, image_CYX.device)
