"""Each half-set's map solved for by one rank: of small boxes quicker than by all ranks in slabs, and with fewer messages.

Where ranks have half-sets apart the sums of a half-set go to one of the ranks that added them up. Between the two that solve
travel the sums of the lowest shells, which both get the mean of, and the second one's averages on the unpadded grid, for the
FSC. Then each sends its new map and curves to all: the map as voxels inside the mask or, if these are less, as the quotients of
data and weight within the radius, which every rank transforms itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.memory import usable_device_memory
from verglas.core.rows import RowTable, packed_sphere
from verglas.distributed.ranks import Ranks
from verglas.maximization.accumulate import VOXELS_AT_ONCE, Accumulator
from verglas.maximization.halves import (
    Solution,
    fsc_of_products,
    nearest_of,
    padded_radius,
    solve_with_fsc,
    unpadded_average,
    unpadded_grid,
    unpadded_shells,
)
from verglas.maximization.shells import averages_cuda, fsc_sums_cuda, serves
from verglas.maximization.solve import SolvedSums, gather_sums, map_of_quotients

LARGEST_BOX = 400  # px: above, half of a map of each half-set takes longer to transform than slabs take to be exchanged
CURVES = ("tau2_S", "sigma2_S", "ssnr_S", "coverage_S")  # of a solution


@dataclass(frozen=True)
class Solvers:
    """The ranks that solve for the first and the second half-set; givers: those that have sums of each."""

    ranks: Ranks
    of_half: tuple[int, int]
    givers: tuple[list[int], list[int]]

    @classmethod
    def agreed(cls, ranks: Ranks, box: int, slices: Sequence[int], device: torch.device) -> Solvers | None:
        """slices: that this rank has added to either half-set. None where a GPU has no room for a whole map. All ranks ask."""
        room = device.type != "cuda" or usable_device_memory(device) / 2 > workspace(box)
        counts_R3 = ranks.numbers([*slices, int(room)], "who solves")
        givers = tuple([rank for rank, counts in enumerate(counts_R3) if counts[half]] for half in range(2))
        if not all(counts[2] for counts in counts_R3):
            return None
        return cls(ranks, chosen(givers[0], givers[1], ranks.size), (givers[0], givers[1]))

    @property
    def mine(self) -> int | None:
        """The half-set that this rank solves for."""
        return self.of_half.index(self.ranks.rank) if self.ranks.rank in self.of_half else None

    def exchanged(self, sent: Tensor, name: str, both: bool = True) -> Tensor:
        """What the other solver sends, of the same shape. both: the first one sends, too; else it gets nothing of its own back.
        Every rank asks, those that solve nothing with an empty tensor."""
        first, second = self.of_half
        none = sent.new_empty(0)
        parts, shapes = [none] * self.ranks.size, [(0,)] * self.ranks.size
        if self.mine == 1:
            parts[first], shapes[first] = sent, (sent.numel() if both else 0,)
        elif self.mine == 0:
            parts[second], shapes[second] = sent if both else none, (sent.numel(),)
        found = self.ranks.exchanged(parts, shapes, name, even=False)
        return torch.cat(found).view(sent.shape) if self.mine == 0 or (both and self.mine == 1) else sent


def workspace(box: int) -> float:
    """Bytes in which a GPU makes a map of N^3 of packed sums: a half transform and the map, with as much for what is between."""
    return 2 * (8 * box * box * (box + 1) + 4 * box**3)


def chosen(first: Collection[int], second: Collection[int], size: int) -> tuple[int, int]:
    """Two ranks that solve, of those that have sums of each half-set if there are any: then the fewest sums travel."""
    one = min(first, default=0)
    return one, max((rank for rank in second if rank != one), default=(one + 1) % size)


def collect(mine: Accumulator | None, count: int, half: int, solvers: Solvers, like: Tensor) -> None:
    """Add the sums of all givers of a half-set at its solver. mine: this rank's, if it has any or solves; count: voxels; like: a
    tensor of their precision and device. All ranks ask; a giver's sums are used up."""
    ranks, solver = solvers.ranks, solvers.of_half[half]
    senders = [rank for rank in solvers.givers[half] if rank != solver]
    solves, gives = ranks.rank == solver, ranks.rank in senders
    for first in range(0, count, VOXELS_AT_ONCE) if senders else ():
        part, none = slice(first, first + VOXELS_AT_ONCE), like.new_empty(0)
        parts, shape = [none] * ranks.size, (min(VOXELS_AT_ONCE, count - first), 3)
        if gives:
            assert mine is not None
            parts[solver] = mine.total()[part, :3].to(like.dtype)
        shapes = [shape if solves and rank in senders else (0,) for rank in range(ranks.size)]
        found = ranks.exchanged(parts, shapes, "sums of slices, at who solves", even=False)
        if solves:
            assert mine is not None
            for rank in senders:
                mine.total()[part, :3] += found[rank]
    if gives and mine is not None:
        mine.used_up()


@dataclass(frozen=True)
class Frame:
    """What all ranks know of the sums: box, padding, table of their voxels; like: a tensor of their precision and device."""

    box: int
    padding: float
    rows: RowTable
    like: Tensor


def solve_by_ranks(
    mine: Accumulator | None, frame: Frame, solvers: Solvers, symmetry: str, join_shell: int, tau2_fudge: float,
    support_ZYX: Tensor,
) -> tuple[list[Solution], Tensor]:  # fmt: skip
    """As `halves.solve_halves`. mine: all sums of the half-set that this rank solves for, which are used up; support_ZYX: bool,
    the voxels that are wanted: others may be anything."""
    ranks, none = solvers.ranks, frame.like.new_empty(0)
    if mine is not None:
        mine.rounded()  # the solvers exchange numbers of one precision: of many slices, one may have more of it than the other
    half = None if mine is None else gather_sums([mine], symmetry, consume=True)
    if join_shell > 0:
        low_L = none.long() if half is None else low_voxels(half.rows, padded_radius(join_shell, half.padding))
        own_L3 = none if half is None else half.some(low_L)
        other_L3 = solvers.exchanged(own_L3, "sums of low shells")
        if half is not None:
            half.set(low_L, (0.5 * (own_L3 + other_L3)).to(own_L3))
    own_U2 = none if half is None else averages(half)
    other_U2 = solvers.exchanged(own_U2, "averages", both=False)
    curve_S = torch.zeros(frame.box // 2 + 1, dtype=torch.float64, device=none.device)
    if half is not None and solvers.mine == 0:
        curve_S = fsc_of_averages(half, own_U2, other_U2)
    curve_S = ranks.of_rank(solvers.of_half[0], curve_S, "correlation of halves")
    inside = int(support_ZYX.sum())
    quotients = 2 * frame.rows.count < inside
    own = None if half is None else solve_with_fsc(half, curve_S, tau2_fudge, False, quotients=quotients)
    shape = (frame.rows.count, 2) if quotients else (inside,)
    of_half = [own if solvers.mine == number else None for number in range(2)]
    pairs = zip(of_half, solvers.of_half, strict=True)
    maps, curves = zip(*(sent(one, solver, frame, ranks, support_ZYX, shape) for one, solver in pairs), strict=True)
    on_host = torch.cat([*curves, curve_S[None]]).cpu()  # one wait
    solutions = [Solution(map_ZYX, *rows) for map_ZYX, rows in zip(maps, on_host.split(len(CURVES)), strict=False)]
    return solutions, on_host[-1]


def sent(
    own: Solution | None, solver: int, frame: Frame, ranks: Ranks, support_ZYX: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(map, curves) of a solver's solution, on all ranks. shape: of what is sent: the map inside the support, or its quotients
    [V, 2]."""
    kind = torch.float32 if len(shape) == 1 else frame.like.dtype
    values, curves_CS = frame.like.new_empty(shape, dtype=kind), frame.like.new_empty(
        len(CURVES), frame.box // 2 + 1, dtype=torch.float64
    )
    if own is not None:
        values = own.map_ZYX[support_ZYX] if len(shape) == 1 else own.map_ZYX
        curves_CS = torch.stack([getattr(own, name) for name in CURVES])
    both = torch.cat([one.contiguous().view(-1).view(torch.uint8) for one in (curves_CS, values)])
    curves, values = ranks.of_rank(solver, both, "maps").split([curves_CS.nbytes, values.nbytes])
    values, curves_CS = values.view(kind).view(shape), curves.view(torch.float64).view_as(curves_CS)
    if len(shape) == 2:
        map_ZYX = map_of_quotients(values, frame.rows, frame.box, frame.padding)
    elif own is None:
        map_ZYX = torch.zeros(support_ZYX.shape, device=values.device).masked_scatter_(support_ZYX, values)
    else:
        map_ZYX = own.map_ZYX
    return map_ZYX, curves_CS


def low_voxels(rows: RowTable, reach: int) -> Tensor:
    """Numbers of the voxels with r <= reach."""
    reach = min(reach, rows.half)
    z, y, x = (torch.arange(low, reach + 1, device=rows.device) for low in (-reach, -reach, 0))
    start_ZY, length_ZY = (table[z[:, None] + rows.half, y + rows.half].long() for table in (rows.start_ZY, rows.length_ZY))
    r2_ZYX = (z.square()[:, None] + y.square())[..., None] + x.square()
    return (start_ZY[..., None] + x)[(r2_ZYX <= reach**2) & (x < length_ZY[..., None])]


def averages(sums: SolvedSums) -> Tensor:
    """Data over weight on the unpadded grid, of its voxels within the radius, packed [U, 2]."""
    if serves(sums.data_V2, sums.weight_V):
        there = packed_sphere(float(sums.radius), sums.device)
        return averages_cuda(sums.data_V2, sums.weight_V, sums.rows, nearest_of(sums), there, sums.radius)
    plane_U, *_ = unpadded_grid(sums)
    return unpadded_average(sums, plane_U)[unpadded_shells(sums, plane_U)[1]]


def fsc_of_averages(sums: SolvedSums, first_U2: Tensor, second_U2: Tensor) -> Tensor:
    """FSC of two halves from their `averages`, as `halves.fsc_of_sums` finds it of their sums."""
    shells = sums.radius + 1
    if serves(first_U2, second_U2):
        there = packed_sphere(float(sums.radius), sums.device)
        ones_U = first_U2.new_ones(1).expand(len(first_U2))
        axis_E = torch.arange(-there.half, there.half + 1, device=sums.device)
        products_3S = fsc_sums_cuda((first_U2, ones_U), (second_U2, ones_U), there, axis_E, axis_E, shells)
    else:
        shell, inside = unpadded_shells(sums, unpadded_grid(sums)[0])
        products = (first_U2 * second_U2).sum(1), first_U2.square().sum(1), second_U2.square().sum(1)
        products_3S = torch.stack([torch.bincount(shell[inside], one, shells) for one in products])
    return fsc_of_products(sums, products_3S)
