"""Where the axes of a point group lie in a map that was made without it, and the map turned so that they stand as usual.

For a rotation R and a centre c the group's operators about c are R^T g R; the score is the mean correlation of the map with its
copies turned by some of them, within a sphere, at low resolution. All orientations of a 15 degree grid are scored, the best few
are polished by halving steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft3, centred_rfft3, crop_half_volume
from verglas.core.masks import radius_grid, raised_cosine
from verglas.core.rotations import rotation_about_axis
from verglas.core.symmetry import symmetry_matrices
from verglas.expectation.sampling import OrientationGrid

_BOX = 24  # px to which the map is reduced for the search
_OPERATORS = 4  # of the group that are compared, at most
_STARTS = 6  # best orientations of the grid that are polished
_AT_ONCE = 64  # turned copies


@dataclass(frozen=True)
class Placed:
    """map_ZYX(R (r - centre)) = the given map(r): rotation_33 R, centre_3 (x, y, z) in px from the centre voxel;
    correlation: of the map with its copies turned by the group."""

    map_ZYX: Tensor
    rotation_33: Tensor
    centre_3: Tensor
    correlation: float


def placed_on_axes(map_ZYX: Tensor, symmetry: str) -> Placed:
    """The map [N, N, N] turned and moved so that its axes are those of the group; on the map's device."""
    box = min(_BOX, map_ZYX.shape[0])
    small_ZYX = centred_irfft3(crop_half_volume(centred_rfft3(map_ZYX.float()), box), box)
    score = _Score(small_ZYX, _some_operators(symmetry, map_ZYX.device))
    grid = OrientationGrid.build(2, 0, symmetry, 0.0)  # poses A and A g are one; so are the rotations A^T and g^T A^T
    rotation_R33 = grid.rotations(torch.arange(grid.count)).transpose(1, 2).to(map_ZYX.device)
    value_R = score(rotation_R33, torch.zeros(len(rotation_R33), 3, dtype=torch.float64, device=map_ZYX.device))
    starts = value_R.topk(_STARTS).indices
    best = max((_polished(score, rotation_R33[start]) for start in starts), key=lambda one: one[0])
    correlation, rotation_33, centre_3 = best
    centre_3 = centre_3 * (map_ZYX.shape[0] / box)
    turned_ZYX = turned(map_ZYX, rotation_33, centre_3)
    return Placed(turned_ZYX, rotation_33.cpu(), centre_3.cpu(), correlation)


def turned(map_ZYX: Tensor, rotation_33: Tensor, centre_3: Tensor) -> Tensor:
    """out(R (r - centre)) = map(r), trilinear; centre (x, y, z) in px from the centre voxel."""
    box = map_ZYX.shape[0]
    axis = torch.arange(box, dtype=torch.float32, device=map_ZYX.device) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    source = torch.stack([x, y, z], -1) @ rotation_33.to(axis) + centre_3.to(axis)  # row vectors times R: R^T r
    return _sampled(map_ZYX.float(), source.view(1, -1, 3)).view(map_ZYX.shape)


class _Score:
    """Mean correlation of a map with its copies turned by R^T g R about c, for many R and c."""

    def __init__(self, map_ZYX: Tensor, operator_G33: Tensor) -> None:
        box = map_ZYX.shape[0]
        soft_ZYX = raised_cosine(radius_grid(box, 3, map_ZYX.device), 0.40 * box, 0.08 * box)
        axis = torch.arange(box, dtype=torch.float32, device=map_ZYX.device) - box // 2
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        inside = soft_ZYX > 0
        self.map_ZYX, self.operator_G33 = map_ZYX, operator_G33
        self.position_P3, self.weight_P = torch.stack([x, y, z], -1)[inside], soft_ZYX[inside].float()
        self.value_P = self._normal(map_ZYX[inside].float()[None])[0]

    def __call__(self, rotation_R33: Tensor, centre_R3: Tensor) -> Tensor:
        """[R] of rotations [R, 3, 3] and centres [R, 3] (x, y, z) px."""
        parts = zip(rotation_R33.split(_AT_ONCE), centre_R3.split(_AT_ONCE), strict=True)
        return torch.cat([self._part(rotation, centre) for rotation, centre in parts])

    def _part(self, rotation_R33: Tensor, centre_R3: Tensor) -> Tensor:
        total_R = torch.zeros(len(rotation_R33), device=self.map_ZYX.device)
        centre_R13 = centre_R3[:, None].float()
        for operator in self.operator_G33:
            about_R33 = (rotation_R33.transpose(1, 2) @ operator @ rotation_R33).float()
            source_RP3 = (self.position_P3 - centre_R13) @ about_R33.transpose(1, 2) + centre_R13
            total_R += (self._normal(_sampled(self.map_ZYX, source_RP3)) * self.value_P * self.weight_P).sum(1)
        return total_R / len(self.operator_G33)

    def _normal(self, value_RP: Tensor) -> Tensor:
        """Weighted mean 0, weighted norm 1."""
        value_RP = value_RP - (value_RP * self.weight_P).sum(1, keepdim=True) / self.weight_P.sum()
        return value_RP / (value_RP.square() * self.weight_P).sum(1, keepdim=True).sqrt().clamp_min(1e-20)


def _polished(score: _Score, rotation_33: Tensor) -> tuple[float, Tensor, Tensor]:
    """(score, R, centre) after climbing from a start by turns and moves of halving size."""
    centre_3 = torch.zeros(3, dtype=torch.float64, device=rotation_33.device)
    best = float(score(rotation_33[None], centre_3[None]))
    angle, length = 8.0, 1.0
    for _ in range(24):
        turns = [rotation_about_axis(tuple(axis), s * angle).to(rotation_33) @ rotation_33
                 for axis in torch.eye(3).tolist() for s in (-1, 1)]  # fmt: skip
        moves = length * torch.cat([torch.eye(3), -torch.eye(3)]).to(centre_3) + centre_3
        rotations = torch.cat([torch.stack(turns), rotation_33.expand(6, 3, 3)])
        centres = torch.cat([centre_3.expand(6, 3), moves])
        value_R = score(rotations, centres)
        top = int(value_R.argmax())
        if float(value_R[top]) > best:
            best, rotation_33, centre_3 = float(value_R[top]), rotations[top], centres[top]
        else:
            angle, length = angle / 2, length / 2
    return best, rotation_33, centre_3


def _some_operators(symmetry: str, device: torch.device) -> Tensor:
    """A few operators of the group without the identity, spread over it."""
    operator_G33 = symmetry_matrices(symmetry)[1:]
    chosen = torch.linspace(0, len(operator_G33) - 1, min(_OPERATORS, len(operator_G33))).round().long()
    return operator_G33[chosen].to(device)


def _sampled(map_ZYX: Tensor, position_RP3: Tensor) -> Tensor:
    """The map at positions (x, y, z) px from the centre voxel, trilinear, 0 outside, [R, P]."""
    box = map_ZYX.shape[0]
    grid = (position_RP3 + box // 2) * (2 / (box - 1)) - 1
    volume = map_ZYX.expand(len(grid), 1, box, box, box)
    return torch.nn.functional.grid_sample(volume, grid[:, None, None], align_corners=True)[:, 0, 0, 0]
