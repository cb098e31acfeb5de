"""Total variation of the object: sum over pixels of |gradient|, which prefers flat areas with sharp edges.

    R = weight / pixels x sum_p sqrt(|O(y+1, x) - O(y, x)|^2 + |O(y, x+1) - O(y, x)|^2 + e^2),    weight: option x all counts

e = 0.01 of the object's rms amplitude rounds the corner at 0. Along a step R is replaced by the quadratic function that touches
it at the start and is nowhere below (the square root by a tangent), so that the line search stays one of polynomials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.ptychography.share import Share
from verglas.ptychography.unknowns import Unknowns

CORNER = 0.01


class TotalVariation:
    """weight: counts; 0: no regulariser, nothing is computed. share: each rank takes the pixels that it counts."""

    def __init__(self, weight: float, share: Share) -> None:
        self.weight, self.share = weight, share

    def add_gradient(self, object_OLYX: Tensor, into: Unknowns, rows: int = 1, positions: int = 1) -> float:
        """R for as large a part of all `positions` as the `rows` of all ranks are; adds the same part of its gradient, as far as
        it comes from this rank's pixels, to the object's in `into`."""
        if not self.weight:
            return 0.0
        part = self.share.sum_of(rows) / positions
        here_OLYX, corner2, factor = self._here(object_OLYX)
        down, right, length = differences(here_OLYX, corner2, self.share.next_2)
        if into.object_OLYX is not None:
            into_OLYX = into.object_OLYX[(..., *self.share.cell_and_next)]
            into_OLYX.add_(transposed(down / length, right / length), alpha=part * factor)
        return part * factor * self.share.sum_of(self._sum(length))

    def along(self, object_OLYX: Tensor, step_OLYX: Tensor) -> tuple[float, float, float]:
        """Coefficients (a, b, c) of a + b t + c t^2 that touches R at object + t step, t = 0, from above."""
        if not self.weight:
            return 0.0, 0.0, 0.0
        here_OLYX, corner2, factor = self._here(object_OLYX)
        down, right, length = differences(here_OLYX, corner2, self.share.next_2)
        more_down, more_right, _ = differences(step_OLYX[(..., *self.share.cell_and_next)], corner2, self.share.next_2)
        slope = (down.conj() * more_down + right.conj() * more_right).real / length
        bend = (more_down.abs().square() + more_right.abs().square()) / (2 * length)
        sums = self.share.sums_of([self._sum(one) for one in (length, slope, bend)])
        return tuple(factor * one for one in sums)  # type: ignore[return-value]

    def _here(self, object_OLYX: Tensor) -> tuple[Tensor, float, float]:
        """(this rank's pixels and the next ones, e^2, weight / pixels)."""
        counted_OLYX = object_OLYX[(..., *self.share.cell)]
        square, pixels = self.share.sums_of([float(counted_OLYX.abs().square().sum(dtype=torch.float64)), counted_OLYX.numel()])
        return object_OLYX[(..., *self.share.cell_and_next)], CORNER**2 * square / pixels, self.weight / pixels

    def _sum(self, term_OLYX: Tensor) -> float:
        """Over the pixels that this rank counts."""
        rows, columns = (edge - more for edge, more in zip(term_OLYX.shape[-2:], self.share.next_2, strict=True))
        return float(term_OLYX[..., :rows, :columns].sum(dtype=torch.float64))


def differences(image: Tensor, corner2: float, next_2: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor, Tensor]:
    """(down, right, length) of the steps from each pixel to its neighbours; 0 at the last row and column, and at the next_2
    (rows, columns) that follow what is counted. corner2: e^2."""
    down = torch.zeros_like(image)
    right = torch.zeros_like(image)
    rows, columns = (edge - more for edge, more in zip(image.shape[-2:], next_2, strict=True))
    down[..., :-1, :columns] = (image[..., 1:, :] - image[..., :-1, :])[..., :columns]
    right[..., :rows, :-1] = (image[..., 1:] - image[..., :-1])[..., :rows, :]
    return down, right, (down.abs().square() + right.abs().square() + corner2).sqrt()


def transposed(down: Tensor, right: Tensor) -> Tensor:
    """The transpose of the differences."""
    out = -down - right
    out[..., 1:, :] += down[..., :-1, :]
    out[..., 1:] += right[..., :-1]
    return out
