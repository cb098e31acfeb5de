"""The grids on which poses are searched: HEALPix directions times in-plane angles, and a disc of offsets.

Coarse samples are searched first; each has children on a grid 2^oversampling times finer, which are compared only where
the coarse sample matters. Both grids are displaced by a perturbation, drawn anew each iteration, so that their artefacts
average out. Numbers and orders of samples are RELION's, so that its files and ours speak of the same samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from verglas.core.memory import uploaded
from verglas.core.rotations import matrix_from_euler
from verglas.core.symmetry import symmetry_matrices
from verglas.core.symmetry_names import normalise_name
from verglas.errors import InputError
from verglas.expectation.healpix import child_pixels, directions_of_pixels, largest_radius, pixel_count

_SEAMS_CHECKED_BELOW = 4000  # directions; on finer grids the seams are a small fraction and are left alone
PIXELS_AT_ONCE = 2**18  # directions whose matrices, with those of their children, are made at a time

# Inner normals of the asymmetric units' planes (docs/conventions.md: axis settings).
_PLANES: dict[str, list[tuple[float, float, float]]] = {
    "T": [(-0.942809, 0.0, 0.0), (0.471405, 0.272165, 0.7698), (0.471404, 0.816497, 0.0)],
    "O": [(0.0, -1.0, 1.0), (1.0, 1.0, 0.0), (-1.0, 1.0, 0.0)],
    "I2": [(0.0, 1.0, 0.0), (-0.4999999839058737, -0.8090170074556163, 0.3090169861701543),
           (0.4999999839058737, -0.8090170074556163, 0.3090169861701543)],
    "I4": [(0.0, 0.0, -1.0), (-0.187592467856686, 0.303530987314591, 0.491123477863004),
           (-0.187592467856686, -0.303530987314591, 0.491123477863004)],
}  # fmt: skip
_PLANES["I1"] = _PLANES["I3"] = _PLANES["I2"]
_PLANES_TURNED_BY = {"I1": 90.0, "I3": 31.7174745559, "I4": -31.7174745559}  # tilt in degrees


def view_vectors(direction_D2: Tensor) -> Tensor:
    """Unit vectors (sin tilt cos rot, sin tilt sin rot, cos tilt) of (rot, tilt) in degrees, [D, 3]."""
    rot, tilt = (direction_D2 * math.pi / 180.0).unbind(-1)  # rounded in this order, see _inside_unit
    return torch.stack([tilt.sin() * rot.cos(), tilt.sin() * rot.sin(), tilt.cos()], -1)


def asymmetric_unit(direction_angles: Tensor, symmetry: str) -> Tensor:
    """Which directions (rot, tilt in degrees, [D, 2], a whole HEALPix grid in its order) make up one asymmetric unit: bool [D].

    Where fewer than 4000 remain, directions on the unit's seams are kept once: a direction is dropped when a symmetry mate
    of an earlier one that was kept is closer than half the largest radius of a pixel.
    """
    inside = _inside_unit(direction_angles, normalise_name(symmetry))
    number_D = torch.nonzero(inside)[:, 0]
    if len(number_D) < _SEAMS_CHECKED_BELOW:
        order = round(math.log2(len(direction_angles) / 12) / 2)
        kept = _without_mates(view_vectors(direction_angles[number_D]), symmetry, 0.5 * largest_radius(order))
        inside = torch.zeros_like(inside).index_fill_(0, number_D[kept], True)
    return inside


def _inside_unit(direction_D2: Tensor, name: str) -> Tensor:
    """Directions in the closed asymmetric unit of a group with canonical name `name`, bool [D]."""
    rot, tilt = direction_D2.unbind(-1)
    if name[0] in "CD":
        half = 180.0 / int(name[1:])
        middle = 90.0 if name[0] == "D" else 0.0
        wedge = (rot >= middle - half) & (rot <= middle + half)
        if name == "D1":  # its wedge is the whole circle, which rot in (-180, 180] does not cover about 90
            wedge = torch.ones_like(wedge)
        return wedge & (tilt <= 90.0) if name[0] == "D" else wedge
    normals = torch.tensor(_PLANES[name], dtype=torch.float64)
    normals = normals / normals.norm(dim=1, keepdim=True)
    if name in _PLANES_TURNED_BY:
        angles = torch.tensor([0.0, _PLANES_TURNED_BY[name], 0.0], dtype=torch.float64)
        normals = normals @ matrix_from_euler(*angles).T
    # Many directions lie exactly on a plane, where rounding decides: products and sums in RELION's order give its choice.
    x, y, z = view_vectors(direction_D2)[:, :, None].unbind(1)
    inside = (x * normals[:, 0] + y * normals[:, 1] + z * normals[:, 2] >= 0).all(1)
    if name == "T":
        return inside & (((rot >= 90) & (rot <= 150)) | (rot == 0))
    if name == "O":
        return inside & (((rot >= 45) & (rot <= 135) & (tilt <= 90)) | (rot == 0))
    return inside


def _without_mates(vector_D3: Tensor, symmetry: str, nearest: float) -> Tensor:
    """Numbers of the vectors that are kept when mates closer than `nearest` degrees of earlier kept ones are dropped."""
    close_to = math.cos(math.radians(nearest))
    mates_G3D = (vector_D3 @ symmetry_matrices(symmetry)).transpose(1, 2)
    keep = [True] * len(vector_D3)
    for start in range(0, len(vector_D3), 256):
        best = (vector_D3[start : start + 256] @ mates_G3D[0]).fill_(-1)
        for mate_3D in mates_G3D:
            torch.maximum(best, vector_D3[start : start + 256] @ mate_3D, out=best)
        for later, earlier in (torch.nonzero(best > close_to) + torch.tensor([start, 0])).tolist():
            if earlier < later and keep[earlier]:
                keep[later] = False
    return torch.nonzero(torch.tensor(keep))[:, 0]


@lru_cache(maxsize=8)  # every iteration asks for them several times
def directions_of_unit(healpix_order: int, symmetry: str) -> tuple[Tensor, Tensor]:
    """Directions of an order in the asymmetric unit: (rot, tilt) in degrees [D, 2] and their NEST pixels [D], ascending.

    symmetry: canonical name. Not to be changed: all callers share them.
    """
    pixel_D = torch.arange(pixel_count(healpix_order))
    direction_D2 = directions_of_pixels(healpix_order, pixel_D)
    kept = asymmetric_unit(direction_D2, symmetry)
    return direction_D2[kept], pixel_D[kept]


@lru_cache(maxsize=4)
def views_of_unit(healpix_order: int, levels: int, symmetry: str, device: torch.device) -> Tensor:
    """Matrices Ry(tilt) Rz(rot) of the descendants, `levels` orders down, of these directions, float64 [D * 4^levels, 3, 3]."""
    _, healpix_D = directions_of_unit(healpix_order, symmetry)
    within, views = 4**levels, torch.empty(len(healpix_D) * 4**levels, 3, 3, dtype=torch.float64, device=device)
    for part_D, part_E33 in zip(healpix_D.split(PIXELS_AT_ONCE), views.split(PIXELS_AT_ONCE * within), strict=True):
        pixels = child_pixels(part_D.to(device), levels).reshape(-1)  # of order 9 there are 13 million: a host takes seconds
        rot, tilt = directions_of_pixels(healpix_order + levels, pixels).unbind(-1)
        part_E33.copy_(matrix_from_euler(rot, tilt, torch.zeros_like(rot)))
    return views


@dataclass(frozen=True)
class OrientationGrid:
    """D directions x P in-plane angles; orientation o = d * P + p, its child c has fine index o * C + c.

    direction_D2: rot, tilt of the coarse directions in degrees, unperturbed, float64; healpix_D: their NEST pixels, ascending;
    psi_P: in-plane angles, degrees, unperturbed. perturbation: in coarse steps; every pose A becomes A Rot(d, d, d) with
    d = perturbation * angular_step. Children: centres of the NEST pixel's descendants (outer) x in-plane angles (inner).
    """

    healpix_order: int
    oversampling: int
    symmetry: str
    perturbation: float
    direction_D2: Tensor
    healpix_D: Tensor
    psi_P: Tensor

    @classmethod
    def build(
        cls, healpix_order: int, oversampling: int, symmetry: str, perturbation: float = 0.0, psi_step: float | None = None
    ) -> OrientationGrid:
        """The grid of an order; psi_step (degrees, coarse): None for the angular step, else rounded so that it divides 360."""
        if not 0 <= healpix_order <= 10 or not 0 <= oversampling <= 4:
            raise InputError("sampling", f"HEALPix order {healpix_order}, oversampling {oversampling}",
                             "order 0 to 10, oversampling 0 to 4", "Choose a coarser grid; order 2 is usual.")  # fmt: skip
        name = normalise_name(symmetry)
        direction_D2, healpix_D = directions_of_unit(healpix_order, name)
        if len(healpix_D) == 0:
            raise InputError("sampling", f"no direction of HEALPix order {healpix_order} in the asymmetric unit of {symmetry}",
                             "a grid fine enough for the symmetry", f"Use order {healpix_order + 1} or more.")  # fmt: skip
        n_psi = math.ceil(360.0 / (psi_step or angular_step(healpix_order)))
        psi_P = torch.arange(n_psi, dtype=torch.float64) * (360.0 / n_psi)
        return cls(healpix_order, oversampling, name, perturbation, direction_D2, healpix_D, psi_P)

    @property
    def n_directions(self) -> int:
        return len(self.healpix_D)

    @property
    def n_psi(self) -> int:
        return len(self.psi_P)

    @property
    def count(self) -> int:
        """Number of coarse orientations, D * P."""
        return self.n_directions * self.n_psi

    @property
    def children_per_orientation(self) -> int:
        """C = 8^oversampling."""
        return 8**self.oversampling

    @property
    def angular_step(self) -> float:
        """Step between coarse directions, degrees."""
        return angular_step(self.healpix_order)

    @property
    def psi_step(self) -> float:
        """Step between coarse in-plane angles, degrees."""
        return 360.0 / self.n_psi

    def direction_of(self, orientation_O: Tensor) -> Tensor:
        """Number of the direction of coarse orientations."""
        return torch.div(orientation_O, self.n_psi, rounding_mode="floor")

    def rotations(self, index_O: Tensor | None = None) -> Tensor:
        """Perturbed matrices A of coarse orientations (all of them if None), float64 [O, 3, 3], on the device of the index."""
        index_O = torch.arange(self.count) if index_O is None else index_O.long()
        direction = self.direction_of(index_O)
        view_O33 = self._perturbed_views(0, direction)
        return _turned_in_plane(view_O33, self._tables(0, index_O.device), index_O - direction * self.n_psi)

    def child_rotations(self, fine_index_F: Tensor) -> Tensor:
        """Perturbed matrices A of children, fine index o * C + c, float64 [F, 3, 3], on the device of the index."""
        in_plane = 2**self.oversampling  # children of an in-plane angle
        within = in_plane**2  # children of a direction
        orientation = torch.div(fine_index_F.long(), in_plane * within, rounding_mode="floor")
        child = fine_index_F.long() - orientation * (in_plane * within)
        direction = self.direction_of(orientation)
        psi = orientation - direction * self.n_psi
        row = direction * within + torch.div(child, in_plane, rounding_mode="floor")
        view_F33 = self._perturbed_views(self.oversampling, row)
        return _turned_in_plane(view_F33, self._tables(self.oversampling, view_F33.device), psi * in_plane + child % in_plane)

    @property
    def views_D33(self) -> Tensor:
        """Unperturbed coarse matrices with psi = 0, Ry(tilt) Rz(rot), float64 [D, 3, 3]."""
        return views_of_unit(self.healpix_order, 0, self.symmetry, torch.device("cpu"))

    def _perturbed_views(self, levels: int, row_F: Tensor) -> Tensor:
        """Perturbed matrices with psi = 0 of descendants of the directions, numbered direction * 4^levels + child, [F, 3, 3]."""
        view_E33 = views_of_unit(self.healpix_order, levels, self.symmetry, row_F.device)
        return view_E33[row_F] @ self._tables(levels, row_F.device).perturbing_33

    def _tables(self, levels: int, device: torch.device) -> _Tables:
        """What matrices of coarse orientations (0 levels) or of children are made from; brought to a device once."""
        key = levels, device
        if key not in self._tables_on:
            psi_Q = self.psi_P if levels == 0 else (self.psi_P[:, None] + _cell_centres(self.psi_step, levels)).reshape(-1)
            psi_Q = torch.deg2rad(uploaded(psi_Q, device))
            turn = torch.tensor(self.perturbation * self.angular_step, dtype=torch.float64)
            self._tables_on[key] = _Tables(psi_Q.cos(), psi_Q.sin(), uploaded(matrix_from_euler(turn, turn, turn), device))
        return self._tables_on[key]

    @cached_property
    def _tables_on(self) -> dict[tuple[int, torch.device], _Tables]:
        return {}


@dataclass(frozen=True)
class _Tables:
    """On one device: cosines and sines of in-plane angles, and the turn of the perturbation."""

    cosine_Q: Tensor
    sine_Q: Tensor
    perturbing_33: Tensor


@dataclass(frozen=True)
class OffsetGrid:
    """Offsets (x, y) in Å that are tried about a particle's present one, perturbed, float64.

    coarse_T2: coarse offsets, x outer, y inner; fine_F2: children, fine index t * 4^oversampling + c, x outer, y inner.
    """

    step: float
    oversampling: int
    coarse_T2: Tensor
    fine_F2: Tensor

    @classmethod
    def build(cls, range_angstrom: float, step_angstrom: float, oversampling: int, perturbation: float = 0.0) -> OffsetGrid:
        """Offsets on a square grid of a step (Å) up to a range (Å), all displaced along x and y by perturbation * step."""
        if not (step_angstrom > 0 and range_angstrom >= 0):
            raise InputError("offsets", f"range {range_angstrom:g} Å, step {step_angstrom:g} Å", "a range >= 0, a step > 0",
                             "Give a range of a few pixels and a step of one or two.")  # fmt: skip
        reach = math.ceil(range_angstrom / step_angstrom)
        axis = torch.arange(-reach, reach + 1, dtype=torch.float64) * step_angstrom
        square_T2 = torch.cartesian_prod(axis, axis)
        # The margin keeps offsets at exactly the range, whatever the rounding.
        disc_T2 = square_T2[square_T2.square().sum(1) < range_angstrom**2 + 0.001]
        coarse_T2 = disc_T2 + perturbation * step_angstrom
        cell = _cell_centres(step_angstrom, oversampling)
        fine_F2 = (coarse_T2[:, None] + torch.cartesian_prod(cell, cell).reshape(-1, 2)).reshape(-1, 2)
        return cls(step_angstrom, oversampling, coarse_T2, fine_F2)

    def to(self, device: torch.device) -> OffsetGrid:
        """The same on a device."""
        return replace(self, coarse_T2=uploaded(self.coarse_T2, device), fine_F2=uploaded(self.fine_F2, device))

    @property
    def count(self) -> int:
        return len(self.coarse_T2)

    @property
    def children_per_offset(self) -> int:
        return 4**self.oversampling


def angular_step(healpix_order: int) -> float:
    """Step in degrees that stands for a HEALPix order, 360 / (6 * 2^order)."""
    return 360.0 / (6 * 2**healpix_order)


def _cell_centres(step: float, oversampling: int) -> Tensor:
    """Centres of the 2^oversampling equal parts of a cell of width `step` about 0."""
    parts = 2**oversampling
    return (torch.arange(parts, dtype=torch.float64) + 0.5) * (step / parts) - 0.5 * step


def _turned_in_plane(view_F33: Tensor, tables: _Tables, psi_index_F: Tensor) -> Tensor:
    """Rz(psi) V for views V and in-plane angles, picked by index: rows 0 and 1 turn, row 2 stays."""
    cosine, sine = tables.cosine_Q[psi_index_F, None], tables.sine_Q[psi_index_F, None]
    out = torch.empty_like(view_F33)
    out[:, 0] = cosine * view_F33[:, 0] + sine * view_F33[:, 1]
    out[:, 1] = cosine * view_F33[:, 1] - sine * view_F33[:, 0]
    out[:, 2] = view_F33[:, 2]
    return out
