"""Which rank solves for which part of a map: slabs of planes of the packed sums, and the transform back that ranks share.

A rank has the planes +-z of a range of |z|. So Friedel partners are together, rotations about z and half turns about axes across
it lead from no slab to another, and no plane of the unpadded grid is cut. Everything per voxel is done by the rank that has it,
curves per shell are added up. The transform goes along y where the planes are, then each rank gets a range of y, with all z.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.core.symmetry import symmetry_matrices
from verglas.distributed.ranks import Ranks
from verglas.projection.volume import runs

FEWEST_PLANES = 2  # of the unpadded grid and of the map, that a rank is asked to work on


@dataclass(frozen=True)
class Slabs:
    """whole: table of all sums; ends: rank q has the planes ends[q] <= |z| < ends[q + 1]; rows: table of this rank's planes."""

    whole: RowTable
    ends: tuple[int, ...]
    ranks: Ranks
    rows: RowTable

    @classmethod
    def of(cls, whole: RowTable, padding: float, box: int, ranks: Ranks) -> Slabs | None:
        """Slabs that are alike in work, half of it counted by voxels, half by planes; None where there are too few planes."""
        distance_Z = torch.arange(whole.half + 1)
        unpadded_Z = (distance_Z / padding + 0.5).long()
        voxels_Z = whole.length_ZY.long().sum(1).cpu()[whole.half :].double()
        work_Z = voxels_Z / voxels_Z.sum() + 1 / len(voxels_Z)
        work_U = torch.zeros(int(unpadded_Z[-1]) + 1, dtype=torch.float64).index_add_(0, unpadded_Z, work_Z)
        if min(len(work_U), box) < FEWEST_PLANES * ranks.size:
            return None
        wanted = work_U.sum() * torch.arange(1, ranks.size) / ranks.size
        cuts = (torch.searchsorted(work_U.cumsum(0), wanted) + 1).tolist()
        for q in range(len(cuts)):  # at least one plane each
            cuts[q] = min(max(cuts[q], q + 1, cuts[q - 1] + 1 if q else 1), len(work_U) - (ranks.size - 1 - q))
        ends = tuple(torch.searchsorted(unpadded_Z, torch.tensor([0, *cuts, len(work_U)])).tolist())
        mine_Z = _planes(whole, ends, ranks.rank)
        return cls(whole, ends, ranks, whole.only(mine_Z.to(whole.device)))

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

    def joined(self, mine_VC: Tensor) -> Tensor:
        """The voxels of all ranks, on all ranks."""
        whole_VC, first = mine_VC.new_empty(self.whole.count, mine_VC.shape[1]), 0
        for rank in range(self.ranks.size):
            for part in self.runs_of(rank):
                count = part.stop - part.start
                if rank == self.ranks.rank:
                    whole_VC[part] = mine_VC[first : first + count]
                    first += count
                self.ranks.of_rank(rank, whole_VC[part], "sums of slices, symmetric")
        return whole_VC

    def planes(self) -> Tensor:
        """z of this rank's planes, ascending; those at the very radius, which hold nothing, are left out."""
        return self._planes_of(self.ranks.rank)

    def cropped_map(self, mine_ZYX: Tensor, box: int, wanted: range) -> Tensor:
        """As `volume.cropped_map`, of a transform whose planes (`planes`) the ranks have: this rank's part [N, n, N] along y.

        mine_ZYX: complex [planes, P, columns]; it is used up. wanted: y of the map [N] that are wanted.
        """
        size, me = mine_ZYX.shape[1], self.ranks.rank
        first = size // 2 - box // 2
        inner, inner_y = slice(first, first + box), slice(first + wanted.start, first + wanted.stop)
        odd = self.planes().to(mine_ZYX.device) % 2 != 0
        mine_ZYX[odd] *= -1  # as `volume.centre`
        mine_ZYX[:, 1::2] *= -1
        mine_ZYX[:, :, 1::2] *= -1
        along_y = mine_ZYX.new_empty(len(mine_ZYX), len(wanted), mine_ZYX.shape[2])
        for part in runs(len(mine_ZYX), size * mine_ZYX.shape[2], mine_ZYX.device):
            along_y[part] = torch.fft.ifft(mine_ZYX[part], dim=1)[:, inner_y]
        ends, columns, device = self.ends_along_y(range(len(wanted))), mine_ZYX.shape[2], mine_ZYX.device
        count = ends[me + 1] - ends[me]
        disc = [self._disc(rank, columns, device) for rank in range(self.ranks.size)]
        plane, column = disc[me]
        along_y = along_y.transpose(1, 2)[torch.searchsorted(self.planes().to(device), plane), column]
        sent = [torch.view_as_real(along_y[:, low:high].contiguous()) for low, high in pairwise(ends)]
        del along_y
        all_ZXY = mine_ZYX.new_zeros(size, columns, count)
        shapes = [(len(plane), count, 2) for plane, _ in disc]
        for (plane, column), found in zip(disc, self.ranks.exchanged(sent, shapes, "transforms"), strict=True):
            all_ZXY[plane % size, column] = torch.view_as_complex(found)
        map_ZYX = all_ZXY.real.new_empty(box, count, box)
        for part in runs(count, size * (size // 2 + 1), device):
            along_z = torch.fft.ifft(all_ZXY[:, :, part], dim=0)[inner]
            map_ZYX[:, part] = torch.fft.irfft(along_z, n=size, dim=1)[:, inner].transpose(1, 2)
        return map_ZYX.mul_(box**2)

    def ends_along_y(self, wanted: range) -> list[int]:
        """Rank q has the rows ends[q] <= y < ends[q + 1] of those that are wanted."""
        return [wanted.start + len(wanted) * rank // self.ranks.size for rank in range(self.ranks.size + 1)]

    def rows_along_y(self, wanted: range) -> slice:
        """This rank's rows of the map."""
        ends = self.ends_along_y(wanted)
        return slice(ends[self.ranks.rank], ends[self.ranks.rank + 1])

    def whole_map(self, mine_ZYX: Tensor, wanted: range, support_ZYX: Tensor | None) -> Tensor:
        """The map [N, N, N] on all ranks, from each one's rows of those that are wanted.

        support: bool, voxels that are wanted; the others are 0."""
        box = len(mine_ZYX)
        out = mine_ZYX.new_zeros(box, box, box)
        for rank, (low, high) in enumerate(pairwise(self.ends_along_y(wanted))):
            mine = rank == self.ranks.rank
            part_ZYX = out[:, low:high]
            inside = None if support_ZYX is None else support_ZYX[:, low:high]
            if inside is None:
                values = mine_ZYX.contiguous() if mine else part_ZYX.contiguous()
                part_ZYX.copy_(self.ranks.of_rank(rank, values, "maps"))
            else:
                values = mine_ZYX[inside] if mine else mine_ZYX.new_empty(int(inside.sum()))
                part_ZYX[inside] = self.ranks.of_rank(rank, values, "maps")
        return out

    def _disc(self, rank: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(z, x) of the lines along y that hold anything, in a rank's planes."""
        plane_Z = self._planes_of(rank).to(device)
        column_X = torch.arange(columns, device=device)
        z, x = (plane_Z[:, None] ** 2 + column_X**2 < self.whole.radius**2).nonzero(as_tuple=True)
        return plane_Z[z], x

    def _planes_of(self, rank: int) -> Tensor:
        low, high = self.ends[rank], min(self.ends[rank + 1], int(self.whole.radius))
        above = torch.arange(low, high)
        return torch.cat([-above, above]).unique()


def extent_along_y(support_ZYX: Tensor) -> range:
    """From the first to the last y of a mask's voxels."""
    y = support_ZYX.any(2).any(0).nonzero()
    return range(int(y.min()), int(y.max()) + 1) if len(y) else range(0)


def _planes(whole: RowTable, ends: tuple[int, ...], rank: int) -> Tensor:
    """Which planes of the table a rank has, bool [edge]."""
    distance_Z = torch.arange(-whole.half, whole.half + 1).abs()
    return (distance_Z >= ends[rank]) & (distance_Z < ends[rank + 1])


def stays_in_planes(symmetry: str) -> bool:
    """Whether a point group's rotations lead from planes +-z to themselves alone: C and D groups do."""
    return bool((symmetry_matrices(symmetry)[:, 2, 2].abs() == 1).all())
