"""The additive state of a reconstruction: what slices add to, flushed before single precision stalls."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rows import RowTable, packed_sphere
from verglas.distributed.ranks import Ranks
from verglas.kernels.backproject import backproject
from verglas.maximization.slabs import Slabs
from verglas.projection.volume import padded_size, sampling_matrices

VOXELS_AT_ONCE = 8_000_000  # that travel between ranks: 96 MB in single precision
ADDITIONS_PER_VOXEL = 1e5  # most float32 additions to one voxel before a flush (float32 stalls: -0.8 % after 5e6)


class Accumulator:
    """Weighted sums of slices in a packed volume: data (re, im) and weight of each voxel.

    Adding particles, batches, GPUs and nodes is `+`. Single-precision sums go to a double-precision copy after every
    `flush_every` slices; while fewer have been added that copy is not made. float64 sums directly in double.
    box: of the map, px; radius: largest image frequency kept (integer); padding: of the transform.
    """

    def __init__(
        self, box: int, radius: int | None = None, padding: float = 2.0, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.box = box
        self.padding = padded_size(box, padding) / box
        self.radius = box // 2 if radius is None else min(radius, box // 2)
        self.rows: RowTable = packed_sphere(float(int(self.radius * self.padding + 0.5)), device)
        self.running_V4 = torch.zeros(self.rows.count, 4, dtype=dtype, device=device)
        self.settled_V3: Tensor | None = None
        self.slabs: Slabs | None = None  # which part of the sums of all ranks this is, once they are added up
        self.slices = 0
        self._since_flush = 0
        # A slice samples every `padding` voxels, so at most (2 / padding + 1)^2 of its samples share a voxel.
        self.flush_every = int(ADDITIONS_PER_VOXEL / (2 / self.padding + 1) ** 2)

    def add(self, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """Add slices: data (re, im planes), weights, poses A (object to image), image frequencies in model units."""
        step = self.flush_every if self.running_V4.dtype == torch.float32 else len(data_R2K) or 1
        sampling_R33 = sampling_matrices(rotation_R33, self.padding).to(self.running_V4.device, self.running_V4.dtype)
        for first in range(0, len(data_R2K), step):
            part = slice(first, first + step)
            n = len(data_R2K[part])
            if self.running_V4.dtype == torch.float32 and self._since_flush + n > self.flush_every:
                self.flush()
            backproject(self.running_V4, self.rows, data_R2K[part], weight_RK[part], sampling_R33[part], coordinates_K3)
            self._since_flush += n
            self.slices += n

    def flush(self) -> None:
        """Move the running float32 sums into the double-precision copy."""
        if self.settled_V3 is None:
            self.settled_V3 = torch.zeros(self.rows.count, 3, dtype=torch.float64, device=self.running_V4.device)
        self.settled_V3 += self.running_V4[:, :3]
        self.running_V4.zero_()
        self._since_flush = 0

    def total(self) -> Tensor:
        """Sums so far, (re, im, weight) in columns 0-2: float64 [V, 3] if anything was flushed, else as added [V, 4].

        The accumulator's own memory, not a copy.
        """
        if self.settled_V3 is not None:
            self.flush()
            return self.settled_V3
        return self.running_V4

    def merge(self, other: Accumulator) -> None:
        """Add another accumulator of the same geometry to this one; its counts and precision come along."""
        if (self.box, self.radius, self.padding) != (other.box, other.radius, other.padding):
            raise ValueError("accumulators of different box, radius or padding cannot be added")
        if other.settled_V3 is not None or self._since_flush + other._since_flush > self.flush_every:
            self.flush()
            assert self.settled_V3 is not None
            if other.settled_V3 is not None:
                self.settled_V3 += other.settled_V3
            self.settled_V3 += other.running_V4[:, :3]
        else:
            self.running_V4 += other.running_V4
            self._since_flush += other._since_flush
        self.slices += other.slices

    def add_up(self, ranks: Ranks, share: bool = False) -> None:
        """Add the sums of all ranks, in place. What travels is (re, im, weight) of the voxels within the radius, in the precision
        that slices are added in. share: each rank keeps its slab alone, if there are planes enough."""
        if ranks.size == 1:
            return
        slabs = Slabs.of(self.rows, self.padding, self.box, ranks) if share and ranks.ways.share_solving else None
        if slabs is not None:
            self._add_up_slabs(slabs)
            return
        total_V = self.total()
        for first in range(0, len(total_V), VOXELS_AT_ONCE):
            part = slice(first, first + VOXELS_AT_ONCE)
            self.running_V4[part, :3] = ranks.add_up(total_V[part, :3].to(self.running_V4.dtype).contiguous(), "sums of slices")
        self.settled_V3 = None
        self.slices = sum(ranks.everyones(self.slices))
        self._since_flush = self.slices

    def _add_up_slabs(self, slabs: Slabs) -> None:
        ranks, total_V, first = slabs.ranks, self.total(), 0
        mine_V4 = self.running_V4.new_zeros(slabs.rows.count, 4)
        for rank in range(ranks.size):
            for run in slabs.runs_of(rank):
                for start in range(run.start, run.stop, VOXELS_AT_ONCE):
                    part = total_V[start : min(run.stop, start + VOXELS_AT_ONCE), :3].to(self.running_V4.dtype).contiguous()
                    ranks.add_up_at(rank, part, "sums of slices")
                    if rank == ranks.rank:
                        mine_V4[first : first + len(part), :3] = part
                        first += len(part)
        self.rows, self.slabs, self.running_V4, self.settled_V3 = slabs.rows, slabs, mine_V4, None
        self.slices = sum(ranks.everyones(self.slices))
        self._since_flush = self.slices

    @property
    def precision(self) -> str:
        """For the run record."""
        if self.running_V4.dtype == torch.float64:
            return "sums in float64"
        if self.settled_V3 is None:
            return f"sums in float32 (at most {self.flush_every} slices: no flush needed so far)"
        return f"sums in float32, flushed into float64 every {self.flush_every} slices"
