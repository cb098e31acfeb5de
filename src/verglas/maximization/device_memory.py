"""What a reconstruction takes of a GPU's memory, stage by stage: counted before the start, in single precision."""

from __future__ import annotations

from dataclasses import dataclass

from verglas.core.rows import packed_sphere
from verglas.maximization.gridding import memory
from verglas.projection.volume import padded_size

SUMS, JOINED, DIVISOR = 16, 12, 4  # bytes a voxel: sums of a half-set, of both together, what exact gridding divides by
WORKING = 2.2e9  # of temporaries: passes over some million voxels, some columns of a transform, a batch of images


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes while images are added, while weights are made even (0 if they are not), and while a map is made."""

    adding: float
    evening: float
    mapping: float

    @classmethod
    def of(cls, box: int, radius: int, padding: float = 2.0, sets: int = 1, exact: bool = False) -> DeviceMemory:
        """For sums of `sets` half-sets up to image frequency `radius`; maps made before stay where they are."""
        size = padded_size(box, padding)
        reach = float(int(radius * size / box + 0.5))
        voxels = packed_sphere(reach).count
        a_map, half_map = 4.0 * box**3, 8.0 * box**2 * (min(int(reach), size // 2) + 1)
        working = min(WORKING, 60.0 * voxels)  # no more than everything at once
        sums = (SUMS * sets + (JOINED if sets > 1 else 0)) * voxels
        divisor = DIVISOR * voxels if exact else 0
        maps = 4 * a_map if sets > 1 else 0.0
        evening = sums + maps + divisor + memory(voxels, reach) if exact else 0.0
        return cls(SUMS * sets * voxels + working, evening, sums + maps + divisor + half_map + a_map + working)

    @property
    def peak(self) -> float:
        """The most of any stage."""
        return max(self.adding, self.evening, self.mapping)
