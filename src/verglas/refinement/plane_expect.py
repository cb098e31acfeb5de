"""The expectation of particles against 2-D references: `expect`, with images in the role of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rotations import matrix_from_euler
from verglas.expectation.plane_slices import PlaneSlicer
from verglas.maximization.gather import WeightedSlices
from verglas.maximization.planes import PlaneAccumulator
from verglas.projection.planes import FourierPlanes
from verglas.refinement.expect import HalfExpectation

PREPARED_AT_ONCE = 256


class PlaneExpectation(HalfExpectation):
    """Expectation against one class average per model (model.map_ZYX: [N, N]). `run` fills `sums` and `averages`."""

    def make_references(self) -> None:
        """All class averages in one set of planes."""
        grid, on = self.plan.model_grid, self.on
        image_CYX = torch.stack([model.map_ZYX.to(on.device) for model in self.models])
        self.planes = FourierPlanes.from_images(image_CYX, grid.radius, grid.padding, on.device, on.operand)
        self.averages = PlaneAccumulator(grid.box, len(self.models), grid.radius, grid.padding, on.device, on.dtype)

    def slicer(self, coordinates_K3: Tensor, common_K: Tensor) -> PlaneSlicer:
        """What turns the class averages."""
        return PlaneSlicer(self.planes, coordinates_K3, common_K, self.on.operand)

    def add(self, slices: WeightedSlices) -> None:
        """Add the weighted images of some particles."""
        self.averages.add(slices, self.grid.count * self.grid.children_per_orientation)

    def add_at_random(self, rows: Tensor, seed: int) -> None:
        """Add particles, each with weight 1 to a class and at an in-plane angle drawn for it: what it all starts from."""
        draw = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(len(rows), generator=draw)]
        class_n = torch.arange(len(rows)) % len(self.models)
        psi_n = torch.rand(len(rows), generator=draw, dtype=torch.float64) * 360
        for group in range(len(self.data.groups)):
            mine = (self.data.group_B[rows] == group).nonzero().squeeze(1)
            for part in mine.split(min(PREPARED_AT_ONCE, self.data.largest_batch(group))):
                self.data.announce(rows[part], len(part))
                self._add_whole(rows[part], group, class_n[part], psi_n[part])

    def _add_whole(self, rows: Tensor, group: int, class_B: Tensor, psi_B: Tensor) -> None:
        """Add particles of one optics group to classes at angles (degrees)."""
        searcher, prepared = self.prepared(rows, group)
        inverse_K = (1 / self.common_S)[searcher.preparer.shell_K].to(prepared.weight_BK)
        zero_B = torch.zeros_like(psi_B)
        self.averages.turn(WeightedSlices(
            prepared.mapped_B2K * inverse_K, prepared.mapped_weight_BK * inverse_K.square(),
            matrix_from_euler(zero_B, zero_B, psi_B).to(self.on.device), searcher.preparer.coordinates_K3,
            class_B.to(self.on.device), torch.arange(len(rows), device=self.on.device),
        ))  # fmt: skip
