"""A convolution of packed voxels, one residue of planes after another: by strides, on one device or shared by ranks.

The voxels w(k) of a transform of P per axis (real, the same at k and -k) are convolved by multiplying their inverse transform by
a radial factor. That transform at the planes z = s m + p, s strides, m = 0..M-1, M = P / s, p one of 0..s-1, needs M planes:

    phase    w(k) exp(2 pi i p k_z / P)
    fold     sum those with the same k_z modulo M
    transform (M, P, P), multiply by the factor at z = s m + p, transform back
    unfold   read k at k_z modulo M, times exp(-2 pi i p k_z / P)

and the sum of all residues is the convolution, exactly. The inverse transform is real and even: what residue s - p finds is the
complex conjugate of what p finds, so 0 <= p <= s / 2 are enough, those between counted twice. Of residues 0 and s / 2 half of the
planes are enough, as the others are theirs, mirrored (`fold.residue` makes use of that): with it any number of strides takes half
of the transforms of all planes. Memory is that of P / s planes, and ranks that each work on some residues need one sum over ranks
of what they found, and no exchange of transforms: for V voxels of b bytes each of R ranks sends 2 (R - 1) / R V b bytes
(`traffic`), less than twice the voxels however many ranks there are (the stride-based transform of OML-Relion, IPDPS 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.distributed.ranks import ALONE, Ranks
from verglas.kernels.fold import RadialTable, divide, fold, radial, unfold
from verglas.kernels.fold.residue import Residues, most_kept, served

# As large as one residue that are alive at a time: its transform, twice with the FFT's own, and planes; `fold.residue`: itself.
ARRAYS, ARRAYS_FUSED = 4, 1
# Bytes per element of P³ that all transforms of a convolution move (with `fold.residue`), and each residue beside them.
TRANSFORMS, TRANSFORMS_FUSED, PASSES = 63, 32, 3
LEAST, PER_VOXEL = 1e9, 6  # bytes of one residue that are always granted, in all and for each voxel (of single precision)


@dataclass(frozen=True)
class StrideConvolution:
    """rows: where the voxels lie; size: P; factor: what the inverse transform is multiplied by, of the distance from the origin
    in units of P (0 .. sqrt(3)/2); strides: a divisor of P; ranks: who share the residues."""

    rows: RowTable
    size: int
    factor: RadialTable
    strides: int
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.size % self.strides:
            raise ValueError(f"{self.strides} strides do not divide a transform of {self.size}")

    def __call__(self, values_V: Tensor, out_V: Tensor | None = None) -> Tensor:
        """The convolution at the stored voxels, of all ranks and on all ranks; values: float32 or float64 [V].

        out_V: filled and returned, by default new.
        """
        out_V = torch.empty_like(values_V) if out_V is None else out_V
        way, shape = self._way, (self.size // self.strides, self.size, self.size // 2 + 1)
        if way is not None and self._mine:
            self._fused(way, values_V.contiguous(), out_V, None, 0)
            return self.ranks.add_up(out_V, "convolution")
        out_V.zero_()
        for residue in self._mine:
            phase_Z2 = self._phase_Z2(residue, values_V)
            part = torch.view_as_complex(fold(values_V, self.rows, phase_Z2, shape))
            planes = torch.fft.irfftn(part, s=(shape[0], self.size, self.size), norm="forward")
            del part
            radial(planes, self._table, self.strides, residue)
            part = torch.fft.rfftn(planes)
            del planes
            unfold(torch.view_as_real(part), self.rows, self._times(residue) * phase_Z2, out_V)
        return self.ranks.add_up(out_V, "convolution")

    def quotients(self, values_V: Tensor, least: float) -> None:
        """values /= max(|their convolution|, least), in place: contiguous [V]. One residue alone takes no memory for the
        convolution."""
        if self._way is None or self.ranks.size > 1:
            divide(values_V, self(values_V), least)
            return
        self._fused(self._way, values_V, values_V if self.strides == 1 else torch.empty_like(values_V), values_V, least)

    def _fused(self, way: Residues, values_V: Tensor, out_V: Tensor, divided_V: Tensor | None, least: float) -> None:
        part, mine = way.part(), self._mine
        for residue in mine:
            last = divided_V if residue == mine[-1] else None
            phase_Z2, times = self._phase_Z2(residue, values_V), self._times(residue)
            way(values_V, part, self._table, phase_Z2, times, residue, out_V, residue == mine[0], last, least)

    @property
    def _mine(self) -> range:
        """This rank's residues."""
        return range(self.ranks.rank, self.strides // 2 + 1, self.ranks.size)

    @cached_property
    def _way(self) -> Residues | None:
        return served(self.rows, self.size // self.strides, self.size, self.factor.values_T)

    @cached_property
    def _table(self) -> RadialTable:
        """Of transforms without a scale."""
        return replace(self.factor, values_T=self.factor.values_T / float(self.size) ** 3)

    def _phase_Z2(self, residue: int, like: Tensor) -> Tensor:
        z = torch.arange(-self.rows.half, self.rows.half + 1, dtype=torch.float64, device=like.device)
        turn_Z = z * (2 * math.pi * residue / self.size)
        return torch.stack([turn_Z.cos(), turn_Z.sin()], 1).to(like.dtype)

    def _times(self, residue: int) -> int:
        """How often a residue counts."""
        return 1 if 2 * residue % self.strides == 0 else 2

    def traffic(self, values_V: Tensor) -> float:
        """Bytes that each rank sends for one convolution."""
        return 2 * (self.ranks.size - 1) / self.ranks.size * values_V.nbytes


def strides_for(
    size: int, element_bytes: int, ranks: int = 1, granted: float | None = None, fused: bool = False, result: float = 0
) -> int:
    """The number of strides whose convolution moves the fewest bytes through memory, of those that give work to all ranks and
    whose transforms take no more than was granted (the most there can be if none does); ValueError if `size` has too few
    divisors. granted: bytes; by default 6 for each voxel; fused: by `fold.residue`; result: bytes of the convolution beside what
    was granted, which one residue alone does not take (`quotients`)."""
    choices = [s for s in range(1, size // 2 + 1) if size % s == 0 and s // 2 + 1 >= ranks]
    if not choices:
        raise ValueError(f"a transform of {size} cannot be cut into the strides of {ranks} ranks")
    granted = max(LEAST, PER_VOXEL * element_bytes / 4 * voxels_in(size)) if granted is None else granted
    spare = result if fused and ranks == 1 else 0.0
    fit = [s for s in choices if residue_bytes(size, s, element_bytes, fused) <= granted + (spare if s == 1 else 0)]
    return min(fit or choices[-1:], key=lambda s: moved_bytes(s, ranks, fused))


def moved_bytes(strides: int, ranks: int, fused: bool) -> float:
    """Bytes per element of P³ that the rank with the most work moves; fused: half for residues that are their own mirror."""
    transforms = (TRANSFORMS_FUSED if fused else TRANSFORMS) / strides
    residues = range(strides // 2 + 1)
    each = [transforms * (0.5 if fused and 2 * p % strides == 0 else 1) + PASSES for p in residues]
    return max(sum(each[rank::ranks]) for rank in range(ranks))


def residue_bytes(size: int, strides: int, element_bytes: int, fused: bool = False) -> float:
    """What the transforms of one residue take; fused: by `fold.residue`, whose rows are padded."""
    if fused:
        return ARRAYS_FUSED * element_bytes * float(size) * (size + 16) * most_kept(size // strides, size)
    return ARRAYS * element_bytes * float(size) ** 3 / strides


def beside(voxels: float, size: int, strides: int, element_bytes: int) -> float:
    """Bytes that `quotients` takes by `fold.residue` beside the values: of what was convolved, and of transforms."""
    return (0 if strides == 1 else element_bytes * voxels) + residue_bytes(size, strides, element_bytes, fused=True)


def voxels_in(size: int) -> float:
    """About how many voxels the packed sphere has that fits into a transform of `size`."""
    return math.pi / 12 * float(size) ** 3
