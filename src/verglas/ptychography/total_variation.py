"""Total variation of the object: sum over pixels of |gradient|, which prefers flat areas with sharp edges.

    R = weight / pixels x sum_p sqrt(|O(y+1, x) - O(y, x)|^2 + |O(y, x+1) - O(y, x)|^2 + e^2),    weight: option x all counts

e = 0.01 of the object's rms amplitude rounds the corner at 0. Along a step R is replaced by the quadratic function that touches
it at the start and is nowhere below (the square root by a tangent), so that the line search stays one of polynomials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.ptychography.unknowns import Unknowns

CORNER = 0.01


class TotalVariation:
    """weight: counts; 0: no regulariser, nothing is computed."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def add_gradient(self, object_OLYX: Tensor, into: Unknowns, share: float = 1.0) -> float:
        """R; adds `share` of its gradient to the object's in `into`."""
        if not self.weight:
            return 0.0
        down, right, length = differences(object_OLYX)
        factor = self.weight / object_OLYX.numel()
        if into.object_OLYX is not None:
            into.object_OLYX.add_(transposed(down / length, right / length), alpha=share * factor)
        return factor * float(length.sum(dtype=torch.float64))

    def along(self, object_OLYX: Tensor, step_OLYX: Tensor) -> tuple[float, float, float]:
        """Coefficients (a, b, c) of a + b t + c t^2 that touches R at object + t step, t = 0, from above."""
        if not self.weight:
            return 0.0, 0.0, 0.0
        down, right, length = differences(object_OLYX)
        more_down, more_right, _ = differences(step_OLYX)
        factor = self.weight / object_OLYX.numel()
        slope = (down.conj() * more_down + right.conj() * more_right).real / length
        bend = (more_down.abs().square() + more_right.abs().square()) / (2 * length)
        return tuple(factor * float(one.sum(dtype=torch.float64)) for one in (length, slope, bend))  # type: ignore[return-value]


def differences(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(down, right, length) of the steps from each pixel to its neighbours; 0 at the last row and column."""
    down = torch.zeros_like(image)
    right = torch.zeros_like(image)
    down[..., :-1, :] = image[..., 1:, :] - image[..., :-1, :]
    right[..., :-1] = image[..., 1:] - image[..., :-1]
    corner = CORNER * image.abs().square().mean().sqrt()
    return down, right, (down.abs().square() + right.abs().square() + corner.square()).sqrt()


def transposed(down: Tensor, right: Tensor) -> Tensor:
    """The transpose of the differences."""
    out = -down - right
    out[..., 1:, :] += down[..., :-1, :]
    out[..., 1:] += right[..., :-1]
    return out
