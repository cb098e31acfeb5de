"""Maps of sums that are too large to be kept: whatever is asked of them, they are made anew (`by_columns`, `in_rounds`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from verglas.core.masks import soft_sphere
from verglas.core.shells import fsc_by_planes
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.reconstruction import MASK_EDGE, Reconstruction, Solvable, solve_halves, within

PLANES_OF_MASK = 16


class Anew(Solvable[Tensor], Protocol):
    """Sums of a set of particles. slices: that were added, the first time."""

    slices: int

    def __add__(self, other: Self) -> Self:
        """Of both sets together."""


A = TypeVar("A", bound=Anew)


def solve_anew(
    sets: Sequence[A], geometry: Geometry, device: torch.device, mask_ZYX: Tensor | None = None, mask_radius: float | None = None
) -> Reconstruction:
    """As `reconstruction.solve`; maps of two half-sets are in the host's memory. device: on which they are correlated."""
    if len(sets) == 1:
        return Reconstruction(sets[0].map(), geometry.pixel_size, geometry.radius)
    first, second = sets
    correlate = correlation_on(device, geometry, mask_ZYX, mask_radius)
    scale = geometry.pixel_size, geometry.radius
    return solve_halves((first, second), first + second, scale, correlate, lambda map_ZYX: map_ZYX)


def correlation_on(
    device: torch.device, geometry: Geometry, mask_ZYX: Tensor | None, mask_radius: float | None
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """(map, map, in the mask) -> FSC, found on a device, of maps that lie in the memory of the host; the mask as for `solve`."""
    box = geometry.box

    def correlate(one_ZYX: Tensor, other_ZYX: Tensor, masked: bool) -> Tensor:
        pair = []
        for half_ZYX in (one_ZYX, other_ZYX):
            here_ZYX = half_ZYX.to(device, copy=True)
            for first in range(0, box if masked else 0, PLANES_OF_MASK):
                part = slice(first, min(first + PLANES_OF_MASK, box))
                sphere = box, mask_radius or box / 2 - MASK_EDGE, MASK_EDGE, device, part
                here_ZYX[part] *= soft_sphere(*sphere) if mask_ZYX is None else mask_ZYX[part].to(device)
            pair.append(torch.fft.rfftn(here_ZYX, norm="forward"))
            del here_ZYX
        return within(fsc_by_planes(*pair), geometry.radius)

    return correlate
