"""Poses that are not searched: each particle has the one orientation that it came with, in every class.

It takes the place of an `OrientationGrid` in a search: one orientation a particle, without children or perturbation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.symmetry import symmetry_matrices
from verglas.expectation.local import nearest_directions
from verglas.expectation.sampling import OrientationGrid


@dataclass(frozen=True)
class GivenPoses:
    """Orientation b is the pose of particle b. rotation_B33: A, float64; direction_B: the nearest direction of `grid` (priors
    are kept by direction); all on one device."""

    grid: OrientationGrid
    rotation_B33: Tensor
    direction_B: Tensor

    @classmethod
    def of(cls, grid: OrientationGrid, rotation_B33: Tensor, device: torch.device) -> GivenPoses:
        """Of all particles. rotation_B33: in the order of the table."""
        rotation_B33 = rotation_B33.to(device)
        mates_G33 = symmetry_matrices(grid.symmetry).to(rotation_B33)
        view_D3 = grid.views_D33[:, 2].to(rotation_B33)
        _, direction_B = nearest_directions((rotation_B33[:, None] @ mates_G33)[:, :, 2], view_D3)
        return cls(grid, rotation_B33, direction_B)

    @property
    def count(self) -> int:
        """Number of orientations: of particles."""
        return len(self.rotation_B33)

    @property
    def n_directions(self) -> int:
        return self.grid.n_directions

    @property
    def children_per_orientation(self) -> int:
        return 1

    def direction_of(self, orientation_O: Tensor) -> Tensor:
        """Number of the direction; of orientations numbered through several classes, k * D + d."""
        class_O = torch.div(orientation_O, self.count, rounding_mode="floor")
        return class_O * self.n_directions + self.direction_B[orientation_O - class_O * self.count]

    def rotations(self, index_O: Tensor) -> Tensor:
        """Matrices A, float64 [O, 3, 3]."""
        return self.rotation_B33[index_O]

    def child_rotations(self, fine_index_F: Tensor) -> Tensor:
        """The only child of an orientation is itself."""
        return self.rotation_B33[fine_index_F]
