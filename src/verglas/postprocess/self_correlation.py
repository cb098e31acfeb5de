"""How well a map agrees with turned copies of itself: a small map prepared for it, and axes of rotation found in it.

Prepared: low-passed, on a small box, moved so that its centre of mass is the centre voxel, shells given the same power (less
where they hold noise), the spherical mean taken away (it agrees with any copy), in a soft sphere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft3, centred_rfft3, fourier_resize, shells_of_half_volume
from verglas.core.masks import low_pass_filter, radius_grid, raised_cosine
from verglas.core.shells import shell_sum
from verglas.postprocess.align import turned
from verglas.postprocess.mapops import window

PIXELS_PER_RESOLUTION = 2.5
LARGEST_BOX = 64  # px
CENTRED_AT = 30.0  # Å, low pass before the centre of mass is taken
SOLVENT_BELOW = 0.2  # of the density's 99.9th percentile, for the centre of mass and the extent
MASS_INSIDE = 0.97  # share of the mass in the sphere
SOFT = 0.15  # width of the sphere's edge, of its radius
LEAST_SOLVENT = 0.05  # of the box, for the noise to be measured there
LOWEST_CEILING = 0.3  # noise is not known better than that: a lower one would make much of little
ANGLES = 48  # points on a circle about an axis: harmonics up to 23
DIRECTIONS_AT_ONCE = 32


@dataclass(frozen=True)
class SmallMap:
    """map_ZYX: float32, norm 1; pixel_size: Å; centre_3: its centre in the whole map, (x, y, z) from the centre voxel, Å;
    radius: of the particle, px; resolution: Å; ceiling: the correlation that noise leaves to copies of a symmetric particle."""

    map_ZYX: Tensor
    pixel_size: float
    centre_3: Tensor
    radius: float
    resolution: float
    ceiling: float


def prepare(map_ZYX: Tensor, pixel_size: float, resolution: float) -> SmallMap:
    """The small map, with detail down to `resolution` Å (coarser where the particle would need more than `LARGEST_BOX` px)."""
    edge = map_ZYX.shape[0] * pixel_size
    box = min(2 * math.ceil(PIXELS_PER_RESOLUTION * edge / resolution / 2), map_ZYX.shape[0])
    small_ZYX = fourier_resize(map_ZYX.double(), box)
    pixel_size = edge / box
    fourier = centred_rfft3(small_ZYX)
    blurred = fourier * low_pass_filter(shells_of_half_volume(box).double(), edge / max(CENTRED_AT, resolution))
    centre_3, radius = centre_and_radius(centred_irfft3(blurred, box))
    kept = 2 * math.ceil(1.25 * radius) + 4
    if kept > LARGEST_BOX:
        return prepare(map_ZYX, edge / map_ZYX.shape[0], resolution * kept / (LARGEST_BOX - 4))
    moved_ZYX = centred_irfft3(fourier * _shift_phase(box, centre_3), box)
    flat_ZYX, ceiling = _equal_shells(moved_ZYX, radius, edge / resolution)
    flat_ZYX = window(flat_ZYX, kept)
    soft_ZYX = _soft_sphere(kept, radius)
    flat_ZYX = without_spherical_mean(flat_ZYX * soft_ZYX) * soft_ZYX
    return SmallMap((flat_ZYX / flat_ZYX.norm()).float(), pixel_size, centre_3 * pixel_size, radius, resolution, ceiling)


def centre_and_radius(map_ZYX: Tensor) -> tuple[Tensor, float]:
    """Centre of mass (x, y, z) of what stands out of the solvent, from the centre voxel, and the radius that holds it; px."""
    box = map_ZYX.shape[0]
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    place_V3 = torch.stack([x, y, z], -1).view(-1, 3)
    inside_V = place_V3.norm(dim=1) < box / 2
    density_V = map_ZYX.double().flatten()
    level = SOLVENT_BELOW * density_V[inside_V].kthvalue(math.ceil(0.999 * int(inside_V.sum()))).values
    density_V = torch.where(inside_V, (density_V - level).clamp_min(0), 0)
    centre_3 = (density_V[:, None] * place_V3).sum(0) / density_V.sum()
    distance_V, order_V = (place_V3 - centre_3).norm(dim=1).sort()
    held_V = density_V[order_V].cumsum(0) >= MASS_INSIDE * density_V.sum()
    return centre_3, float(distance_V[int(held_V.int().argmax())]) + 1


def _shift_phase(box: int, centre_3: Tensor) -> Tensor:
    """Moves the point `centre_3` (x, y, z; px) of a map to its centre voxel."""
    full, half = torch.fft.fftfreq(box, dtype=torch.float64), torch.fft.rfftfreq(box, dtype=torch.float64)
    x, y, z = centre_3.tolist()
    return torch.exp(2j * math.pi * (full[:, None, None] * z + full[None, :, None] * y + half * x))


def _soft_sphere(box: int, radius: float) -> Tensor:
    return raised_cosine(radius_grid(box, 3, dtype=torch.float64), radius, SOFT * radius)


def _equal_shells(map_ZYX: Tensor, radius: float, last_shell: float) -> tuple[Tensor, float]:
    """What lies in the sphere, every shell up to `last_shell` scaled to mean power c: the share of it that is not noise.

    The noise is measured outside of the sphere; c = 1 where too little lies there. The ceiling is sum c^2 / sum c.
    """
    box = map_ZYX.shape[0]
    shells = shells_of_half_volume(box)
    inside, power_S = _spectrum(map_ZYX, _soft_sphere(box, radius), shells)
    outside_ZYX = 1 - _soft_sphere(box, (1 + SOFT) * radius)
    share_S = torch.ones_like(power_S)
    if float(outside_ZYX.mean()) > LEAST_SOLVENT:
        share_S = (1 - _spectrum(map_ZYX, outside_ZYX, shells)[1] / power_S.clamp_min(1e-300)).clamp(0, 1)
    kept_S = low_pass_filter(torch.arange(len(power_S), dtype=torch.float64), min(last_shell, box // 2 - 1))
    factor_S = power_S.new_zeros(int(shells.max()) + 1)
    factor_S[1 : len(power_S)] = (kept_S * (share_S / power_S.clamp_min(1e-300)).sqrt())[1:]
    weight_S = kept_S.square() * torch.arange(len(power_S)).square()  # coefficients of a shell
    ceiling = float((weight_S * share_S.square()).sum() / (weight_S * share_S).sum().clamp_min(1e-12))
    return centred_irfft3(inside * factor_S[shells], box), max(ceiling, LOWEST_CEILING)


def _spectrum(map_ZYX: Tensor, weight_ZYX: Tensor, shells_ZYX: Tensor) -> tuple[Tensor, Tensor]:
    """Transform of the map, less its mean, times a weight; and its mean power per shell for a weight of mean square 1."""
    box = map_ZYX.shape[0]
    mean = (map_ZYX * weight_ZYX).sum() / weight_ZYX.sum()
    fourier = centred_rfft3((map_ZYX - mean) * weight_ZYX)
    count_S = shell_sum(torch.ones_like(fourier.real), box, shells_ZYX)
    return fourier, shell_sum(fourier.abs().square(), box, shells_ZYX) / count_S / weight_ZYX.square().mean()


def without_spherical_mean(map_ZYX: Tensor) -> Tensor:
    """The map less its mean at each distance from the centre voxel (linear between whole pixels)."""
    distance_V = radius_grid(map_ZYX.shape[0], 3, dtype=torch.float64).flatten()
    below_V = distance_V.long()
    share_V = distance_V - below_V
    total, count = torch.zeros(2, int(below_V.max()) + 2, dtype=torch.float64)
    for index_V, weight_V in ((below_V, 1 - share_V), (below_V + 1, share_V)):
        total.index_add_(0, index_V, map_ZYX.double().flatten() * weight_V)
        count.index_add_(0, index_V, weight_V)
    mean = total / count.clamp_min(1e-12)
    return map_ZYX - ((1 - share_V) * mean[below_V] + share_V * mean[below_V + 1]).view_as(map_ZYX)


def onto_z(direction_D3: Tensor) -> Tensor:
    """Rotations A with A d = (0, 0, 1) for unit vectors d, [D, 3, 3]."""
    steep_D1 = direction_D3[:, 2:].abs() < 0.9
    x_D3 = torch.linalg.cross(torch.where(steep_D1, direction_D3.new_tensor([0, 0, 1]), direction_D3.new_tensor([1, 0, 0])),
                              direction_D3)  # fmt: skip
    x_D3 = x_D3 / x_D3.norm(dim=1, keepdim=True)
    return torch.stack([x_D3, torch.linalg.cross(direction_D3, x_D3), direction_D3], 1)


def axis_scores(small: SmallMap, direction_D3: Tensor, highest_fold: int) -> Tensor:
    """Mean correlation with copies turned by 360 k / n, k = 1 ... n - 1, about each direction; [D, highest_fold - 1], n from 2.

    The map is sampled on circles about the direction. With P_m the power of their m-th harmonic, the mean is
    (n E_n - 1) / (n - 1), E_n the share of the power that lies in harmonics divisible by n. m = 0 looks the same after any
    turn and is not counted.
    """
    circle_CA3, radius_C = _circles(small)
    found = []
    for part_D33 in onto_z(direction_D3).float().split(DIRECTIONS_AT_ONCE):
        values_DCA = sampled(small.map_ZYX, circle_CA3.view(-1, 3) @ part_D33).view(len(part_D33), len(radius_C), ANGLES)
        power_DM = (torch.fft.rfft(values_DCA, dim=-1).abs().square() * radius_C[:, None]).sum(1)[:, 1:-1]
        harmonic_M = torch.arange(1, power_DM.shape[1] + 1)
        total_D = power_DM.sum(1).clamp_min(1e-30)
        shares = [(n, power_DM[:, harmonic_M % n == 0].sum(1) / total_D) for n in range(2, highest_fold + 1)]
        found.append(torch.stack([(n * share_D - 1) / (n - 1) for n, share_D in shares], 1))
    return torch.cat(found)


def _circles(small: SmallMap) -> tuple[Tensor, Tensor]:
    """Points (x, y, z) [C, A, 3] on circles about z that fill the particle, and the circles' radii [C]; px."""
    reach = min(1.1 * small.radius, small.map_ZYX.shape[0] / 2 - 1)
    height, radius = torch.meshgrid(torch.arange(-int(reach), int(reach) + 1.0), torch.arange(1.0, reach + 1), indexing="ij")
    inside = height.square() + radius.square() <= reach**2
    height_C1, radius_C1 = height[inside][:, None], radius[inside][:, None]
    angle_A = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    circle = [radius_C1 * angle_A.cos(), radius_C1 * angle_A.sin(), height_C1.expand(-1, ANGLES)]
    return torch.stack(circle, -1), radius_C1[:, 0]


def sampled(map_ZYX: Tensor, place_DV3: Tensor) -> Tensor:
    """The map at places (x, y, z) from its centre voxel, px, trilinear, zero outside; [D, V]."""
    box = map_ZYX.shape[0]
    grid = (place_DV3 + box // 2) * (2 / (box - 1)) - 1
    volume = map_ZYX.expand(len(grid), 1, box, box, box)
    return torch.nn.functional.grid_sample(volume, grid[:, :, None, None], align_corners=True)[:, 0, :, 0, 0]


def copies(map_ZYX: Tensor, rotation_R33: Tensor, centre_3: Tensor) -> Tensor:
    """The map turned about a point (x, y, z from the centre voxel, px) by each rotation, [R, Z, Y, X]."""
    return turned(map_ZYX, rotation_R33, centre_3 - rotation_R33 @ centre_3)


def correlations(map_ZYX: Tensor, rotation_R33: Tensor, centre_3: Tensor) -> Tensor:
    """Correlation of the map with each of its `copies`, [R]; differentiable in rotations and centre."""
    copy_RZYX = copies(map_ZYX, rotation_R33, centre_3)
    norm_R = copy_RZYX.flatten(1).norm(dim=1) * map_ZYX.norm()
    return (copy_RZYX * map_ZYX).flatten(1).sum(1) / norm_R.clamp_min(1e-12)
