"""Sums of slices whose data and weights lie apart, and what maps are made of them in place: for as few bytes as there can be.

Of a voxel 12 bytes are kept, or 8 of data or 4 of weights alone (`in_rounds`). Slices wait until there are many of them: each
addition walks through all voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.symmetry import symmetry_matrices
from verglas.kernels.backproject import Apart, backproject
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.shells import add_prior_cuda, divide_voxels_cuda, serves
from verglas.maximization.solve import SolvedSums
from verglas.projection.axes import Sums
from verglas.projection.volume import padded_size, sampling_matrices

Curves = tuple[Tensor, Tensor, Tensor]
"""(prior, floor, gain) by shell."""


class ApartSums:
    """Slices are added as to an `Accumulator`, at all poses of the point group, in single precision.

    data, weights: which sums are wanted; most: slices that wait, each of which takes `slice_bytes`.
    """

    def __init__(
        self, geometry: Geometry, symmetry: str, device: torch.device, data: bool = True, weights: bool = True, most: int = 1
    ) -> None:  # fmt: skip
        if most < 1:
            raise ValueError(f"{most} slices cannot wait")
        self.geometry, self.slices = geometry, 0
        self.rows = geometry.rows(device)
        self.padding = padded_size(geometry.box, geometry.padding) / geometry.box
        self.sums = Apart(
            torch.zeros(self.rows.count, 2, device=device) if data else None,
            torch.zeros(self.rows.count, device=device) if weights else None,
        )
        self.turn_G33, self._most = symmetry_matrices(symmetry), most
        self._waiting: list[Tensor] = []  # data [S, 2, K] and weights [S, K], of those that are wanted
        self._coordinates_K3: Tensor | None = None
        self._rotations: list[Tensor] = []

    def add(self, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """As `Accumulator.add`."""
        fresh = [one for one, sums in ((data_R2K, self.sums.data_V2), (weight_RK, self.sums.weight_V)) if sums is not None]
        if self._coordinates_K3 is not coordinates_K3:
            self._add_waiting()
            self._coordinates_K3, self._waiting = coordinates_K3, []  # no memory before more is taken
            self._waiting = [one.new_empty(self._most, *one.shape[1:]) for one in fresh]
        begin = 0
        while begin < len(rotation_R33):
            there = sum(map(len, self._rotations))
            end = min(len(rotation_R33), begin + self._most - there)
            for room, values in zip(self._waiting, fresh, strict=True):
                room[there : there + end - begin] = values[begin:end]
            self._rotations.append(rotation_R33[begin:end])
            if there + end - begin == self._most:
                self._add_waiting()
            begin = end
        self.slices += len(rotation_R33)

    def _add_waiting(self) -> None:
        if not self._rotations:
            return
        assert self._coordinates_K3 is not None
        rotation_S33, self._rotations = torch.cat(self._rotations), []
        some = [one[: len(rotation_S33)] for one in self._waiting]
        data, weight = some[0] if self.sums.data_V2 is not None else None, some[-1] if self.sums.weight_V is not None else None
        for turn in self.turn_G33:
            sampling_S33 = sampling_matrices(rotation_S33 @ turn.to(rotation_S33), self.padding)
            sampling_S33 = sampling_S33.to(self.sums.device, torch.float32)
            backproject(self.sums, self.rows, data, weight, sampling_S33, self._coordinates_K3)

    def solved(self, weight_V: Tensor | None = None) -> SolvedSums:
        """The sums, with Friedel partners on x = 0; nothing can be added any more. weight_V: of sums of data alone; those of
        weights alone have no data."""
        self._add_waiting()
        self._waiting = []
        rows, data_V2, own_V = self.rows, self.sums.data_V2, self.sums.weight_V
        start = rows.start_ZY[rows.length_ZY > 0].long()
        partner = rows.start_ZY.flip(0, 1)[rows.length_ZY > 0].long()
        origin = rows.start_ZY[rows.half, rows.half]
        if data_V2 is not None:
            data_V2[start] = data_V2[start] + data_V2[partner] * data_V2.new_tensor([1.0, -1.0])
            data_V2[origin] /= 2
        if own_V is not None:
            own_V[start] = own_V[start] + own_V[partner]
            own_V[origin] /= 2
        weight_V = own_V if weight_V is None else weight_V
        assert weight_V is not None
        data_V2 = weight_V.new_empty(0, 2) if data_V2 is None else data_V2
        return SolvedSums(data_V2, weight_V, rows, self.geometry.box, self.geometry.radius, self.padding)


def slice_bytes(samples: int, data: bool, weights: bool) -> int:
    """Of a slice that waits."""
    return samples * (8 * data + 4 * weights)


def divide(sums: SolvedSums, curves_S: Curves) -> None:
    """data /= max(weight + prior, floor) gain of voxels nearer than the radius, in place: as `SolvedSums.map` has them."""
    if serves(sums.weight_V, sums.data_V2):
        divide_voxels_cuda(Sums(sums.data_V2, sums.rows, sums.weight_V, curves_S, sums.padding))
        return
    prior_S, floor_S, gain_S = (curve.to(sums.weight_V) for curve in curves_S)
    for part, _, r, inside in sums._radii():
        shell = (r + 0.5).long()
        weight = torch.maximum(sums.weight_V[part] + prior_S[shell], floor_S[r.long()])
        scale = torch.where(weight > 0, 1 / (weight * gain_S[shell]).clamp_min(1e-30), 0)
        sums.data_V2[part] *= torch.where(inside, scale, 1)[:, None]


def add_prior(sums: SolvedSums, prior_S: Tensor) -> None:
    """weight += prior of voxels nearer than the radius, in place; those of the others are 0 then."""
    if serves(sums.weight_V):
        curves_S = prior_S, 0 * prior_S, 0 * prior_S
        add_prior_cuda(Sums(sums.data_V2, sums.rows, sums.weight_V, curves_S, sums.padding))
        return
    for part, weight in sums._with_prior(prior_S):
        sums.weight_V[part] = weight
