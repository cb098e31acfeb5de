"""Which rank solves for which part of a map: slabs of planes of the packed sums (`transforms` makes the map of them).

A rank has the planes +-z of a range of |z|. So Friedel partners are together, rotations about z and half turns about axes across
it lead from no slab to another, and no plane of the unpadded grid is cut. Everything per voxel is done by the rank that has it,
curves per shell are added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.core.symmetry_names import normalise_name
from verglas.distributed.ranks import Ranks

FEWEST_PLANES = 2  # of the unpadded grid and of the map, that a rank is asked to work on


@dataclass(frozen=True)
class Slabs:
    """whole: table of all sums; ends: rank q has the planes ends[q] <= |z| < ends[q + 1]; rows: table of this rank's planes;
    maps_on_host: maps that are made of them come to the host part by part, as whole ones may not fit where the slabs are."""

    whole: RowTable
    ends: tuple[int, ...]
    ranks: Ranks
    rows: RowTable
    maps_on_host: bool = False

    @classmethod
    def of(cls, whole: RowTable, padding: float, box: int, ranks: Ranks) -> Slabs | None:
        """Slabs that are alike in work, half of it counted by voxels, half by the lines along y that hold any; None where there
        are too few planes."""
        distance_Z = torch.arange(whole.half + 1)
        unpadded_Z = (distance_Z / padding + 0.5).long()
        length_ZY = whole.length_ZY[whole.half :].long()
        voxels_Z, lines_Z = length_ZY.sum(1).cpu().double(), length_ZY.amax(1).cpu().double()
        work_Z = voxels_Z / voxels_Z.sum() + lines_Z / lines_Z.sum()
        work_U = torch.zeros(int(unpadded_Z[-1]) + 1, dtype=torch.float64).index_add_(0, unpadded_Z, work_Z)
        if min(len(work_U), box) < FEWEST_PLANES * ranks.size:
            return None
        wanted = work_U.sum() * torch.arange(1, ranks.size) / ranks.size
        cuts = (torch.searchsorted(work_U.cumsum(0), wanted) + 1).tolist()
        for q in range(len(cuts)):  # at least one plane each
            cuts[q] = min(max(cuts[q], q + 1, cuts[q - 1] + 1 if q else 1), len(work_U) - (ranks.size - 1 - q))
        ends = tuple(torch.searchsorted(unpadded_Z, torch.tensor([0, *cuts, len(work_U)])).tolist())
        return cls(whole, ends, ranks, whole.only(whole.between(ends[ranks.rank], ends[ranks.rank + 1])))

    @property
    def mine(self) -> tuple[int, int]:
        """This rank has the planes mine[0] <= |z| < mine[1]."""
        return self.ends[self.ranks.rank], self.ends[self.ranks.rank + 1]

    def runs_of(self, rank: int) -> list[slice]:
        """Where the voxels of a rank lie among all."""
        low, high, half = self.ends[rank], self.ends[rank + 1], self.whole.half
        starts = self.whole.slab_starts
        if low == 0:
            return [slice(starts[half - high + 1], starts[half + high])]
        return [slice(starts[half - high + 1], starts[half - low + 1]), slice(starts[half + low], starts[half + high])]

    def cut(self, whole_VC: Tensor) -> Tensor:
        """This rank's voxels of all."""
        return torch.cat([whole_VC[part] for part in self.runs_of(self.ranks.rank)])

    def joined(self, mine_VC: Tensor, name: str = "sums of slices, symmetric") -> Tensor:
        """The voxels of all ranks, on all ranks; name: that they travel under."""
        whole_VC, first = mine_VC.new_empty(self.whole.count, mine_VC.shape[1]), 0
        for rank in range(self.ranks.size):
            for part in self.runs_of(rank):
                count = part.stop - part.start
                if rank == self.ranks.rank:
                    whole_VC[part] = mine_VC[first : first + count]
                    first += count
                self.ranks.of_rank(rank, whole_VC[part], name)
        return whole_VC

    def planes_of(self, rank: int, at_radius: bool = False) -> Tensor:
        """z of a rank's planes, ascending; those at the very radius, in which sums count for nothing, if they are asked for."""
        low, high = self.ends[rank], min(self.ends[rank + 1], int(self.whole.radius) + at_radius)
        above = torch.arange(low, high)
        return torch.cat([-above.flip(0), above[1:] if low == 0 else above])


def stays_in_planes(symmetry: str) -> bool:
    """Whether a point group's rotations lead from planes +-z to themselves alone: C and D groups do."""
    return normalise_name(symmetry)[0] in "CD"
