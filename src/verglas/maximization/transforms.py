"""The transform of a map that ranks share, between slabs of packed voxels (`slabs`) and the map: three forms that find the same.

    replicated  all voxels go to all ranks, and each transforms everything
    transposed  a rank transforms its planes along y; each gets all z of some rows y (all-to-all), and transforms these
    stride      a rank transforms its planes along all axes, for planes p, p + s, p + 2 s, ... of the map at a time: multiplied by
                a phase, folded modulo P / s along z, transformed; these parts are added up at the rank that they belong to

What a rank sends of V voxels, L lines along y that hold any, a map of N^3 (n rows y of it wanted), with b bytes a real number,
among P ranks (the mean of all):

    from voxels to the parts of a map    (P - 1) / P  times   2 b V   |   2 b L n / P   |   b N n N
    from a map to slabs of voxels        (P - 1) / P  times   0       |   2 b L N / P   |   2 b Z N X      (Z planes of X columns)

and to have the whole map on all ranks afterwards (P - 1) / P of the bytes wanted of it, but nothing if it was replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from verglas.core.masks import raised_cosine
from verglas.distributed.ranks import Ranks
from verglas.distributed.ways import FORMS, Form
from verglas.maximization.slabs import Slabs
from verglas.maximization.stride_parts import Strides
from verglas.maximization.transform_costs import Shape
from verglas.projection import axes as kernels
from verglas.projection.axes import Axes, Between, Sums
from verglas.projection.pruned import Fill, PaddedGrid, correction_at, largest_below, map_of, runs

GATHERED_AT_ONCE = 2**27  # voxels, of all ranks
GATHERED_WHOLE: tuple[str, ...] = ("cuda",)  # devices that send a map in less time than the voxels of a mask are found
EDGE = 3.0  # px, of the sphere outside of which a map is its mean


@dataclass(frozen=True)
class MapPart:
    """Voxels [n, m, N] of a map of N^3: planes z_A and rows y."""

    values_ZYX: Tensor
    z_A: Tensor
    y: range

    @property
    def box(self) -> int:
        return self.values_ZYX.shape[2]

    def finish(self, size: int, filled: bool, ranks: Ranks) -> None:
        """Fill the corners with their mean (`fill_outside`; `filled`: whether they are wanted) and divide by the gridding
        correction at padded size P; in place. ranks: those that have the other parts."""
        axes = self._axes(size)
        if axes is not None:
            total_2 = ranks.add_up(axes.outside(self.values_ZYX, self.z_A, self.y.start), "curves") if filled else None
            mean_1 = None if total_2 is None else (total_2[:1] / total_2[1].clamp_min(1e-12)).float()
            axes.finish(self.values_ZYX, mean_1, self.z_A, self.y.start)
            return
        mean = self._mean_outside(ranks) if filled else 0.0
        for part, distance in self._distances():
            values = self.values_ZYX[part]
            if filled:
                inside = raised_cosine(distance, self.box / 2, EDGE)
                values.mul_(inside).add_((1 - inside).mul_(mean))
            values.div_(correction_at(distance, size))

    def _axes(self, size: int) -> Axes | None:
        """The kernels of a GPU, if they take this part."""
        values = self.values_ZYX
        served = kernels.serves(self.box, size, values.device, values.dtype) and values.is_contiguous() and values.numel() > 0
        return Axes(self.box, size, values.device) if served else None

    def _mean_outside(self, ranks: Ranks) -> Tensor:
        sums_2 = torch.zeros(2, dtype=torch.float64, device=self.values_ZYX.device)
        for part, distance in self._distances():
            outside = 1 - raised_cosine(distance, self.box / 2, EDGE)
            sums_2 += torch.stack([(self.values_ZYX[part] * outside).sum(dtype=torch.float64), outside.sum(dtype=torch.float64)])
        total, weight = ranks.add_up(sums_2, "curves")
        return (total / weight.clamp_min(1e-12)).float()

    def _distances(self) -> Iterator[tuple[slice, Tensor]]:
        """Runs of planes, and the distance of their voxels from the centre."""
        y_C = torch.arange(self.y.start, self.y.stop, device=self.z_A.device)
        grid = PaddedGrid(self.box, 0, 0, self.z_A)
        for part in runs(len(self.z_A), len(self.y) * self.box, self.z_A.device):
            yield part, grid.distance(self.z_A[part], y_C)


@dataclass(frozen=True)
class SharedTransform:
    """box: N; size: P; form: how ranks do it. All ranks call its methods alike."""

    slabs: Slabs
    box: int
    size: int
    form: Form

    def __post_init__(self) -> None:
        assert self.form in FORMS

    def to_map(self, fill: Fill, dtype: torch.dtype, wanted: range) -> MapPart:
        """This rank's part of the map without gridding correction; of a replicated one all that is wanted.

        fill: writes the columns of this rank's planes (`grid`); dtype: of the transforms; wanted: y of the map.
        """
        z_A, y = self.place_of(self.slabs.ranks.rank, wanted)
        if self.form == "replicated":
            everywhere = PaddedGrid.of(self.slabs.whole, self.box, self.size)
            voxels_V2 = self.slabs.joined(self._packed(fill, dtype), "voxels of maps")
            values_ZYX = map_of(everywhere.filler(voxels_V2, self.slabs.whole), everywhere, dtype, wanted)
        elif self.form == "transposed":
            values_ZYX = self._transposed(fill, dtype, wanted)
        else:
            values_ZYX = self._strides().to_map(self.grid(), fill, dtype, wanted)
        return MapPart(values_ZYX, z_A, y)

    def from_map(self, map_ZYX: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """This rank's packed voxels [v, 2] of the padded transform of a map that all ranks have (`pruned.voxels_of`); if the map
        is elsewhere, only what is needed of it comes to the voxels' device. dtype: of the voxels, by default the map's."""
        grid, rows = self.grid(at_radius=True), self.slabs.rows
        dtype = map_ZYX.dtype if dtype is None else dtype
        axes = grid.axes(dtype)
        if axes is not None and self.form != "stride":
            return self._voxels_by_kernels(axes, map_ZYX)
        out_V2 = torch.zeros(rows.count, 2, dtype=dtype, device=rows.device)

        def take(cut_ZYX: Tensor, first: int) -> None:
            grid.take(grid.from_y(cut_ZYX), first, rows, out_V2)

        if self.form == "stride":
            self._strides().from_map(map_ZYX, dtype, self._grids(at_radius=True), take)
            return out_V2
        z_A, y = self.place_of(self.slabs.ranks.rank, range(self.box))
        y_C = torch.arange(y.start, y.stop, device=rows.device)
        half_ZYX = grid.from_x(map_ZYX[:, y.start : y.stop].to(rows.device, dtype), z_A, y_C)
        for part in grid.column_runs(self._most_planes()):
            if self.form == "replicated":
                take(grid.from_z(half_ZYX[:, :, part]), part.start)
            else:
                take(self._to_slabs(half_ZYX[:, :, part], part), part.start)
        return out_V2

    def whole(self, part: MapPart, wanted: range, support_ZYX: Tensor | None) -> Tensor:
        """The map [N, N, N] on all ranks, from the part of each. support: bool, voxels that are wanted; the others are 0."""
        home = torch.device("cpu") if self.slabs.maps_on_host else part.values_ZYX.device
        every = support_ZYX is None or home.type in GATHERED_WHOLE
        if every and self.form == "transposed" and home == part.values_ZYX.device and len(wanted):
            found_ZYX = self._gathered(part, wanted)
            return found_ZYX if support_ZYX is None else found_ZYX.mul_(support_ZYX)
        out_ZYX = torch.zeros(self.box, self.box, self.box, dtype=part.values_ZYX.dtype, device=home)
        ranks = self.slabs.ranks
        for rank in range(1 if self.form == "replicated" else ranks.size):
            z_A, y = self.place_of(rank, wanted)
            rows, mine = slice(y.start, y.stop), self.form == "replicated" or rank == ranks.rank
            planes = z_A if self.form == "stride" else slice(None)
            inside = None if support_ZYX is None else support_ZYX[planes, rows]
            values = part.values_ZYX if mine else part.values_ZYX.new_empty(len(z_A), len(y), self.box)
            sent = values.contiguous() if inside is None else values[inside]
            sent = sent if self.form == "replicated" else ranks.of_rank(rank, sent, "maps")
            found = sent if inside is None else torch.zeros_like(values).masked_scatter_(inside, sent)
            out_ZYX[planes.to(home) if isinstance(planes, Tensor) else planes, rows] = found.to(home)
        return out_ZYX

    def _gathered(self, part: MapPart, wanted: range) -> Tensor:
        """The same of rows y of all ranks, some planes at a time: these travel while those before are put in their places."""
        ranks, ends, box = self.slabs.ranks, self._ends_along_y(wanted), self.box
        new = torch.empty if len(wanted) == box else torch.zeros
        out_ZYX = new(box, box, box, dtype=part.values_ZYX.dtype, device=part.values_ZYX.device)
        most = max(high - low for low, high in pairwise(ends))
        step, arriving = max(1, GATHERED_AT_ONCE // (ranks.size * most * box)), _OneAhead()

        def arrived(planes: slice, found: list[Tensor]) -> None:
            for rows_ZYX, (low, high) in zip(found[0], pairwise(ends), strict=True):
                out_ZYX[planes, low:high] = rows_ZYX[:, : high - low]

        for first in range(0, box, step):
            planes = slice(first, min(first + step, box))
            mine_ZYX = part.values_ZYX[planes]
            if len(part.y) < most:
                mine_ZYX = torch.nn.functional.pad(mine_ZYX, (0, 0, 0, most - len(part.y)))
            found = ranks.gathering(mine_ZYX, "parts of maps")
            arriving.begin(lambda found=found: [found()], partial(arrived, planes))  # type: ignore[misc]
        arriving.finish()
        return out_ZYX

    def traffic(self, wanted: int, element: int) -> tuple[float, float]:
        """Bytes that a rank sends (the mean of all) for `to_map` and for `from_map`; element: of a real number."""
        sent = Shape.of(self.slabs, self.box, self.size, wanted).sent_bytes(self.form, element)
        return sent["to map"], sent["from map"]

    def grid(self, at_radius: bool = False) -> PaddedGrid:
        """This rank's planes; at_radius: with those that only the map's transform has something in."""
        return PaddedGrid.of(self.slabs.whole, self.box, self.size, self._planes(at_radius)[self.slabs.ranks.rank])

    def place_of(self, rank: int, wanted: range) -> tuple[Tensor, range]:
        """Planes z and rows y of a map that a rank has."""
        every_A = torch.arange(self.box, device=self.slabs.whole.device)
        if self.form == "transposed":
            ends = self._ends_along_y(wanted)
            return every_A, range(ends[rank], ends[rank + 1])
        return (self._strides().planes_of(rank) if self.form == "stride" else every_A), wanted

    def _grids(self, at_radius: bool) -> list[PaddedGrid]:
        return [PaddedGrid.of(self.slabs.whole, self.box, self.size, plane_Z) for plane_Z in self._planes(at_radius)]

    def _most_planes(self) -> int:
        return max(len(plane_Z) for plane_Z in self._planes(True))

    def _strides(self) -> Strides:
        return Strides.of(self.box, self.size, self.slabs.ranks, self.slabs.whole.device)

    def _ends_along_y(self, wanted: range) -> list[int]:
        """Rank q has the rows ends[q] <= y < ends[q + 1] of those that are wanted."""
        size = self.slabs.ranks.size
        return [wanted.start + len(wanted) * rank // size for rank in range(size + 1)]

    def _packed(self, fill: Fill, dtype: torch.dtype) -> Tensor:
        """What `fill` writes as this rank's packed voxels."""
        grid, rows = self.grid(), self.slabs.rows
        out_V2 = torch.zeros(rows.count, 2, dtype=dtype, device=rows.device)
        for part in grid.column_runs():
            grid.take(grid.filled(fill, part, dtype), part.start, rows, out_V2)
        return out_V2

    def _transposed(self, fill: Fill, dtype: torch.dtype, wanted: range) -> Tensor:
        """This rank's rows y, all z of them."""
        axes = self.grid().axes(dtype)
        if axes is not None:
            return self._map_by_kernels(axes, fill.sums, wanted)
        grid, ends = self.grid(), self._ends_along_y(wanted)
        count = ends[self.slabs.ranks.rank + 1] - ends[self.slabs.ranks.rank]
        half_ZYX = torch.empty(self.box, count, grid.columns, dtype=dtype.to_complex(), device=grid.plane_Z.device)
        for part in grid.column_runs(self._most_planes()):
            cut_ZYX = grid.along_y(grid.filled(fill, part, dtype), wanted)
            lines = self._lines(part, False)
            plane, column = lines[self.slabs.ranks.rank]
            mine_LY = cut_ZYX.transpose(1, 2)[torch.searchsorted(grid.plane_Z, plane), column]
            parts = [mine_LY[:, low - wanted.start : high - wanted.start] for low, high in pairwise(ends)]
            shapes = [(len(plane), count) for plane, _ in lines]
            all_ZXY = cut_ZYX.new_zeros(self.size, part.stop - part.start, count)
            for (plane, column), found in zip(lines, self._exchanged(parts, shapes), strict=True):
                all_ZXY[plane % self.size, column] = found
            if count:  # fewer rows than ranks leave some without any, and no library transforms nothing
                half_ZYX[:, :, part] = torch.fft.ifft(all_ZXY, dim=0).index_select(0, grid.middle()).transpose(1, 2)
        return grid.along_x(half_ZYX) if count else half_ZYX.real.new_empty(self.box, 0, self.box)

    def _map_by_kernels(self, axes: Axes, sums: Sums, wanted: range) -> Tensor:
        """As `_transposed`, on a GPU."""
        ranks, ends, grid = self.slabs.ranks, self._ends_along_y(wanted), self.grid()
        planes, limit2 = self._planes(False), largest_below(self.slabs.whole.radius)
        mine_Z, count = planes[ranks.rank], ends[ranks.rank + 1] - ends[ranks.rank]
        half_ZYX = axes.half(count, grid.columns)

        def arrived(every: Between, part: slice, found: list[Tensor]) -> None:
            axes.to_z(half_ZYX, found[0], every, part)  # of one array: what comes from the other ranks lies behind it

        ahead, there_Z, device = _OneAhead(), grid.plane_Z.int(), axes.device
        runs_x = axes.column_runs(grid.columns, self._most_planes() * len(wanted))
        owns = Between.of_runs(self.size, [mine_Z], len(wanted), runs_x, limit2, device)
        everyones = Between.of_runs(self.size, planes, count, runs_x, limit2, device)
        for part, own, every in zip(runs_x, owns, everyones, strict=True):
            cut_YL = torch.empty(len(wanted), own.counts[0], dtype=torch.complex64, device=axes.device)
            axes.to_y(cut_YL, own, sums, there_Z, wanted, part)
            parts = [cut_YL[low - wanted.start : high - wanted.start] for low, high in pairwise(ends)]
            ahead.begin(self._exchanging(parts, [(count, n) for n in every.counts]), partial(arrived, every, part))
        ahead.finish()
        return axes.to_x(half_ZYX, grid.columns)

    def _voxels_by_kernels(self, axes: Axes, map_ZYX: Tensor) -> Tensor:
        """As `from_map`, on a GPU."""
        ranks, rows, grid, limit2 = self.slabs.ranks, self.slabs.rows, self.grid(True), int(self.slabs.whole.radius**2)
        z_A, y = self.place_of(ranks.rank, range(self.box))
        half_ZYX = axes.from_x(map_ZYX[:, y.start : y.stop].to(axes.device, torch.float32), z_A, y.start, grid.columns)
        out_V2, planes = torch.zeros(rows.count, 2, device=axes.device), self._planes(True)
        there_Z = grid.plane_Z.int()

        def arrived(mine: Between, part: slice, found: list[Tensor]) -> None:
            axes.from_y(out_V2, found[0], mine, rows, there_Z, part)  # rows of the other ranks lie behind it

        ahead, device = _OneAhead(), axes.device
        runs_x = axes.column_runs(grid.columns, self._most_planes() * self.box)
        owns = Between.of_runs(self.size, [planes[ranks.rank]], self.box, runs_x, limit2, device)
        everyones = Between.of_runs(self.size, planes, len(y), runs_x, limit2, device)
        for part, mine, every in zip(runs_x, owns, everyones, strict=True):
            if self.form == "replicated":
                cut_YL = torch.empty(self.box, mine.counts[0], dtype=torch.complex64, device=device)
                axes.from_z(half_ZYX, cut_YL, mine, part)
                arrived(mine, part, [cut_YL])
            else:
                cut = torch.empty(len(y) * sum(every.counts), dtype=torch.complex64, device=device)
                axes.from_z(half_ZYX, cut, every, part)
                lines, ends = [len(y) * n for n in every.counts], self._ends_along_y(range(self.box))
                shapes = [(high - low, mine.counts[0]) for low, high in pairwise(ends)]
                ahead.begin(self._exchanging(list(cut.split(lines)), shapes), partial(arrived, mine, part))
        ahead.finish()
        return out_V2

    def _planes(self, at_radius: bool) -> list[Tensor]:
        """z of each rank's planes, on the host."""
        return [self.slabs.planes_of(rank, at_radius) for rank in range(self.slabs.ranks.size)]

    def _to_slabs(self, half_ZYX: Tensor, part: slice) -> Tensor:
        """Columns of this rank's rows y, all z of them [N, n, c] -> of this rank's planes [Z, N, c]."""
        ranks, lines, ends = self.slabs.ranks, self._lines(part, True), self._ends_along_y(range(self.box))
        every = PaddedGrid.of(self.slabs.whole, self.box, self.size)
        all_ZXY = every.from_z(half_ZYX).transpose(1, 2)
        parts = [all_ZXY[plane + every.columns - 1, column] for plane, column in lines]
        plane, column = lines[ranks.rank]
        shapes = [(len(plane), high - low) for low, high in pairwise(ends)]
        found_LY = torch.cat(self._exchanged(parts, shapes), 1)
        mine = self.grid(at_radius=True)
        out_ZXY = half_ZYX.new_zeros(len(mine.plane_Z), half_ZYX.shape[2], self.box)
        out_ZXY[torch.searchsorted(mine.plane_Z, plane), column] = found_LY
        return out_ZXY.transpose(1, 2)

    def _lines(self, part: slice, at_radius: bool) -> list[tuple[Tensor, Tensor]]:
        """(z, number of the column in the run) of the lines along y that hold anything, of each rank's planes."""
        limit2, out = self.slabs.whole.radius**2 + at_radius, []
        for grid in self._grids(at_radius):
            x_X = torch.arange(part.start, part.stop, device=grid.plane_Z.device)
            plane, column = (grid.plane_Z[:, None] ** 2 + x_X**2 < limit2).nonzero(as_tuple=True)
            out.append((grid.plane_Z[plane], column))
        return out

    def _exchanged(self, parts: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
        """Complex lines of each rank for each."""
        sent = [torch.view_as_real(one.contiguous()) for one in parts]
        found = self.slabs.ranks.exchanged(sent, [(*shape, 2) for shape in shapes], "transforms")
        return [torch.view_as_complex(one) for one in found]

    def _exchanging(self, parts: list[Tensor], shapes: list[tuple[int, int]]) -> Callable[[], list[Tensor]]:
        """As `_exchanged`, while they travel; what it returns waits for them."""
        sent = [torch.view_as_real(one.contiguous()) for one in parts]
        finish = self.slabs.ranks.exchanging(sent, [(*shape, 2) for shape in shapes], "transforms", lent=True)
        return lambda: [torch.view_as_complex(one) for one in finish()]


class _OneAhead:
    """One exchange that is under way, and what is to be done with what it brings."""

    def __init__(self) -> None:
        self._found: Callable[[], list[Tensor]] | None = None
        self._then: Callable[[list[Tensor]], None] | None = None

    def begin(self, found: Callable[[], list[Tensor]], then: Callable[[list[Tensor]], None]) -> None:
        """The next one is on its way; finish the one before, which has travelled while this one's lines were made."""
        self.finish()
        self._found, self._then = found, then

    def finish(self) -> None:
        """Wait for it, if there is one."""
        if self._found is not None and self._then is not None:
            self._then(self._found())
        self._found = self._then = None


def beyond_sphere(support_ZYX: Tensor) -> bool:
    """Whether voxels of a mask lie outside of the inscribed sphere, where maps are blended into their mean."""
    box = len(support_ZYX)
    distance2_N = (torch.arange(box, device=support_ZYX.device) - box // 2).int().square()
    limit2, flat_YX = (box // 2) ** 2, distance2_N[:, None] + distance2_N
    parts = runs(box, box**2, support_ZYX.device)
    return any(bool((support_ZYX[part] & (flat_YX + distance2_N[part, None, None] > limit2)).any()) for part in parts)


def extent_along_y(support_ZYX: Tensor) -> range:
    """From the first to the last y of a mask's voxels."""
    y = support_ZYX.any(2).any(0).nonzero()
    return range(int(y.min()), int(y.max()) + 1) if len(y) else range(0)
