"""Small made-up ptychographic worlds for tests: random objects and probes, every part of the model there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.ptychography.reference import pattern_reference
from verglas.ptychography.scan import Geometry, Reconstruction

# kind, slices, object modes, probe modes, modes of the probe's change, binning
CASES = {
    "far": ("far", 1, 1, 1, 0, 1),
    "far, modes": ("far", 1, 2, 3, 0, 1),
    "far, changing probe": ("far", 1, 1, 2, 2, 1),
    "far, three slices": ("far", 3, 1, 2, 1, 1),
    "far, binned": ("far", 1, 1, 1, 0, 2),
    "near": ("near", 1, 1, 1, 0, 1),
    "near, everything": ("near", 2, 2, 2, 1, 2),
}


@dataclass(frozen=True)
class World:
    """A reconstruction and counts that do not fit it exactly; counts and background in the order of the FFT."""

    geometry: Geometry
    found: Reconstruction
    counts_BYX: Tensor
    mask_YX: Tensor


def geometry_of(kind: str, slices: int, binning: int) -> Geometry:
    distances = (2e-4,) * (slices - 1)
    if kind == "near":
        return Geometry("near", 1e-10, 4e-3, 2e-7 * binning, distances, binning)
    return Geometry("far", 1e-10, 2.0, 75e-6, distances, binning)


def world(case: str, whole: bool = False, positions: int = 4, window: tuple[int, int] = (12, 10)) -> World:
    """whole: positions are whole pixels."""
    kind, slices, objects, probes, eigens, binning = CASES[case]
    draw = torch.Generator().manual_seed(sum(map(ord, case)))
    geometry = geometry_of(kind, slices, binning)

    def field(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.complex128)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    shape = (window[0] // binning, window[1] // binning)
    position_B2 = 7 * numbers(positions, 2) + 1
    found = Reconstruction(
        object_OLYX=1 + 0.3 * field(objects, slices, window[0] + 10, window[1] + 10),
        probe_MYX=3 * field(probes, *window),
        positions_B2=position_B2.round() if whole else position_B2,
        scale_B=0.8 + 0.4 * numbers(positions),
        background_YX=1 + numbers(*shape),
        eigen_KYX=field(eigens, *window) if eigens else None,
        opr_BK=numbers(positions, eigens) - 0.5 if eigens else None,
        pixel=geometry.object_pixel(shape),
    )
    other = replace(found, object_OLYX=found.object_OLYX + 0.2 * field(*found.object_OLYX.shape))
    # The reference gives far patterns in the order of the FFT; their background is given in the detector's.
    counts = torch.stack([pattern_reference(other, geometry, b) for b in range(positions)])
    mask = torch.rand(shape, generator=draw) > 0.1
    return World(geometry, found, counts, mask)
