"""Directional resolution: the FSC in cones, and figures that say how even it is.

Conical FSC: only coefficients within `half_angle` of an axis (or of its opposite) are correlated (20 degrees and the idea
of a directional FSC: Tan et al. 2017, Nature Methods 14, 793). Coefficients are first summed in cells of about 1.5 degrees
and shells, then cells are joined to cones, so the cost hardly depends on the number of directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import shells_of_half_volume, signed_frequencies
from verglas.core.sphere import even_directions
from verglas.postprocess.curves import FSC_THRESHOLD

_ROWS, _COLUMNS = 60, 240


@dataclass(frozen=True)
class DirectionalFsc:
    """Conical FSC along directions (x, y, z) of the half sphere z > 0, and what follows from it.

    direction_D3, fsc_DS; resolution_D in Å (0.143, interpolated between shells).
    sphericity: of the body with radius 1/resolution in each direction, pi^(1/3) (6 V)^(2/3) / A, 1 for a sphere (as Tan et
    al. take it for their thresholded 3-D FSC). area_ratio: smallest over largest area under a cone's FSC.
    """

    direction_D3: Tensor
    fsc_DS: Tensor
    resolution_D: Tensor
    sphericity: float
    area_ratio: float
    half_angle: float

    @property
    def best(self) -> float:
        return float(self.resolution_D.min())

    @property
    def worst(self) -> float:
        return float(self.resolution_D.max())

    @property
    def median(self) -> float:
        return float(self.resolution_D.median())


def _cells(box: int, device: torch.device) -> Tensor:
    """Cell of each stored coefficient's direction, folded into z >= 0, [N, N, N/2+1] int64."""
    axis = signed_frequencies(box, device).double()
    z, y, x = axis[:, None, None], axis[None, :, None], axis[None, None, : box // 2 + 1].abs()
    sign = torch.where(z < 0, -1.0, 1.0)
    tilt = torch.atan2((x * x + y * y).sqrt(), z.abs())
    turn = torch.atan2(sign * y, sign * x) % (2 * math.pi)
    row = (tilt * (_ROWS / (math.pi / 2))).long().clamp_max(_ROWS - 1)
    return row * _COLUMNS + (turn * (_COLUMNS / (2 * math.pi))).long().clamp_max(_COLUMNS - 1)


def _cell_centres() -> Tensor:
    tilt = (torch.arange(_ROWS, dtype=torch.float64) + 0.5) * (math.pi / 2 / _ROWS)
    turn = (torch.arange(_COLUMNS, dtype=torch.float64) + 0.5) * (2 * math.pi / _COLUMNS)
    tilt, turn = torch.meshgrid(tilt, turn, indexing="ij")
    return torch.stack([tilt.sin() * turn.cos(), tilt.sin() * turn.sin(), tilt.cos()], -1).reshape(-1, 3)


def conical_fsc(a_ZYX: Tensor, b_ZYX: Tensor, direction_D3: Tensor, half_angle: float = 20.0) -> Tensor:
    """FSC within `half_angle` degrees of each direction (unit vectors x, y, z), float64 [D, N/2+1].

    a, b: half transforms [N, N, N/2+1], origin in the corner. Shells without a coefficient in the cone get the FSC of the
    whole shell.
    """
    box, device = a_ZYX.shape[0], a_ZYX.device
    n_shells, n_cells = box // 2 + 1, _ROWS * _COLUMNS
    shells = shells_of_half_volume(box, device)
    kept = shells < n_shells
    place = (shells * n_cells + _cells(box, device))[kept]
    # Each pair k, -k once: the plane x = 0 holds both partners.
    once = torch.ones(n_shells, dtype=torch.float64, device=device)
    once[0] = 0.5
    weight = once.expand(box, box, n_shells)[kept]
    members = (_cell_centres().to(device) @ direction_D3.to(device).T).abs() >= math.cos(math.radians(half_angle))

    def cone_sums(values: Tensor) -> tuple[Tensor, Tensor]:
        cells = torch.bincount(place, values[kept].double() * weight, n_shells * n_cells).view(n_shells, n_cells)
        return (cells @ members.double()).T, cells.sum(1)

    cross_DS, cross_S = cone_sums(a_ZYX.real * b_ZYX.real + a_ZYX.imag * b_ZYX.imag)
    power_a_DS, power_a_S = cone_sums(a_ZYX.real**2 + a_ZYX.imag**2)
    power_b_DS, power_b_S = cone_sums(b_ZYX.real**2 + b_ZYX.imag**2)
    whole_S = cross_S / (power_a_S * power_b_S).sqrt().clamp_min(1e-300)
    norm_DS = (power_a_DS * power_b_DS).sqrt()
    return torch.where(norm_DS > 0, cross_DS / norm_DS.clamp_min(1e-300), whole_S.expand_as(norm_DS)).cpu()


def crossing_shell(fsc_S: Tensor, threshold: float = FSC_THRESHOLD) -> float:
    """Fractional shell where the curve first falls below `threshold` (linear between shells); N/2 if it never does."""
    below = (fsc_S[1:] < threshold).nonzero()
    if not len(below):
        return float(len(fsc_S) - 1)
    shell = int(below[0]) + 1
    before, after = float(fsc_S[shell - 1]), float(fsc_S[shell])
    return shell - 1 + max(before - threshold, 0.0) / max(before - after, 1e-12) if shell > 1 else 1.0


def sphericity(direction_D3: Tensor, radius_D: Tensor) -> float:
    """pi^(1/3) (6 V)^(2/3) / A of the body whose surface lies at `radius_D` along the directions and their opposites.

    Relative to the same figure of a sphere on the same mesh, so that an even body has exactly 1.
    """
    from scipy.spatial import ConvexHull

    unit = torch.cat([direction_D3, -direction_D3]).numpy()
    corners = ConvexHull(unit).simplices
    radius = torch.cat([radius_D, radius_D]).numpy()[:, None]

    def of_mesh(points: np.ndarray) -> float:
        a, b, c = (points[corners[:, i]] for i in range(3))
        volume = np.abs((a * np.cross(b, c)).sum(1)).sum() / 6
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
        return float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area)

    return of_mesh(unit * radius) / of_mesh(unit)


def directional_fsc(
    a_ZYX: Tensor, b_ZYX: Tensor, pixel_size: float, n_directions: int = 300, half_angle: float = 20.0
) -> DirectionalFsc:
    """Conical FSC of two (masked) half transforms [N, N, N/2+1] along even directions, with its figures; pixel size Å."""
    box = a_ZYX.shape[0]
    direction_D3 = even_directions(n_directions, hemisphere=True)
    fsc_DS = conical_fsc(a_ZYX, b_ZYX, direction_D3, half_angle)
    radius_D = torch.tensor([crossing_shell(fsc_S) for fsc_S in fsc_DS], dtype=torch.float64)
    area_D = fsc_DS[:, 1:].clamp_min(0).sum(1)
    return DirectionalFsc(
        direction_D3, fsc_DS, box * pixel_size / radius_D, sphericity(direction_D3, radius_D),
        float(area_D.min() / area_D.max()), half_angle,
    )  # fmt: skip
