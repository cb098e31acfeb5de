"""The shared transform by strides: every s-th plane of the map at a time, from the planes of voxels that a rank has.

With P = s M, the planes z = s m + p of an inverse transform of P are

    sum over k of F(k) exp(2 pi i k (s m + p) / P)  =  sum over j < M of G(j) exp(2 pi i j m / M)
    G(j) = sum over k = j mod M of F(k) exp(2 pi i p k / P)

a phase, a fold and a transform of M. The transform is linear: each rank does it with the planes k that it has, and what all ranks
find is added up at the one that these planes of the map belong to (one reduce-scatter, in pieces, while the next one is made).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from verglas.distributed.arrivals import Arrivals, Piece
from verglas.distributed.ranks import Ranks
from verglas.projection.pruned import Fill, PaddedGrid, runs

MOST_STRIDES = 4  # of each rank: every stride is a message


@dataclass(frozen=True)
class Strides:
    """box: N; size: P; strides: s, a divisor of P; rank p mod (number of ranks) has planes p, p + s, ... of the padded map."""

    box: int
    size: int
    strides: int
    ranks: Ranks
    device: torch.device

    @classmethod
    def of(cls, box: int, size: int, ranks: Ranks, device: torch.device) -> Strides:
        """With as many strides as give all ranks the same work, or nearly so."""
        divisors = [s for s in range(ranks.size, size + 1) if size % s == 0]
        divisors = [s for s in divisors if s <= MOST_STRIDES * ranks.size] or divisors[:1]
        strides = min(divisors, key=lambda s: (-(-s // ranks.size) * ranks.size / s, s))
        return cls(box, size, strides, ranks, device)

    def planes_of(self, rank: int) -> Tensor:
        """z of the map (from 0) that a rank has, in the order of its parts."""
        found = [self._planes(residue)[0] for residue in range(rank, self.strides, self.ranks.size)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=self.device)

    def to_map(self, grid: PaddedGrid, fill: Fill, dtype: torch.dtype, wanted: range) -> Tensor:
        """This rank's planes of the map [n, m, N], real; grid: of the planes of voxels it has."""
        cut_ZYX = torch.empty(len(grid.plane_Z), len(wanted), grid.columns, dtype=dtype.to_complex(), device=self.device)
        for part in grid.column_runs():
            cut_ZYX[:, :, part] = grid.along_y(grid.filled(fill, part, dtype), wanted)
        out_ZYX = torch.empty(len(self.planes_of(self.ranks.rank)), len(wanted), self.box, dtype=dtype, device=self.device)

        def pieces() -> Iterator[Piece]:
            first = 0
            for residue in range(self.strides):
                rank, count = residue % self.ranks.size, len(self._planes(residue)[0])
                place = out_ZYX[first : first + count] if rank == self.ranks.rank else out_ZYX[:0]
                first += len(place)
                yield Piece(rank, partial(self.planes_of_map, grid, cut_ZYX, residue), partial(_put, place))

        Arrivals(self.ranks, pieces(), "transforms by strides").finish()
        return out_ZYX

    def planes_of_map(self, grid: PaddedGrid, cut_ZYX: Tensor, residue: int) -> Tensor:
        """What the planes of voxels give to the map's planes of a residue."""
        z_A, fold_A = self._planes(residue)
        out_ZYX = cut_ZYX.real.new_empty(len(z_A), cut_ZYX.shape[1], self.box)
        phase_Z = self._phase(grid.plane_Z, residue, cut_ZYX.dtype)
        each = max(cut_ZYX.shape[0], self.size // self.strides) * grid.columns
        for part in runs(cut_ZYX.shape[1], each, self.device):
            folded = cut_ZYX.new_zeros(self.size // self.strides, part.stop - part.start, grid.columns)
            folded.index_add_(0, grid.plane_Z % len(folded), cut_ZYX[:, part] * phase_Z)
            out_ZYX[:, part] = grid.along_x(torch.fft.ifft(folded, dim=0).index_select(0, fold_A).div_(self.strides))
        return out_ZYX

    def from_map(
        self, map_ZYX: Tensor, dtype: torch.dtype, grids: list[PaddedGrid], take: Callable[[Tensor, int], None]
    ) -> None:
        """Voxels of a map that all ranks have: each transforms its planes of the map. grids: of each rank's planes of voxels;
        take(cut_ZYX [Z, N, c], first column): what to do with this rank's, of which no more is there at a time."""
        mine = grids[self.ranks.rank]
        every_N = torch.arange(self.box, device=self.device)
        residues = [self._planes(p) for p in range(self.ranks.rank, self.strides, self.ranks.size)]
        halves = [
            mine.from_x(map_ZYX[z_A.to(map_ZYX.device)].to(self.device, dtype), z_A, every_N) for z_A, _ in residues
        ]  # fmt: skip
        most = max(len(grid.plane_Z) for grid in grids)

        def taken(first: int, cut_ZYX2: Tensor) -> None:
            take(torch.view_as_complex(cut_ZYX2), first)

        def pieces() -> Iterator[Piece]:
            for part in mine.column_runs(self.ranks.size * most):
                folded = [self._folded(half[:, :, part], fold_A) for half, (_, fold_A) in zip(halves, residues, strict=True)]
                for rank, grid in enumerate(grids):
                    yield Piece(rank, partial(self._planes_of_voxels, folded, grid.plane_Z), partial(taken, part.start))

        Arrivals(self.ranks, pieces(), "transforms by strides").finish()

    def _folded(self, half_ZYX: Tensor, fold_A: Tensor) -> Tensor:
        """The transform of M along z of the planes of one residue."""
        lines = half_ZYX.new_zeros(self.size // self.strides, *half_ZYX.shape[1:])
        return torch.fft.fft(lines.index_copy_(0, fold_A, half_ZYX), dim=0)

    def _planes_of_voxels(self, folded: list[Tensor], plane_Z: Tensor) -> Tensor:
        """What this rank's planes of the map give to planes of voxels, [Z, N, c, 2]."""
        parts = [
            one.index_select(0, plane_Z % len(one)) * self._phase(plane_Z, residue, one.dtype).conj()
            for one, residue in zip(folded, range(self.ranks.rank, self.strides, self.ranks.size), strict=True)
        ]
        return torch.view_as_real(torch.stack(parts).sum(0))

    def _planes(self, residue: int) -> tuple[Tensor, Tensor]:
        """(z of the map, m) of the planes s m + p that the map has."""
        z_A = torch.arange(self.box, device=self.device)
        at_A = (z_A - self.box // 2) % self.size
        chosen = at_A % self.strides == residue
        return z_A[chosen], at_A[chosen] // self.strides

    def _phase(self, plane_Z: Tensor, residue: int, dtype: torch.dtype) -> Tensor:
        """exp(2 pi i p k / P), [Z, 1, 1]."""
        turn_Z = (plane_Z * residue % self.size).double() * (2 * math.pi / self.size)
        return torch.complex(turn_Z.cos(), turn_Z.sin()).to(dtype)[:, None, None]


def _put(place_ZYX: Tensor, values_ZYX: Tensor) -> None:
    place_ZYX.copy_(values_ZYX)
