"""The expectation of particles against 2-D references: `expect`, with images in the role of maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from verglas.core.rotations import matrix_from_euler
from verglas.expectation.images import Prepared
from verglas.expectation.plane_slices import PlaneSlicer
from verglas.expectation.search import Searcher
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

    def sums_of_slices(self) -> list[PlaneAccumulator]:
        """All that images were added to."""
        return [self.averages]

    def add_at_random(self, rows: Tensor, seed: int) -> None:
        """Add particles, each with weight 1 to a class and at an in-plane angle drawn for it: what it all starts from."""
        draw = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(len(rows), generator=draw)]
        class_n = torch.arange(len(rows)) % len(self.models)
        psi_n = torch.rand(len(rows), generator=draw, dtype=torch.float64) * 360
        position_B = torch.full((len(self.data),), -1)
        position_B[rows] = torch.arange(len(rows))
        zero_n = torch.zeros_like(psi_n)
        rotation_n33 = matrix_from_euler(zero_n, zero_n, psi_n)
        for part, group in self.batches(rows):
            self.add_whole(*self.prepared(part, group), rotation_n33[position_B[part]], class_n[position_B[part]])

    def batches(self, rows: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Rows that are prepared at once, and their optics group."""
        for group in range(len(self.data.groups)):
            mine = rows[self.data.group_B[rows] == group]
            step = min(PREPARED_AT_ONCE, self.data.largest_batch(group))
            self.data.announce(mine, step)
            for part in mine.split(step) if len(mine) else ():
                yield part, group

    def add_whole(self, searcher: Searcher, prepared: Prepared, rotation_B33: Tensor, class_B: Tensor) -> None:
        """Add prepared particles, each with weight 1 to one class at one pose."""
        inverse_K = (1 / self.common_S)[searcher.preparer.shell_K].to(prepared.weight_BK)
        device = self.on.device
        self.averages.turn(WeightedSlices(
            prepared.mapped_B2K * inverse_K, prepared.mapped_weight_BK * inverse_K.square(), rotation_B33.to(device),
            searcher.preparer.coordinates_K3, class_B.to(device), torch.arange(len(class_B), device=device),
        ))  # fmt: skip
