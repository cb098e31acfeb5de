"""Sums of slices and references of which every rank has a layer (core/layers.py), and their way to slabs of planes and back.

While particles are worked on ranks have layers: each cuts, and adds, its pixels of all ranks' slices (`distributed.rounds`).
What is done to whole maps is done in slabs (`slabs`). A rank among P so sends 12 (P - 1) / P² bytes of each voxel of its sums, a
P-th of what adding up whole sums takes, and 8 (P - 1) / P² of each of a reference, beside what layers overlap by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from verglas.core.layers import Layers, LayerTable
from verglas.distributed.arrivals import Arrivals
from verglas.distributed.ranks import Ranks
from verglas.distributed.rounds import Pixels, Rounds
from verglas.maximization.accumulate import VOXELS_AT_ONCE, Accumulator
from verglas.maximization.slabs import Slabs
from verglas.maximization.transform_probes import form_from_map
from verglas.maximization.transforms import SharedTransform
from verglas.projection.volume import padded_size

NOTHING = slice(0, 0)


class LayeredAccumulator(Accumulator):
    """Sums of this rank's layer: what is added to it goes to the layers of all ranks. After `add_up` it is a slab of the sums."""

    def __init__(self, radius: int, dtype: torch.dtype, across: Across, rounds: Rounds, number: int) -> None:
        """across: from layers to slabs; rounds: in which slices are added; number: of the sums there."""
        super().__init__(across.box, radius, across.padding, across.layers.whole.device, dtype, rows=across.mine)
        self._across: Across | None = across
        self.rounds, self.number, self._given = rounds, number, 0

    def add(self, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """As that of whole sums; between the beginning and the end of `rounds`."""
        self._given += len(data_R2K)
        self.rounds.add(self.number, data_R2K, weight_RK, rotation_R33, coordinates_K3)

    def add_here(self, values_R3k: Tensor, rotation_R33: Tensor, pixels: Pixels) -> None:
        """Add (re, im, weight) of the pixels that this rank has."""
        super().add(values_R3k[:, :2], values_R3k[:, 2], rotation_R33, pixels.coordinates_k3)

    def begin_adding(self, ranks: Ranks, givers: list[int] | None = None) -> Arrivals | None:
        """Nothing to do: sums are those of all ranks already."""
        return None

    def add_up(self, ranks: Ranks, share: bool = False) -> None:
        """From this rank's layer to its slab of the sums of all ranks, once."""
        if self._across is None:
            return
        across, self._across = self._across, None
        mine_V3 = self.running_V4.new_zeros(across.slabs.rows.count, 3)  # to which no slices are added any more
        across.add_to_slab(self.total()[:, :3], mine_V3)
        self.rows, self.slabs, self.running_V4, self.settled_V3 = across.slabs.rows, across.slabs, mine_V3, None
        self.slices = sum(ranks.counts(self._given))
        self._since_flush = self.slices


@dataclass(frozen=True)
class Across:
    """Between layers and slabs of one table, some planes at a time. box: of the map; padding: in force; mine: table of this
    rank's layer. All ranks call it alike."""

    box: int
    padding: float
    layers: Layers
    slabs: Slabs
    mine: LayerTable

    @classmethod
    def of(cls, box: int, radius: int, padding: float, device: torch.device, ranks: Ranks) -> Across | None:
        """For volumes up to an image frequency; None where they have too few planes for all ranks."""
        padding = padded_size(box, padding) / box
        layers = Layers.of(float(int(min(radius, box // 2) * padding + 0.5)), ranks.size, device)
        slabs = Slabs.of(layers.whole, padding, box, ranks)
        if slabs is None:
            return None
        return cls(box, padding, layers, replace(slabs, maps_on_host=True), layers.table(ranks.rank))

    def add_to_slab(self, layer_V3: Tensor, slab_V3: Tensor) -> None:
        """Add what all ranks have in their layers to their slabs; in the precision of the latter."""
        me, tables = self.slabs.ranks.rank, self._tables()
        for planes in self._pieces():
            sent = [layer_V3[self._run(self.mine, piece)].to(slab_V3.dtype) for piece in planes]
            places = [table.places(planes[me], self.slabs.rows) for table in tables]
            found = self.slabs.ranks.exchanged(sent, [(len(place), 3) for place in places], "sums of slices, layers")
            for place, part_V3 in zip(places, found, strict=True):
                slab_V3.index_add_(0, place, part_V3)

    def to_layer(self, slab_V2: Tensor) -> Tensor:
        """This rank's layer of what all ranks have in their slabs."""
        me, tables = self.slabs.ranks.rank, self._tables()
        layer_V2 = slab_V2.new_zeros(self.mine.count, 2)
        for planes in self._pieces():
            sent = [slab_V2[table.places(planes[me], self.slabs.rows)] for table in tables]
            runs = [self._run(self.mine, piece) for piece in planes]
            found = self.slabs.ranks.exchanged(sent, [(run.stop - run.start, 2) for run in runs], "voxels of references")
            for run, part_V2 in zip(runs, found, strict=True):
                layer_V2[run] = part_V2
        return layer_V2

    def reference(self, map_ZYX: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's layer [v, 2] of the padded transform of a map that all ranks have, wherever they have it."""
        size = padded_size(self.box, self.padding)
        form = form_from_map(self.slabs, self.box, size, 8 if dtype == torch.float64 else 4)
        return self.to_layer(SharedTransform(self.slabs, self.box, size, form).from_map(map_ZYX, dtype))

    def _tables(self) -> list[LayerTable]:
        return [self.layers.table(part) for part in range(self.layers.parts)]

    def _run(self, table: LayerTable, planes: slice) -> slice:
        """Where the voxels of some planes lie in a layer."""
        return slice(table.slab_starts[planes.start], table.slab_starts[planes.stop])

    def _pieces(self) -> Iterator[tuple[slice, ...]]:
        """Planes (counted from 0) of every rank's slab that are sent at a time."""
        return zip_longest(*(self._runs_of(rank) for rank in range(self.layers.parts)), fillvalue=NOTHING)

    def _runs_of(self, rank: int) -> Iterator[slice]:
        """Runs of a slab's planes with at most `VOXELS_AT_ONCE` voxels, but one plane at least."""
        low, high, half = self.slabs.ends[rank], self.slabs.ends[rank + 1], self.slabs.whole.half
        runs = [(half - high + 1, half + high)] if low == 0 else [(half - high + 1, half - low + 1), (half + low, half + high)]
        starts = self.slabs.whole.slab_starts
        for first, last in runs:
            while first < last:
                end = first + 1
                while end < last and starts[end + 1] - starts[first] <= VOXELS_AT_ONCE:
                    end += 1
                yield slice(first, end)
                first = end
