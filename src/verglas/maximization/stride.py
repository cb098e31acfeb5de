"""A convolution of packed voxels, one residue of planes after another: by strides, on one device or shared by ranks.

The voxels w(k) of a transform of P per axis (real, the same at k and -k) are convolved by multiplying their inverse transform by
a radial factor. That transform at the planes z = s m + p, s strides, m = 0..M-1, M = P / s, p one of 0..s-1, needs M planes:

    phase    w(k) exp(2 pi i p k_z / P)
    fold     sum those with the same k_z modulo M
    transform (M, P, P), multiply by the factor at z = s m + p, transform back
    unfold   read k at k_z modulo M, times exp(-2 pi i p k_z / P)

and the sum of all residues is the convolution, exactly. So memory is that of P / s planes, and ranks that each work on some
residues need one sum over ranks of what they found, and no exchange of transforms: for V voxels of b bytes each of R ranks sends
2 (R - 1) / R V b bytes (`traffic`), less than twice the voxels however many ranks there are (the stride-based transform of
OML-Relion, IPDPS 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.distributed.ranks import ALONE, Ranks
from verglas.kernels.fold import RadialTable, fold, radial, unfold

BYTES = {"cpu": 2e9, "cuda": 16e9}  # what the transforms of one residue may take, unless more strides cannot be had
ARRAYS = 4  # as large as one residue that are alive at a time: its transform, twice with the FFT's own, and planes


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

    def __call__(self, values_V: Tensor) -> Tensor:
        """The convolution at the stored voxels, of all ranks and on all ranks; values: float32 or float64 [V]."""
        out_V = torch.zeros_like(values_V)
        z = torch.arange(-self.rows.half, self.rows.half + 1, dtype=torch.float64, device=values_V.device)
        for residue in range(self.ranks.rank, self.strides, self.ranks.size):
            turn_Z = z * (2 * math.pi * residue / self.size)
            phase_Z2 = torch.stack([turn_Z.cos(), turn_Z.sin()], 1).to(values_V.dtype)
            shape = (self.size // self.strides, self.size, self.size // 2 + 1)
            part = torch.view_as_complex(fold(values_V, self.rows, phase_Z2, shape))
            planes = torch.fft.irfftn(part, s=(shape[0], self.size, self.size), norm="forward")
            del part
            radial(planes, self.factor, self.strides, residue)
            unfold(torch.view_as_real(torch.fft.rfftn(planes)), self.rows, phase_Z2, out_V)
        out_V /= float(self.size) ** 3
        return self.ranks.add_up(out_V, "convolution")

    def traffic(self, values_V: Tensor) -> float:
        """Bytes that each rank sends for one convolution."""
        return 2 * (self.ranks.size - 1) / self.ranks.size * values_V.nbytes


def strides_for(size: int, element_bytes: int, device: torch.device, at_least: int = 1) -> int:
    """The fewest strides, no fewer than the ranks, whose residues fit in `BYTES`; ValueError if `size` has too few divisors."""
    needed = ARRAYS * element_bytes * float(size) ** 3
    choices = [s for s in range(at_least, size // 2 + 1) if size % s == 0]
    if not choices:
        raise ValueError(f"a transform of {size} cannot be cut into {at_least} strides")
    return next((s for s in choices if needed / s <= BYTES.get(device.type, 2e9)), choices[-1])
