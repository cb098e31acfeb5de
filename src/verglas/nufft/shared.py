"""Transforms whose points, grid and modes ranks share.

Each rank has points of its own, any of them, and a range of the modes along the second slowest axis. The grid is cut into slabs
of planes (in two dimensions: rows) of its slowest axis, n cells long. Two ways, of which the one is taken that costs less:

    values   a rank spreads the points of its slab, which others send it: their places once, their values in every transform. Its
             planes are those of its slab, of about the same work for each, and W - 1 more that its points reach.
    sums     a rank spreads its own points on all n planes.

Either way a rank transforms its planes, keeps their modes, and what ranks have of the same plane is added up when the grid is
turned from planes to rows (`Turn`); there the halo of a slab costs (n / N)² less than cells would. In one transform of complex
numbers of b bytes a rank of R sends, for each vector of a batch (`SharedGrid.traffic`)

    type 1   (R - 1) / R b (M + planes modes of a plane),                          M: its own points (values) or 0 (sums)
    type 2   (R - 1) / R b (M' + planes of all ranks, rows of its modes, x),       M': points of its slab (values) or 0 (sums)

and once, to plan, (R - 1) / R 24 M (values). What travels is cut into pieces: one travels while another is computed, if
`ranks.ways.overlap` lets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verglas.distributed.ranks import Ranks
from verglas.errors import InputError
from verglas.kernels.spread import BIN_XYZ, Places, interpolate, located, spread
from verglas.nufft.fine import FineGrid
from verglas.nufft.turn import PIECES, Turn, ahead

if TYPE_CHECKING:
    from verglas.kernels.spread.tiles import Tiled

PASSES = 5  # over a plane's cells in memory: cleared, spread to, and transformed twice
MEMORY_PER_LINK = 0.1  # time of a byte in memory, of one between ranks


def check_shared(shape: tuple[int, ...], implementation: str, ranks: Ranks) -> None:
    """InputError if ranks cannot share transforms to modes of this shape."""
    if len(shape) > 1 and shape[1] < ranks.size:
        raise InputError("nufft", f"{shape[1]} modes along the second axis", f"at least {ranks.size}, one a process")
    if ranks.size > 1 and implementation in ("finufft", "cufinufft", "quickest"):
        raise InputError("nufft", f"{implementation} on {ranks.size} ranks", "auto, reference, cpu or triton")


@dataclass(frozen=True)
class Route:
    """How a part of a rank's points goes to those whose slabs they lie in. part: of its points; order_M: those, by rank; sent,
    found: how many go to and come from each rank."""

    part: slice
    order_M: Tensor
    sent: tuple[int, ...]
    found: tuple[int, ...]
    ranks: Ranks

    @classmethod
    def of(cls, part: slice, owner_M: Tensor, ranks: Ranks) -> Route:
        """owner_M: who has each point of the part."""
        order_M = owner_M.argsort(stable=True)
        sent_R = torch.bincount(owner_M, minlength=ranks.size).tolist()
        found_R = [sent[ranks.rank] for sent in ranks.everyones(sent_R)]
        return cls(part, order_M, tuple(sent_R), tuple(found_R), ranks)

    def begin(self, values_BM: Tensor, name: str) -> Callable[[], Tensor]:
        """Send values [B, M, ...] of this rank's points; what is returned gives those of the points that came, [B, M', ...]."""
        batch, rest = len(values_BM), values_BM.shape[2:]
        sent = values_BM[:, self.part][:, self.order_M].split(self.sent, 1)
        finish = self.ranks.exchanging(list(sent), [(batch, count, *rest) for count in self.found], name)
        return lambda: torch.cat(finish(), 1)

    def begin_back(self, values_BM: Tensor, name: str) -> Callable[[], Tensor]:
        """The transpose of `begin`: [B, M', ...] to [B, M of the part, ...]."""
        batch, rest = len(values_BM), values_BM.shape[2:]
        finish = self.ranks.exchanging(list(values_BM.split(self.found, 1)), [(batch, n, *rest) for n in self.sent], name)

        def sorted_back() -> Tensor:
            found_BM = torch.cat(finish(), 1)
            return torch.empty_like(found_BM).index_copy_(1, self.order_M, found_BM)

        return sorted_back


class SharedGrid:
    """The part of one rank. All ranks make it together, and transform together.

    point_M3: this rank's points (x, y, z) in cells of the grid, float64; way: "values", "sums" or "auto".
    """

    def __init__(self, fine: FineGrid, point_M3: Tensor, ranks: Ranks, implementation: str, way: str = "auto") -> None:
        self.fine, self.ranks, self.implementation, self.points = fine, ranks, implementation, len(point_M3)
        ends, self.way = self._slabs(point_M3, way)
        rows = tuple(fine.shape[1] * rank // ranks.size for rank in range(ranks.size + 1))
        if self.way == "values":
            first, count = ends[:-1], [high - low + fine.window.width - 1 for low, high in pairwise(ends)]
        else:
            first, count = [0] * ranks.size, [fine.sizes[0]] * ranks.size
        self.turn = Turn(fine.sizes[0], tuple(first), tuple(count), rows, ranks)
        self.routes: list[Route] = []
        self.places: list[Places | Tiled] = []
        if self.way == "sums":
            self.places = [located(point_M3, fine.cells, fine.taps(), implementation)]
        else:
            self._route(point_M3, torch.tensor(ends[1:-1], dtype=torch.int64, device=point_M3.device))

    @property
    def modes_shape(self) -> tuple[int, ...]:
        """Of this rank's modes."""
        rows = self.turn.mine
        return (self.fine.shape[0], rows.stop - rows.start, *self.fine.shape[2:])

    @property
    def kernel(self) -> str:
        """What computes, for a run record."""
        planes = self.turn.count[self.ranks.rank]
        window = f"window of {self.fine.window.width} cells, {planes} planes of {self.fine.sizes}"
        return f"{self.implementation}, {window} on each of {self.ranks.size} ranks, {self.way} travel"

    def run(self, kind: int, sign: int, given: Tensor) -> Tensor:
        """Type 1 or 2; given [..., M] or [..., *modes_shape], complex."""
        if kind == 1:
            values = torch.view_as_real(given.contiguous()).view(prod(given.shape[:-1]), self.points, 2)
            return self.type1(values, sign).view(*given.shape[:-1], *self.modes_shape)
        lead = given.shape[: given.ndim - len(self.modes_shape)]
        found_BM2 = self.type2(given.reshape(-1, *self.modes_shape), sign)
        return torch.view_as_complex(found_BM2).view(*lead, self.points)

    def traffic(self, kind: int, batch: int = 1) -> float:
        """Bytes that this rank sends in one transform of type `kind`."""
        across = prod(self.fine.shape[1:])
        if kind == 1:
            numbers = self.points * len(self.routes[:1]) + self.turn.count[self.ranks.rank] * across
        else:
            rows = across // self.fine.shape[1] * (self.turn.mine.stop - self.turn.mine.start)
            numbers = sum(len(one) for one in self.places) * len(self.routes[:1]) + sum(self.turn.count) * rows
        return (self.ranks.size - 1) / self.ranks.size * batch * numbers * 2 * self.fine.dtype.itemsize

    def type1(self, values_BM2: Tensor, sign: int) -> Tensor:
        """This rank's modes, complex [B, *modes_shape], of the values at all ranks' points."""
        grid = self._grid(len(values_BM2), torch.zeros)
        if self.way == "sums":
            spread(grid, self.places[0], values_BM2, self.implementation)
        else:
            arriving = ahead(lambda piece: self.routes[piece].begin(values_BM2, "values at points"), PIECES, self.ranks)
            for places, found in zip(self.places, arriving, strict=True):
                spread(grid, places, found, self.implementation)
        planes = self._planes(grid)

        def modes_of_planes(part: slice) -> Tensor:
            return self.fine.modes_of_planes(planes[:, part], sign)

        return self.fine.modes_along(self.turn.to_rows(modes_of_planes, "planes to rows"), 0, sign)

    def type2(self, modes: Tensor, sign: int) -> Tensor:
        """Values [B, M, 2] at this rank's points; modes: complex [B, *modes_shape]."""
        grid = self._grid(len(modes), torch.empty)
        planes = self._planes(grid)
        for part, values in self.turn.to_planes(self.fine.cells_along(modes, 0, sign), "rows to planes"):
            planes[:, part] = self.fine.cells_of_planes(values, sign)
        if self.way == "sums":
            return interpolate(grid, self.places[0], self.implementation)

        def begin(piece: int) -> Callable[[], Tensor]:
            found_BM2 = interpolate(grid, self.places[piece], self.implementation)
            return self.routes[piece].begin_back(found_BM2, "values back to points")

        return torch.cat(list(ahead(begin, PIECES, self.ranks)), 1)

    def _grid(self, batch: int, make: Callable[..., Tensor]) -> Tensor:
        """This rank's planes, made by `make`: as `FineGrid.zeros`."""
        fine, count = self.fine, self.turn.count[self.ranks.rank]
        cells = (count, *fine.cells[1:]) if len(fine.shape) == 3 else (1, count, fine.cells[2])
        return make(batch, *cells, 2, dtype=fine.dtype, device=fine.device)

    def _planes(self, grid_BZYX2: Tensor) -> Tensor:
        """The same memory as complex [B, *axes], the slowest of them this rank's planes."""
        values = torch.view_as_complex(grid_BZYX2)
        return values if len(self.fine.shape) == 3 else values[:, 0]

    def _first_cells(self, point_M3: Tensor) -> Tensor:
        """First cell touched along the slowest axis, int64, as `located` finds it."""
        axis = len(self.fine.shape) - 1
        return (point_M3[:, axis] - 0.5 * self.fine.window.width).ceil().long() % self.fine.sizes[0]

    def _slabs(self, point_M3: Tensor, way: str) -> tuple[list[int], str]:
        """Ends of slabs of about the same work, each a whole number of bins, and the way that is taken."""
        fine, size = self.fine, self.ranks.size
        thick = BIN_XYZ[len(fine.shape) - 1]
        bins = -(-fine.sizes[0] // thick)
        taps, plane = fine.window.width ** len(fine.shape), prod(fine.sizes[1:])
        count_Z = torch.bincount(self._first_cells(point_M3) // thick, minlength=bins)
        count_Z = self.ranks.add_up(count_Z, "points of planes").cpu()
        work_Z = (count_Z * taps + int(fine.cell_taps) * thick * plane).cumsum(0)
        cuts = torch.searchsorted(work_Z, work_Z[-1] * torch.arange(1, size) // size) + 1
        for q in range(size - 1):  # at least one bin each
            cuts[q] = min(max(int(cuts[q]), q + 1, int(cuts[q - 1]) + 1 if q else 1), bins - (size - 1 - q))
        ends = [0, *(int(cut) * thick for cut in cuts), fine.sizes[0]]
        if way not in ("values", "sums", "auto") or (way == "values" and bins < size):
            raise InputError("nufft", f"way {way!r}, {bins} layers of bins", f"values (a layer for each of {size}), sums or auto")
        if bins < size:
            way = "sums"
        if way == "auto":
            slab = fine.sizes[0] / size + fine.window.width - 1
            of_plane = prod(fine.shape[1:]) + MEMORY_PER_LINK * PASSES * plane
            way = "values" if int(count_Z.sum()) / size + slab * of_plane < fine.sizes[0] * of_plane else "sums"
        return ends, way

    def _route(self, point_M3: Tensor, cut_R: Tensor) -> None:
        owner_M = torch.searchsorted(cut_R, self._first_cells(point_M3), right=True)
        low, count = self.turn.first[self.ranks.rank], self.turn.count[self.ranks.rank]
        ends = [len(point_M3) * piece // PIECES for piece in range(PIECES + 1)]
        for first, last in pairwise(ends):
            route = Route.of(slice(first, last), owner_M[first:last], self.ranks)
            found_M3 = route.begin(point_M3[None], "points")()[0]
            self.routes.append(route)
            self.places.append(located(found_M3, self.fine.cells, self.fine.taps(), self.implementation).within(low, count))
