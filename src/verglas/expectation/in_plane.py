"""The grid of in-plane angles, for 2-D references: one direction, and angles psi about it.

It serves where `sampling.OrientationGrid` does (same names, same order of children), so a search need not know which it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from verglas.core.rotations import matrix_from_euler


@dataclass(frozen=True)
class InPlaneGrid:
    """P angles; orientation o is angle o, its child c has fine index o * C + c, C = 2^oversampling.

    psi_P: degrees, unperturbed, float64; perturbation: in coarse steps, added to every angle.
    """

    oversampling: int
    perturbation: float
    psi_P: Tensor

    @classmethod
    def build(cls, psi_step: float, oversampling: int, perturbation: float = 0.0) -> InPlaneGrid:
        """psi_step: coarse, degrees, rounded down so that it divides 360."""
        n_psi = math.ceil(360.0 / psi_step - 1e-9)
        return cls(oversampling, perturbation, torch.arange(n_psi, dtype=torch.float64) * (360.0 / n_psi))

    @property
    def n_directions(self) -> int:
        return 1

    @property
    def direction_D2(self) -> Tensor:
        """rot, tilt of the one direction, degrees [1, 2]."""
        return torch.zeros(1, 2, dtype=torch.float64)

    @property
    def n_psi(self) -> int:
        return len(self.psi_P)

    @property
    def count(self) -> int:
        """Number of coarse orientations."""
        return len(self.psi_P)

    @property
    def children_per_orientation(self) -> int:
        """C = 2^oversampling."""
        return 2**self.oversampling

    @property
    def psi_step(self) -> float:
        """Step between coarse angles, degrees."""
        return 360.0 / self.n_psi

    def direction_of(self, orientation_O: Tensor) -> Tensor:
        """Number of the direction of coarse orientations; of those of all classes, numbered through, that is the class."""
        return torch.div(orientation_O, self.n_psi, rounding_mode="floor")

    def rotations(self, index_O: Tensor) -> Tensor:
        """Perturbed matrices Rz(psi) of coarse orientations, float64 [O, 3, 3], on the device of the index."""
        return self._turns(0, index_O)

    def child_rotations(self, fine_index_F: Tensor) -> Tensor:
        """Perturbed matrices Rz(psi) of children, float64 [F, 3, 3], on the device of the index."""
        return self._turns(self.oversampling, fine_index_F)

    def _turns(self, levels: int, index_F: Tensor) -> Tensor:
        psi_F = self._psi_on(levels, index_F.device)[index_F.long()]
        zero_F = torch.zeros_like(psi_F)
        return matrix_from_euler(zero_F, zero_F, psi_F)

    def _psi_on(self, levels: int, device: torch.device) -> Tensor:
        """Perturbed angles, each of 2^levels equal parts of a step; brought to a device once."""
        key = levels, device
        if key not in self._psis:
            centre_C = (torch.arange(2**levels, dtype=torch.float64) + 0.5) / 2**levels - 0.5
            psi_Q = (self.psi_P[:, None] + centre_C * self.psi_step).flatten()
            self._psis[key] = (psi_Q + self.perturbation * self.psi_step).to(device)
        return self._psis[key]

    @cached_property
    def _psis(self) -> dict[tuple[int, torch.device], Tensor]:
        return {}
