"""How far a pose may be off before the image tells: the expected accuracy of angles and offsets (RELION facts 3.11).

For a particle with projection P1 at its pose, the smallest error whose projection P2 is 100 times less likely:

    sum_k C^2 |P1 - P2|^2 / (2 sigma^2) > -ln 0.01

with the error applied to one of its three Euler angles, or to its offset along x or y, chosen at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import PixelList
from verglas.core.rotations import euler_from_matrix, matrix_from_euler

Slices = Callable[[Tensor], Tensor]  # poses A [R, 3, 3] -> slices of the reference [R, 2, K]

MOST_PARTICLES = 100
THRESHOLD = 4.60517  # -ln 0.01
# The error grows by a step while it is below a bound: (bound, step) in degrees and in px.
ANGLE_STEPS = ((0.2, 0.05), (1.0, 0.1), (2.0, 0.2), (5.0, 0.5), (10.0, 1.0), (20.0, 2.0), (30.0, 5.0))
OFFSET_STEPS = ((1.0, 0.1), (2.0, 0.2), (5.0, 0.5), (10.0, 1.0))
_TRIALS_AT_ONCE = 8
_NUMBERS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Accuracy:
    """Smallest detectable error of each particle: angle_B in degrees, offset_B in px; float64.

    Where even the largest error tried cannot be told, the value is the next beyond it (above 30 degrees, 10 px).
    """

    angle_B: Tensor
    offset_B: Tensor

    @property
    def angle(self) -> float:
        """Mean over the particles, degrees."""
        return float(self.angle_B.mean())

    @property
    def offset(self) -> float:
        """Mean over the particles, px."""
        return float(self.offset_B.mean())


def expected_accuracy(
    slices: Slices, rotation_B33: Tensor, weight_BK: Tensor, pixels: PixelList, seed: int = 0, axes_2B: Tensor | None = None
) -> Accuracy:
    """Accuracy of the first 100 of these particles (all of one optics group).

    slices: the reference at `pixels` (half precision will do); weight_BK: C^2 / sigma^2 of each coefficient in
    the unit of these slices, sigma^2 per component, 0 for the origin; seed: chooses the axes of the errors; axes_2B: that were
    drawn for them among others (`drawn_axes`).
    """
    n = min(len(rotation_B33), MOST_PARTICLES)
    axes_2B = drawn_axes(n, seed) if axes_2B is None else axes_2B
    weight_BK = weight_BK[:n]
    angle_B = angle_errors(slices, rotation_B33[:n], weight_BK, axes_2B[0])
    offset_B = offset_errors(slices(rotation_B33[:n].to(weight_BK.device)), weight_BK, pixels, axes_2B[1])
    return Accuracy(angle_B, offset_B)


def drawn_axes(n: int, seed: int) -> Tensor:
    """Which Euler angle (0 rot, 1 tilt, 2 psi) and which offset (0 x, 1 y) of each of n particles is changed, int64 [2, n]."""
    draw_2B = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor([[3.0], [2.0]]) * draw_2B).long()


def angle_errors(slices: Slices, rotation_B33: Tensor, weight_BK: Tensor, axis_B: Tensor) -> Tensor:
    """Smallest detectable change of Euler angle axis_B (0 rot, 1 tilt, 2 psi) of each particle, degrees, float64 [B].

    The sum is not monotonic in the error, so errors are tried from small to large, a few at once, and only for the
    particles whose error is not found yet.
    """
    trials = error_table(ANGLE_STEPS)
    euler_B3 = euler_from_matrix(rotation_B33.cpu())
    turned_B3 = torch.nn.functional.one_hot(axis_B.cpu(), 3).double()
    found_B = torch.full((len(euler_B3),), trials[-1], dtype=torch.float64)
    left_B = torch.arange(len(euler_B3))
    for first in range(0, len(trials) - 1, _TRIALS_AT_ONCE):
        error_E = torch.tensor(trials[first : min(first + _TRIALS_AT_ONCE, len(trials) - 1)], dtype=torch.float64)
        index_B = torch.cat([
            first_crossing(_angle_sums(slices, euler_B3[part], turned_B3[part], error_E, weight_BK[part.to(weight_BK.device)]))
            for part in left_B.split(max(1, _NUMBERS_AT_ONCE // (2 * len(error_E) * weight_BK.shape[1])))
        ])  # fmt: skip
        told_B = index_B < len(error_E)
        found_B[left_B[told_B]] = error_E[index_B[told_B]]
        left_B = left_B[~told_B]
        if len(left_B) == 0:
            break
    return found_B


def offset_errors(slices_B2K: Tensor, weight_BK: Tensor, pixels: PixelList, axis_B: Tensor) -> Tensor:
    """Smallest detectable shift along x (axis 0) or y (axis 1) of each particle, px, float64 [B].

    |P - P exp(i phi)|^2 / 2 = 2 |P|^2 sin^2(phi / 2): all errors at once are one matrix product per axis.
    """
    trials = error_table(OFFSET_STEPS)
    error_E = torch.tensor(trials[:-1], dtype=torch.float64, device=weight_BK.device)
    power_BK = slices_B2K.double().square().sum(1) * weight_BK
    axis_B = axis_B.to(weight_BK.device)
    sum_BE = power_BK.new_zeros(len(power_BK), len(error_E))
    for axis, frequency_K in enumerate((pixels.x_K, pixels.y_K)):
        half_phase_KE = (torch.pi / pixels.box) * frequency_K.to(power_BK)[:, None] * error_E
        sum_BE += (2 * half_phase_KE.sin().square_()).T.matmul(power_BK.T).T * (axis_B == axis)[:, None]
    return torch.tensor(trials, dtype=torch.float64)[first_crossing(sum_BE)]


def first_crossing(sum_BE: Tensor) -> Tensor:
    """Position of the first sum above the threshold in each row, E where there is none; int64 [B] on the CPU."""
    above_BE = torch.nn.functional.pad(sum_BE > THRESHOLD, (0, 1), value=True)
    return above_BE.int().argmax(1).cpu()


def error_table(steps: tuple[tuple[float, float], ...]) -> list[float]:
    """Errors to try, growing by (bound, step); the last one lies beyond the last bound and is not tried."""
    return list(_growing(steps))


def _growing(steps: tuple[tuple[float, float], ...]) -> Iterator[float]:
    error = 0.0
    # Summed step by step, since rounding decides at which bound the next step begins: 0.1 ten times is below 1.
    while error <= steps[-1][0]:
        error += next((step for bound, step in steps if error < bound), steps[-1][1])
        yield error


def _angle_sums(slices: Slices, euler_B3: Tensor, turned_B3: Tensor, error_E: Tensor, weight_BK: Tensor) -> Tensor:
    """sum_k C^2 |P1 - P2|^2 / (2 sigma^2) of particles and errors, [B, E]."""
    euler_BE3 = euler_B3[:, None] + turned_B3[:, None] * error_E[:, None]
    both_BE3 = torch.cat([euler_B3[:, None], euler_BE3], 1)
    matrices_R33 = matrix_from_euler(*both_BE3.flatten(0, 1).unbind(-1)).to(weight_BK.device)
    slice_BE2K = slices(matrices_R33).unflatten(0, both_BE3.shape[:2])
    difference_BEK = (slice_BE2K[:, 1:] - slice_BE2K[:, :1]).square().sum(2)
    return 0.5 * torch.einsum("bek,bk->be", difference_BEK, weight_BK.to(difference_BEK))
