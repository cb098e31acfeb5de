"""Several references in one search: a class is more columns of the same matrix products.

Orientations of all classes are numbered through: orientation o of class k is k * O + o, its child c has fine index
(k * O + o) * C + c, its direction k * D + d. Lists, posteriors and sums of a search need not know more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.expectation.given import GivenPoses
from verglas.expectation.in_plane import InPlaneGrid
from verglas.expectation.sampling import OrientationGrid
from verglas.kernels.blocks import owner


@dataclass(frozen=True)
class ClassGrid:
    """The grid of orientations once per class. classes: how many references are searched."""

    grid: OrientationGrid | GivenPoses | InPlaneGrid
    classes: int = 1

    @property
    def count(self) -> int:
        """Coarse orientations of all classes, K * O."""
        return self.classes * self.grid.count

    @property
    def n_directions(self) -> int:
        """Directions of all classes, K * D."""
        return self.classes * self.grid.n_directions

    @property
    def children_per_orientation(self) -> int:
        return self.grid.children_per_orientation

    def direction_of(self, orientation_O: Tensor) -> Tensor:
        """Number of the direction, k * D + d, of coarse orientations."""
        return self.grid.direction_of(orientation_O)  # classes come whole directions after one another

    def class_of(self, orientation_O: Tensor) -> Tensor:
        """Class k of coarse orientations, int64."""
        return torch.div(orientation_O, self.grid.count, rounding_mode="floor")

    def class_of_child(self, fine_index_F: Tensor) -> Tensor:
        """Class k of children, int64."""
        return self.class_of(torch.div(fine_index_F, self.children_per_orientation, rounding_mode="floor"))

    def rotations(self, orientation_O: Tensor) -> Tensor:
        """Perturbed matrices A of coarse orientations, float64 [O, 3, 3], on the device of the index."""
        return self.grid.rotations(orientation_O % self.grid.count)

    def child_rotations(self, fine_index_F: Tensor) -> Tensor:
        """Perturbed matrices A of children, float64 [F, 3, 3], on the device of the index."""
        return self.grid.child_rotations(fine_index_F % (self.grid.count * self.children_per_orientation))

    def in_every_class(self, ptr_B1: Tensor, orientation_N: Tensor, value_N: Tensor, log_share_C: Tensor) -> tuple[Tensor, ...]:
        """CSR lists of one class's orientations repeated for each class, log_share_C (of each class) added to the values.

        Returns (ptr_B1, orientation_N, value_N), ascending for each particle as the lists given are.
        """
        if self.classes == 1:
            return ptr_B1, orientation_N, value_N
        length_B = ptr_B1.diff()
        owner_N = owner(ptr_B1, len(value_N))
        within_N = torch.arange(len(value_N), device=ptr_B1.device) - ptr_B1[owner_N]
        classes_C = torch.arange(self.classes, device=ptr_B1.device)
        place_NC = (self.classes * ptr_B1[owner_N] + within_N)[:, None] + length_B[owner_N, None] * classes_C
        orientation_M = orientation_N.new_empty(self.classes * len(orientation_N))
        value_M = value_N.new_empty(len(orientation_M))
        orientation_M[place_NC] = orientation_N[:, None] + self.grid.count * classes_C
        value_M[place_NC] = value_N[:, None] + log_share_C.to(value_N)
        return self.classes * ptr_B1, orientation_M, value_M


def runs_of(class_R: Tensor, classes: int) -> list[int]:
    """Where the entries of each class begin in an ascending list of classes, and its end: K + 1 numbers."""
    edges = torch.arange(classes + 1, device=class_R.device)
    return torch.searchsorted(class_R.contiguous(), edges).tolist()
