"""How evenly a set of views samples Fourier space: pure functions of rotation matrices A [B, 3, 3] (object -> image frame).

A projection along v = A[2] fills the central plane perpendicular to v. Symmetry enters by symmetry matrices [G, 3, 3] (see
`verglas.core.symmetry`), which turn every view into G views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.sphere import even_directions

_PAIRS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Sampling:
    """Sampling of Fourier directions by the views.

    direction_D3: directions (x, y, z) on a half sphere; count_D: planes that pass within half a voxel at the Fourier radius;
    scf: sampling compensation factor; unsampled: fraction of directions no plane meets.
    """

    direction_D3: Tensor
    count_D: Tensor
    scf: float
    unsampled: float


def viewing_directions(rotation_B33: Tensor, symmetry_G33: Tensor | None = None) -> Tensor:
    """Views of the object, rows 2 of A R for each symmetry R, unit vectors (x, y, z), float64 [B * G, 3]."""
    view_B3 = rotation_B33[:, 2, :].double()
    return view_B3 if symmetry_G33 is None else torch.einsum("bi,gij->bgj", view_B3, symmetry_G33.double()).reshape(-1, 3)


def fourier_sampling(
    rotation_B33: Tensor, symmetry_G33: Tensor | None = None, fourier_radius: float = 50.0, n_directions: int = 5000
) -> Sampling:
    """Sampling map and SCF of a set of views (Baldwin & Lyumkis 2020, Prog. Biophys. Mol. Biol. 150, 160).

    A plane counts for direction d at radius k (voxels) if |d.v| k < 1/2. 1/SCF = <1/s>, s the count relative to its mean:
    1 for even views, 8/pi^2 = 0.81 for side views evenly about one axis, towards 0 when directions are missing. A direction
    that no plane meets counts as half a plane here, so that 1/s stays finite; `unsampled` says how many there are.
    """
    view_B3 = viewing_directions(rotation_B33, symmetry_G33).float()
    direction_D3 = even_directions(n_directions, hemisphere=True).to(view_B3.device)
    count_D = torch.zeros(n_directions, dtype=torch.float64, device=view_B3.device)
    for part_B3 in view_B3.split(max(_PAIRS_AT_ONCE // n_directions, 1)):
        count_D += ((direction_D3.float() @ part_B3.T).abs() * fourier_radius < 0.5).sum(1)
    at_least_half_D = count_D.clamp_min(0.5)  # in both means, so that 1 remains the largest value (Jensen's inequality)
    scf = 1 / ((1 / at_least_half_D).mean() * at_least_half_D.mean())
    return Sampling(direction_D3, count_D, float(scf), float((count_D == 0).double().mean()))


def point_spread_radii(
    rotation_B33: Tensor,
    symmetry_G33: Tensor | None = None,
    resolution: float = 4.0,
    diameter: float = 200.0,
    n_directions: int = 500,
) -> Tensor:
    """Distance (Å) at which the point spread of a set of views falls to one half along even directions, [D] float64.

    Each view spreads a point over a Gaussian of full width `resolution` Å across v and smears it along v over the particle's
    `diameter` Å (a slab 1/diameter thick in Fourier space): p(x) = mean over v of exp(-4 ln 2 (|x_across|/resolution)^2
    - 4 ln 2 (x_along/diameter)^2).
    """
    view_B3 = viewing_directions(rotation_B33, symmetry_G33)
    direction_D3 = even_directions(n_directions, hemisphere=True).to(view_B3.device)
    # The spread depends on a view through (d.v)^2 only, so views are binned by it: 512 bins of |d.v|.
    bins = 512
    histogram_DH = torch.zeros(n_directions, bins, dtype=torch.float64, device=view_B3.device)
    for part_B3 in view_B3.split(max(_PAIRS_AT_ONCE // n_directions, 1)):
        index = ((direction_D3 @ part_B3.T).abs() * bins).long().clamp_max(bins - 1)
        histogram_DH.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    histogram_DH /= len(view_B3)
    along2_H = ((torch.arange(bins, dtype=torch.float64, device=view_B3.device) + 0.5) / bins) ** 2
    rate_H = 4 * math.log(2) * ((1 - along2_H) / resolution**2 + along2_H / diameter**2)
    low = torch.zeros(n_directions, dtype=torch.float64, device=view_B3.device)
    high = torch.full_like(low, diameter)
    for _ in range(50):  # bisection: the spread falls monotonically with distance
        middle = (low + high) / 2
        value = (histogram_DH * torch.exp(-rate_H * middle[:, None] ** 2)).sum(1)
        low, high = torch.where(value > 0.5, middle, low), torch.where(value > 0.5, high, middle)
    return (low + high) / 2


def orientation_efficiency(
    rotation_B33: Tensor, symmetry_G33: Tensor | None = None, resolution: float = 4.0, diameter: float = 200.0
) -> float:
    """E_od = 1 - 2 std(R) / mean(R) over directions (Naydenova & Russo 2017, Nature Communications 8, 629).

    R: radii of the point spread's half-height surface, here in the Gaussian model of `point_spread_radii`; 1 for even views.
    The authors' program builds its point spread in Fourier space, so the figures agree in order, not in their digits.
    """
    radius_D = point_spread_radii(rotation_B33, symmetry_G33, resolution, diameter)
    return float(1 - 2 * radius_D.std(correction=0) / radius_D.mean())
