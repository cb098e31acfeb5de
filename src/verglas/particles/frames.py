"""Poses of particles whose map is turned, moved or mirrored: the new poses show the new map in the same images."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rotations import euler_from_matrix
from verglas.particles.table import POSE_LABELS, ParticleTable

# They speak of the old frame, and are only hints: left out rather than wrong.
PRIORS = ("rlnAngleRotPrior", "rlnAngleTiltPrior", "rlnAnglePsiPrior", "rlnOriginXPriorAngst", "rlnOriginYPriorAngst")


def turned_poses(table: ParticleTable, rotation_33: Tensor, centre_3: Tensor) -> ParticleTable:
    """Poses for the map out(R (r - c)) = in(r): A' = A R^T, origin' = origin - (A c)_xy.

    centre_3: c in Å, (x, y, z) from the centre voxel. The point A r = A' r' + A c of an image keeps its place.
    Raises InputError if the file has no poses.
    """
    pose_B33 = table.rotations()
    return with_poses(table, pose_B33 @ rotation_33.T, table.origins() - (pose_B33 @ centre_3)[:, :2])


def mirrored_poses(table: ParticleTable) -> ParticleTable:
    """Poses for the map out(-x, y, z) = in(x, y, z): A' = F A M, M = diag(-1, 1, 1), F = diag(1, 1, -1); origins stay.

    M mirrors the map; F turns the direction in which its density is summed up, which no projection shows.
    Raises InputError if the file has no poses.
    """
    mirror_33 = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    forward_33 = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    return with_poses(table, forward_33 @ table.rotations() @ mirror_33, table.origins())


def with_poses(table: ParticleTable, pose_B33: Tensor, origin_B2: Tensor) -> ParticleTable:
    """The table with these poses and origins (Å); origins in pixels (RELION 3.0) follow, priors of poses are left out."""
    columns = dict(zip(POSE_LABELS, euler_from_matrix(pose_B33).numpy().T))
    pixel_B = torch.tensor([group.pixel_size for group in table.groups], dtype=torch.float64)[table.group_index_B]
    for axis, moved_B in zip("XY", origin_B2.T):
        columns[f"rlnOrigin{axis}Angst"] = moved_B.numpy()
        if f"rlnOrigin{axis}" in table.frame.columns:
            columns[f"rlnOrigin{axis}"] = (moved_B / pixel_B).numpy()
    changed = table.with_columns(**columns)
    return changed.without_columns(*PRIORS)
