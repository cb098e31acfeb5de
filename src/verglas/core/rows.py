"""The row table: how a Fourier half volume is stored and addressed everywhere in verglas.

Voxel (z, y, x) with x >= 0 lives at `start[z, y] + x`. Rows are kept z-major (a slab of z is one range) and only as long
as trilinear sampling inside a ball of `radius` needs, so a packed sphere takes about half of the dense half volume.
Nothing outside this module may assume more than `start` and `length`; a dense cube is the table with equal lengths.
The plane x = 0 is stored whole: (0, y, z) and (0, -y, -z) are both there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowTable:
    """Addresses of a packed half volume.

    radius: largest |p| (in voxels) at which the volume is sampled: kernels leave out samples with |p|^2 > limit2;
    half: rows run over -half..half in z and y;
    start_ZY: [2 half + 1, 2 half + 1], position of x = 0 of each row, int32, or int64 where `count` is beyond int32 (kernels take
    both); length_ZY: int32, voxels in each row;
    count: voxels in all. Rows of length 0 are never touched by samples inside `radius`.
    """

    radius: float
    half: int
    start_ZY: Tensor
    length_ZY: Tensor
    count: int

    @property
    def limit2(self) -> float:
        """Square of the largest |p| sampled; a hundredth beyond `radius`, so rounding never decides about its edge."""
        return (self.radius + 0.01) ** 2

    @property
    def edge(self) -> int:
        return 2 * self.half + 1

    @property
    def device(self) -> torch.device:
        return self.start_ZY.device

    def to(self, device: torch.device | str) -> RowTable:
        return RowTable(self.radius, self.half, self.start_ZY.to(device), self.length_ZY.to(device), self.count)

    def only(self, used_Z: Tensor) -> RowTable:
        """The table of some planes (bool [edge]) alone, their voxels in the same order; rows of the others have length 0."""
        length_ZY = self.length_ZY * used_Z[:, None].to(self.length_ZY)
        ends = length_ZY.flatten().long().cumsum(0)
        count = int(ends[-1])
        start_ZY = ends.view_as(length_ZY) - length_ZY
        # Samples at whole z touch the plane above with weight 0: what they read there has to be in memory.
        within = start_ZY.clamp_max(max(0, count - self.half - 3))
        return RowTable(self.radius, self.half, _narrow(torch.where(length_ZY > 0, start_ZY, within), count), length_ZY, count)

    def shown(self, used_Z: Tensor) -> RowTable:
        """The same addresses; rows of all but some planes (bool [edge]) have length 0."""
        length_ZY = self.length_ZY * used_Z[:, None].to(self.length_ZY)
        return RowTable(self.radius, self.half, self.start_ZY, length_ZY, self.count)

    def coordinates_V3(self) -> Tensor:
        """(x, y, z) of every stored voxel, int32 [count, 3]."""
        lengths = self.length_ZY.flatten().long()
        row = torch.repeat_interleave(torch.arange(self.edge**2, device=self.device), lengths)
        x = torch.arange(self.count, device=self.device) - self.start_ZY.flatten().long()[row]
        return torch.stack([x, row % self.edge - self.half, row // self.edge - self.half], -1).int()

    def between(self, low: int, high: int) -> Tensor:
        """Which planes have low <= |z| < high, bool [edge]."""
        distance_Z = torch.arange(-self.half, self.half + 1, device=self.device).abs()
        return (distance_Z >= low) & (distance_Z < high)

    def slab_starts_Z(self) -> Tensor:
        """Position of the first voxel of each z plane and the end, int64 [edge + 1]: plane z is one contiguous range."""
        per_plane = self.length_ZY.long().sum(1)
        return torch.cat([per_plane.new_zeros(1), per_plane.cumsum(0)])

    @cached_property
    def slab_starts(self) -> list[int]:
        """The same for the host; on a GPU the first question waits for it."""
        starts: list[int] = self.slab_starts_Z().tolist()
        return starts


@lru_cache(maxsize=16)
def _packed(radius: float) -> RowTable:
    reach = radius + 0.02  # wider than RowTable.limit2 by more than float32 rounding
    half = int(reach) + 1
    axis = torch.arange(-half, half + 1, dtype=torch.float64)
    # A sample at p touches floor(p) and floor(p) + 1, so a row is reached by points up to one voxel nearer the axis.
    reach2 = (axis.abs() - 1).clamp_min(0) ** 2
    x2 = reach**2 - reach2[:, None] - reach2[None, :]
    length = torch.where(x2 >= 0, x2.clamp_min(0).sqrt().floor() + 2, torch.zeros_like(x2)).long()
    ends = length.flatten().cumsum(0)
    start = (ends - length.flatten()).view_as(length)
    count = int(ends[-1])
    return RowTable(float(radius), half, _narrow(start, count), length.int(), count)


def _narrow(start_ZY: Tensor, count: int) -> Tensor:
    """Positions among `count` voxels (int64) in as few bytes as hold them: kernels read them with every sample."""
    return start_ZY.int() if count < 2**31 else start_ZY


def packed_sphere(radius: float, device: torch.device | str = "cpu") -> RowTable:
    """Row table that serves trilinear sampling at |p| <= radius (voxels), as few voxels as that allows. Nobody changes it."""
    return _packed_on(float(radius), torch.device(device))


@lru_cache(maxsize=16)
def _packed_on(radius: float, device: torch.device) -> RowTable:
    return _packed(radius).to(device)


@lru_cache(maxsize=16)
def _planes(radius: float, planes: int) -> RowTable:
    reach = radius + 0.02
    half = max(int(reach), planes) + 1
    axis = torch.arange(-half, half + 1, dtype=torch.float64)
    x2 = reach**2 - (axis.abs() - 1).clamp_min(0) ** 2
    row_Y = torch.where(x2 >= 0, x2.clamp_min(0).sqrt().floor() + 2, torch.zeros_like(x2)).long()
    used_Z = (axis >= -planes) & (axis <= planes + 1)  # one more: interpolation along z touches it, with weight 0
    length = used_Z[:, None] * row_Y
    ends = length.flatten().cumsum(0)
    start = (ends - length.flatten()).view_as(length)
    count = int(ends[-1])
    return RowTable(float(radius + planes), half, _narrow(start, count), length.int(), count)


def packed_planes(radius: float, planes: int, device: torch.device | str = "cpu") -> RowTable:
    """Row table of the planes z = -planes .. planes, discs of `radius` voxels each, for samples at whole z.

    The table's own radius takes in every such sample; callers ask for none beyond the discs.
    """
    return _planes(float(radius), planes).to(device)


def dense_half(radius: float, device: torch.device | str = "cpu") -> RowTable:
    """The dense special case: every row runs over x = 0..half; for tests and comparison."""
    half = int(radius + 0.02) + 1
    edge = 2 * half + 1
    length = torch.full((edge, edge), half + 1, dtype=torch.int32)
    start = torch.arange(edge * edge).view(edge, edge) * (half + 1)
    count = edge * edge * (half + 1)
    return RowTable(float(radius), half, _narrow(start, count), length, count).to(device)
