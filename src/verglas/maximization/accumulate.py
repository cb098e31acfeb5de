"""The additive state of a reconstruction: what slices add to, flushed before single precision stalls."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from verglas.core.columns import ColumnSlab
from verglas.core.rows import RowTable, packed_sphere
from verglas.distributed.arrivals import Arrivals, Piece, SentArrivals
from verglas.distributed.ranks import Ranks
from verglas.kernels.backproject import backproject
from verglas.maximization.slabs import Slabs
from verglas.projection.volume import padded_size, sampling_matrices

VOXELS_AT_ONCE = 8_000_000  # that travel between ranks: 96 MB in single precision
ADDITIONS_PER_VOXEL = 1e5  # most float32 additions to one voxel before a flush (float32 stalls: -0.8 % after 5e6)


def table_of(box: int, radius: int, padding: float, device: torch.device | str) -> RowTable:
    """Of the voxels that slices up to an image frequency touch."""
    return packed_sphere(float(int(min(radius, box // 2) * padded_size(box, padding) / box + 0.5)), device)


class Accumulator:
    """Weighted sums of slices in a packed volume: data (re, im) and weight of each voxel.

    Adding particles, batches, GPUs and nodes is `+`. Single-precision sums go to a double-precision copy after every
    `flush_every` slices; while fewer have been added that copy is not made. float64 sums directly in double.
    box: of the map, px; radius: largest image frequency kept (integer); padding: of the transform; planes: (low, high), on a CPU:
    only the planes low <= |z| < high of all that is added are kept; columns: only what falls between these; rows: table of the
    voxels if these are not all.
    """

    def __init__(
        self, box: int, radius: int | None = None, padding: float = 2.0, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, planes: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None, rows: RowTable | None = None,
    ) -> None:  # fmt: skip
        self.box = box
        self.padding = padded_size(box, padding) / box
        self.radius = box // 2 if radius is None else min(radius, box // 2)
        whole = table_of(box, self.radius, padding, device) if rows is None else rows
        self.rows: RowTable = whole if planes is None else whole.only(whole.between(*planes))
        self.planes, self.slab = planes, None if columns is None else ColumnSlab.of(whole, *columns)
        self.rows = self.rows if self.slab is None else self.slab.rows
        self.running_V4 = torch.zeros(self.rows.count, 4, dtype=dtype, device=device)
        self.settled_V3: Tensor | None = None
        self.slabs: Slabs | None = None  # which part of the sums of all ranks this is, once they are added up
        self.slices = 0
        self._arriving: tuple[Slabs, Tensor, Arrivals] | None = None
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
            self._backproject(data_R2K[part], weight_RK[part], sampling_R33[part], coordinates_K3)
            self._since_flush += n
            self.slices += n

    def _backproject(self, data_R2K: Tensor, weight_RK: Tensor, sampling_R33: Tensor, coordinates_K3: Tensor) -> None:
        slices = data_R2K, weight_RK, sampling_R33, coordinates_K3
        if self.planes is None:
            columns = None if self.slab is None else (self.slab.first, self.slab.last)
            backproject(self.running_V4, self.rows, *slices, columns=columns)
            return
        from verglas.kernels.backproject.cpu import backproject_cpu

        low, high, half = *self.planes, self.rows.half
        runs = [(half - high + 1, half + high)] if low == 0 else [(half - high + 1, half - low + 1), (half + low, half + high)]
        backproject_cpu(self.running_V4, self.rows, *slices, runs)

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

    def used_up(self) -> Tensor:
        """`total`, whose memory is then the caller's alone: nothing can be added any more, nor asked for.

        On a GPU rounded to the precision that slices are added in, as sums of several ranks are: once, so by 6e-8. Its kernels
        are of that precision, and it takes half of the memory."""
        found_V = self.rounded() if self.running_V4.device.type == "cuda" else self.total()
        self.running_V4, self.settled_V3 = self.running_V4.new_empty(0, 4), None
        return found_V

    def rounded(self) -> Tensor:
        """Sums so far in the precision that slices are added in, [V, 4], in the memory of `running_V4`."""
        if self.settled_V3 is not None:
            self.flush()
            self.running_V4[:, :3] = self.settled_V3
            self.settled_V3 = None
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

    def packed(self) -> tuple[Tensor, int]:
        """(Sums so far [V, 3] in the type that slices are added in, how many slices), for `add_packed` of another process."""
        return self.total()[:, :3].to(self.running_V4.dtype).contiguous(), self.slices

    def add_packed(self, values_V3: Tensor, slices: int) -> None:
        """Add the sums of so many slices that another process has added up, of the same geometry."""
        if self.running_V4.dtype == torch.float32 and self._since_flush + slices > self.flush_every:
            self.flush()
        for first in range(0, len(values_V3), VOXELS_AT_ONCE):
            part = slice(first, first + VOXELS_AT_ONCE)
            self.running_V4[part, :3] += values_V3[part].to(self.running_V4)
        self._since_flush += slices
        self.slices += slices

    def begin_adding(self, ranks: Ranks, givers: list[int] | None = None) -> Arrivals | None:
        """Have the sums of all ranks travel: each will keep its slab alone. Until `add_up` nothing may be added.

        givers: the ranks that have added anything, None: any may have. None, and nothing is begun, if there are too few planes
        for all ranks, or this is not wanted (`Ways`).
        """
        slabs = Slabs.of(self.rows, self.padding, self.box, ranks) if ranks.size > 1 and ranks.ways.share_solving else None
        if slabs is not None:
            mine_V4 = self.running_V4.new_zeros(slabs.rows.count, 4)
            pieces, coded = self._pieces(slabs, mine_V4), bool(ranks.ways.compress) and mine_V4.dtype == torch.float32
            if coded or (givers is not None and len(givers) < ranks.size):
                arrivals: Arrivals = SentArrivals(ranks, pieces, "sums of slices", givers, coded)
            else:
                arrivals = Arrivals(ranks, pieces, "sums of slices")
            self._arriving = slabs, mine_V4, arrivals
            return arrivals
        return None

    def add_up(self, ranks: Ranks, share: bool = False) -> None:
        """Add the sums of all ranks, in place. What travels is (re, im, weight) of the voxels within the radius, in the precision
        that slices are added in. share: each rank keeps its slab alone, if it can (`begin_adding`)."""
        if ranks.size == 1:
            return
        if self._arriving is not None:
            self._finish_adding(ranks)
            return
        counts = ranks.counts(self.slices)
        if share and self.begin_adding(ranks, [rank for rank, count in enumerate(counts) if count]) is not None:
            self._finish_adding(ranks)
            return
        total_V = self.total()
        for first in range(0, len(total_V), VOXELS_AT_ONCE):
            part = slice(first, first + VOXELS_AT_ONCE)
            self.running_V4[part, :3] = ranks.add_up(total_V[part, :3].to(self.running_V4.dtype).contiguous(), "sums of slices")
        self.settled_V3 = None
        self.slices = self._since_flush = sum(counts)

    def _pieces(self, slabs: Slabs, mine_V4: Tensor) -> Iterator[Piece]:
        """What travels to each rank; what comes to this one goes into mine_V4, which has room for it."""
        total_V, dtype, first = self.total(), self.running_V4.dtype, 0
        for rank in range(slabs.ranks.size):
            for run in slabs.runs_of(rank):
                for start in range(run.start, run.stop, VOXELS_AT_ONCE):
                    part = slice(start, min(run.stop, start + VOXELS_AT_ONCE))
                    place_V3 = mine_V4[first : first + part.stop - part.start, :3]
                    yield Piece(rank, partial(_copy_of, total_V[part, :3], dtype), partial(_put, place_V3))
                    first += len(place_V3) if rank == slabs.ranks.rank else 0

    def _finish_adding(self, ranks: Ranks) -> None:
        assert self._arriving is not None
        slabs, mine_V4, arrivals = self._arriving
        arrivals.finish()
        self.rows, self.slabs, self.running_V4, self.settled_V3, self._arriving = slabs.rows, slabs, mine_V4, None, None
        self.slices = self._since_flush = sum(ranks.counts(self.slices))

    @property
    def precision(self) -> str:
        """For the run record."""
        if self.running_V4.dtype == torch.float64:
            return "sums in float64"
        if self.settled_V3 is None:
            return f"sums in float32 (at most {self.flush_every} slices: no flush needed so far)"
        return f"sums in float32, flushed into float64 every {self.flush_every} slices"


def _copy_of(values_V3: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in memory of their own, one after another."""
    return torch.empty(values_V3.shape, dtype=dtype, device=values_V3.device).copy_(values_V3)


def _put(place_V3: Tensor, values_V3: Tensor) -> None:
    place_V3.copy_(values_V3)
