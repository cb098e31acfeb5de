"""What a reconstruction takes of a GPU's memory, stage by stage: counted before the start, in single precision."""

from __future__ import annotations

from dataclasses import dataclass

from verglas.core.rows import packed_sphere
from verglas.errors import InputError
from verglas.maximization.gridding import memory
from verglas.projection.volume import padded_size

GB = 1e9
SUMS, JOINED, DIVISOR = 16, 12, 4  # bytes a voxel: sums of a half-set, of both together, what exact gridding divides by
TURNED = 12  # bytes a voxel: sums over a point group, and as much again while they are made
WORKING = 2.2e9  # of temporaries: passes over some million voxels, some columns of a transform, a batch of images


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes while images are added, while weights are made even (0 if they are not), and while a map is made."""

    adding: float
    evening: float
    mapping: float

    @classmethod
    def of(
        cls, box: int, radius: int, padding: float = 2.0, sets: int = 1, exact: bool = False, turned: bool = False
    ) -> DeviceMemory:
        """For sums of `sets` half-sets up to image frequency `radius`; maps made before stay where they are. turned: a point
        group is applied."""
        size = padded_size(box, padding)
        reach = float(int(radius * size / box + 0.5))
        voxels = packed_sphere(reach).count
        a_map, half_map = 4.0 * box**3, 8.0 * box**2 * (min(int(reach), size // 2) + 1)
        working = min(WORKING, 60.0 * voxels)  # no more than everything at once
        each = SUMS + (TURNED if turned else 0)
        sums = (each * sets + (JOINED if sets > 1 else 0)) * voxels
        divisor = DIVISOR * voxels if exact else 0
        maps = 4 * a_map if sets > 1 else 0.0
        evening = sums + maps + divisor + memory(voxels, reach) if exact else 0.0
        adding = (each * sets + (TURNED if turned else 0)) * voxels + working
        return cls(adding, evening, sums + maps + divisor + half_map + a_map + working)

    @property
    def peak(self) -> float:
        """The most of any stage."""
        return max(self.adding, self.evening, self.mapping)

    def verdict(self, free: float) -> str:
        """What to say before the start, given the bytes that arrays can take; InputError if sums alone are more."""
        need, there = f"at most {self.peak / GB:.3g} GB", f"{free / GB:.3g} GB that are free"
        if self.adding > free + WORKING:
            raise InputError("memory of the GPU", there, f"{self.adding / GB:.3g} GB for the sums alone",
                             "Use --max-resolution, --no-half-maps or --device cpu.")  # fmt: skip
        if self.peak > free:
            return f"memory of the GPU: {need} expected, of {there}: this may not fit; --no-half-maps takes less"
        return f"memory of the GPU: {need} expected, of {there}"
