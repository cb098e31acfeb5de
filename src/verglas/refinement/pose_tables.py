"""What an expectation needs of the poses that particles come with, on its device; each table is made when first asked for."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from verglas.core.memory import uploaded
from verglas.optics.ctf import CtfParameters
from verglas.particles.preprocess import whole_pixels
from verglas.refinement.computing import Computing
from verglas.refinement.dataset import Dataset
from verglas.refinement.state import HalfModel, Poses


class PoseTables:
    """Of all particles of `data`, in the order of its table: a rank that finds nothing left to do in a set makes none. model:
    whose mean norm and group scales count. Poses must not be changed meanwhile."""

    poses: Poses
    data: Dataset
    model: HalfModel
    on: Computing

    @cached_property
    def whole_B2(self) -> list[Tensor]:
        """Offsets in whole pixels of each optics group."""
        pixels = [group.pixel_size for group in self.data.groups]
        return [uploaded(whole_pixels(self.poses.origin_B2, pixel), self.on.device) for pixel in pixels]

    @cached_property
    def origin_B2(self) -> Tensor:
        """Offsets, Å."""
        return uploaded(self.poses.origin_B2, self.on.device)

    @cached_property
    def posed_B33(self) -> Tensor:
        """Matrices A."""
        return uploaded(self.poses.rotation_B33, self.on.device)

    @cached_property
    def norm_B(self) -> Tensor:
        """Norms as multiples of the mean."""
        return uploaded(self.poses.norm_B / self.model.norm_average, self.on.device)

    @cached_property
    def micrograph_B(self) -> Tensor:
        """Numbers of micrograph groups."""
        return uploaded(self.poses.micrograph_B, self.on.device)

    @cached_property
    def scale_M(self) -> Tensor:
        """Scales of these groups."""
        return uploaded(self.model.scale_M, self.on.device)

    @cached_property
    def ctf(self) -> CtfParameters | None:
        """CTFs, None without any."""
        return None if self.data.ctf is None else self.data.ctf.to(self.on.device)
