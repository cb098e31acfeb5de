"""How quick the ranks of a run are, what a row costs, and which rows each begins with: rows move from slow ranks to quick ones.

A block of rows takes (a rows + b samples) / speed seconds, where the samples are those that its particles had in the
iteration before; a rank's first block of a set (half-set) takes `start` / speed more, as references are made ready. All of it is
measured in every iteration, by all ranks from the same numbers: they come to the same shares.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.distributed.board import Board
from verglas.distributed.ranks import Ranks

CRUMB = 0.1  # of what a rank works on: of no half-set it begins with less
NOTICED = 1.1  # times the time of equal loads that the slowest rank needs: less is within what measured speeds err by
MOVED = 1.15  # the same, for rows to move: less is made up within iterations
PAID_BACK = 8  # iterations in which moved rows must save the time that reading their images takes
REMEMBERED = 200  # last blocks that are measured
FIXED = 0.05  # of the time of a largest block: what each is taken to need beside its rows (clocks of hosts tell too little of it)
LARGEST_PART = 0.9  # of a row's seconds: samples' part
WHOLE = 0.5  # of the largest block: smaller ones cost more a row


@dataclass(frozen=True)
class Block:
    """A block that was worked on: its rows, the samples its particles had before, the seconds it took, and whether it was this
    rank's first one of its set."""

    rows: int
    samples: float
    seconds: float
    first: bool = False


@dataclass(frozen=True)
class Pace:
    """speed_R: of every rank, 1 on average; per_row, per_sample: seconds at speed 1 of each row and sample in a block; mean_row:
    of a row with as many samples as the mean; fixed: of a block beside its rows; start: what the first block of a set takes more.
    known: whether anything was measured; at first all ranks are alike."""

    speed_R: Tensor
    per_row: float = 1.0
    per_sample: float = 0.0
    mean_row: float = 1.0
    fixed: float = 0.0
    start: float = 0.0
    known: bool = False

    def cost(self, samples_B: Tensor) -> Tensor:
        """Seconds of rows at speed 1, float64 [B]."""
        return self.per_row + self.per_sample * samples_B.double()


class Shares:
    """owner_B: the rank that begins with each row; home_B: the one that read it at the start, and has its image ever since.

    order_B: rows in the order of the files; set_B: number of each row's set (half-set): ranks have as much to do in each. half_B:
    half-sets that ranks have apart, each as few of them as possible: what a half-set takes whatever its particles (references,
    slices of the whole grid) is then done by fewer ranks, and these alone have sums of it to send. None: not asked for.
    reading: seconds in which a rank reads an image that comes to it, the same on all ranks; waited: seconds so far in which this
    rank had nothing to compute, as images of others had not arrived.
    """

    def __init__(self, order_B: Tensor, set_B: Tensor, ranks: Ranks, half_B: Tensor | None = None) -> None:
        self.order_B, self.set_B, self.ranks, self.half_B = order_B, set_B, ranks, half_B
        self.pace = Pace(torch.ones(ranks.size, dtype=torch.float64))
        self.owner_B = owners(order_B, set_B, ranks.size, half_B)
        self.home_B = self.owner_B
        self.said: list[str] = []
        self._log_R = torch.zeros_like(self.pace.speed_R)  # speeds as measured last, their logarithms
        self._blocks: deque[Block] = deque(maxlen=REMEMBERED)
        self.reading = self.waited = 0.0
        self.board = Board(ranks.store, ranks.rank, f"{next(ranks.sequence)}")

    def worked(self, block: Block) -> None:
        """Remember how long a block took this rank."""
        self._blocks.append(block)

    def follow(self, samples_B: Tensor) -> Tensor:
        """Measure anew and move rows if that pays; all ranks call it between iterations. Returns the rows that this one gets.

        samples_B: of each particle, as the coming iteration is expected to have them. `said` tells people about it.
        """
        self.said.clear()
        self.board.next_round()
        before_B, everyones = self.owner_B, self.ranks.everyones(list(self._blocks), "paces")
        if not any(everyones):
            return before_B[:0]
        self._blocks.clear()
        self.pace = self._confirmed(measured(everyones, self.pace))
        cost_B = self.pace.cost(samples_B)
        if load(before_B, cost_B, self.pace.speed_R) > MOVED:
            new_B = reassigned(before_B, self.home_B, self, cost_B)
            if not self._pays(new_B, cost_B):
                return before_B[:0]
            self.owner_B = new_B
            speeds = ", ".join(f"{speed:.2f}" for speed in self.pace.speed_R.tolist())
            moved = int((self.owner_B != before_B).sum())
            self.said.append(f"The ranks' speeds are {speeds} of their mean: {moved} particles went to quicker ones.")
        me = self.ranks.rank
        return ((self.owner_B == me) & (before_B != me)).nonzero().squeeze(1)

    def _confirmed(self, pace: Pace) -> Pace:
        """That pace, with a rank taken for slow or quick only as far as it was so in the iteration before, too: a few blocks in
        which kernels are compiled, or another program is at work, tell nothing of the next iteration."""
        log_R = pace.speed_R.log()
        before_R, self._log_R = self._log_R, log_R
        agreed_R = torch.where(log_R * before_R > 0, torch.minimum(log_R.abs(), before_R.abs()).copysign(log_R), 0)
        return replace(pace, speed_R=agreed_R.exp() / agreed_R.exp().mean())

    def turns(self, sets: list[Tensor]) -> list[tuple[int, bool]]:
        """The order in which this rank goes through sets (rows of each) that are worked on one after the other: (number, whether
        it helps others there once its own rows are done). Apart it sees first to its own rows, then to those of others, of the
        set that it is at before those that it would have to begin with."""
        everything = range(len(sets))
        if self.half_B is None:
            return [(number, True) for number in everything]
        own = [number for number in everything if bool((self.owner_B[sets[number]] == self.ranks.rank).any())]
        last = own[-1] if own else -1
        others = [number for number in (*everything[last + 1 :], *everything[: last + 1]) if number != last]
        return [(number, number == last) for number in own] + [(number, True) for number in others]

    def starts_of(self, owner_B: Tensor) -> Tensor:
        """How many half-sets each rank begins with, at least 1, float64 [R]."""
        if self.half_B is None:
            return torch.ones(self.ranks.size, dtype=torch.float64)
        halves = int(self.half_B.max()) + 1  # numbers, as unique columns of a matrix take a hundred times as long
        counts_RH = torch.bincount(owner_B * halves + self.half_B, minlength=self.ranks.size * halves).view(-1, halves)
        return (counts_RH > 0).sum(1).double().clamp_min(1)

    def _pays(self, new_B: Tensor, cost_B: Tensor) -> bool:
        """Whether other owners would save more than it takes to give them their images, and to begin with another half-set."""
        before, after = (self._seconds(owner_B, cost_B) for owner_B in (self.owner_B, new_B))
        if self.half_B is not None and after > before / NOTICED:
            return False
        read_B = (new_B != self.owner_B) & (new_B != self.home_B)
        most = int(torch.bincount(new_B[read_B], minlength=self.ranks.size).max())
        return PAID_BACK * (before - after) >= self.reading * most

    def _seconds(self, owner_B: Tensor, cost_B: Tensor) -> float:
        """Of the rank that needs longest for its own rows, half-sets begun included."""
        owned_R = self.starts_of(owner_B) * self.pace.start
        return float((owned_R.index_add_(0, owner_B, cost_B) / self.pace.speed_R).max())


def owners(order_B: Tensor, set_B: Tensor, size: int, half_B: Tensor | None = None) -> Tensor:
    """Which of `size` ranks begins with which row [B]: equal shares of every set of rows, each a run of the order of the files.

    order_B: rows in that order; set_B: number of each row's set (half-set), so that all ranks have as much to do in each; half_B:
    half-sets of which each rank is to have as few as possible (`Shares`), equal shares of sets among those that have the same.
    """
    owner_B = torch.zeros(len(order_B), dtype=torch.int64)
    if half_B is None:
        half_B = torch.zeros_like(owner_B)
    halves, count_H = half_B.unique(return_counts=True)
    for half, share_R in zip(halves, _shares_of_halves(count_H, size), strict=True):
        for number in set_B[half_B == half].unique():
            mine = order_B[(set_B[order_B] == number) & (half_B[order_B] == half)]
            ends_R = (share_R.cumsum(0) * len(mine)).round()
            owner_B[mine] = torch.searchsorted(ends_R, torch.arange(len(mine)).double(), right=True).clamp_max(size - 1)
    return owner_B


def _shares_of_halves(count_H: Tensor, size: int) -> Tensor:
    """Which part of each half-set each rank has [H, R], with as many rows for each rank (to a `CRUMB`): half-sets lie one after
    another on a line, and ranks divide it."""
    end_H, each = count_H.cumsum(0).double(), float(count_H.sum()) / size
    first_R = each * torch.arange(size, dtype=torch.float64)
    overlap_HR = torch.minimum(end_H[:, None], first_R + each) - torch.maximum((end_H - count_H)[:, None], first_R)
    least_H1 = overlap_HR.amax(1, keepdim=True).clamp_max(CRUMB * each)
    overlap_HR = torch.where(overlap_HR < least_H1, 0, overlap_HR)
    return overlap_HR / overlap_HR.sum(1, keepdim=True)


def load(owner_B: Tensor, cost_B: Tensor, speed_R: Tensor) -> float:
    """Time of the rank that needs longest for its own rows, relative to that of the best division."""
    owned_R = torch.zeros_like(speed_R).index_add_(0, owner_B, cost_B)
    return float((owned_R / speed_R).max() * speed_R.sum() / cost_B.sum())


def measured(blocks_R: list[list[Block]], before: Pace) -> Pace:
    """Speeds and costs from the blocks that every rank worked on; a rank without any keeps its speed. Medians, of large blocks
    that are not the first of a set: these tell of `start`, and of a rank that has no others.

    y, seconds a row, is (1 + k x) / v in the blocks of a rank, where x are samples a row. The slope of y relative to its median
    is q = k / (1 + k X), X the median of x, whatever v is; so k = q / (1 - q X): the median over all pairs of blocks is taken.
    """
    firsts_R = [[one for one in blocks if one.first] for blocks in blocks_R]
    later_R = [[one for one in blocks if not one.first] for blocks in blocks_R]
    most_R = [max((block.rows for block in blocks), default=0) for blocks in blocks_R]
    whole_R = _whole(later_R, most_R)
    if not any(whole_R):  # then first ones have to tell
        firsts_R, later_R, whole_R = [[] for _ in blocks_R], blocks_R, _whole(blocks_R, most_R)
    y_R = [torch.tensor([one.seconds / one.rows for one in blocks], dtype=torch.float64) for blocks in whole_R]
    x_R = [torch.tensor([one.samples / one.rows for one in blocks], dtype=torch.float64) for blocks in whole_R]
    k_p = torch.cat([_relative_cost(x_n, y_n) for x_n, y_n in zip(x_R, y_R, strict=True)])
    k = float(k_p.median()) if len(k_p) else 0.0
    speed_R = torch.stack([((1 + k * x_n) / y_n).median() if len(y_n) else y_n.sum() for x_n, y_n in zip(x_R, y_R, strict=True)])
    start, speed_R = _start(firsts_R, speed_R, k)
    known_R = speed_R > 0
    mean = float(speed_R[known_R].mean())
    speed_R = torch.where(known_R, speed_R / mean, before.speed_R)
    mean_row = (1 + k * float(torch.cat(x_R).mean())) / mean
    start = before.start if start is None else start / mean
    usual = statistics.median(v * one.seconds for v, blocks in zip(speed_R.tolist(), whole_R, strict=True) for one in blocks)
    return Pace(speed_R, 1 / mean, k / mean, mean_row, FIXED * usual, start, True)


def _whole(blocks_R: list[list[Block]], most_R: list[int]) -> list[list[Block]]:
    """The large ones among every rank's blocks."""
    return [[one for one in blocks if one.rows >= WHOLE * most] for blocks, most in zip(blocks_R, most_R, strict=True)]


def _start(firsts_R: list[list[Block]], speed_R: Tensor, k: float) -> tuple[float | None, Tensor]:
    """What a first block of a set takes more than others, in units of a row without samples (None: not known), and the speeds,
    with those of ranks that worked on first blocks only (0 before)."""
    costs_R = [[one.rows + k * one.samples for one in blocks] for blocks in firsts_R]
    pairs_R = [[(cost, one.seconds) for cost, one in zip(*both, strict=True)] for both in zip(costs_R, firsts_R, strict=True)]
    known = [v * seconds - cost for v, pairs in zip(speed_R.tolist(), pairs_R, strict=True) if v > 0 for cost, seconds in pairs]
    if not known:
        return None, speed_R
    start = max(0.0, statistics.median(known))
    found_R = [statistics.median((start + cost) / seconds for cost, seconds in pairs) if pairs else 0.0 for pairs in pairs_R]
    return start, torch.where(speed_R > 0, speed_R, torch.tensor(found_R, dtype=torch.float64))


def _relative_cost(x_n: Tensor, y_n: Tensor) -> Tensor:
    """k (see `measured`) from every pair of blocks of a rank that differ in x."""
    first_p, second_p = torch.triu_indices(len(x_n), len(x_n), 1)
    run_p = x_n[second_p] - x_n[first_p]
    differ_p = run_p != 0
    if not bool(differ_p.any()):
        return x_n[:0]
    middle = float(x_n.median().clamp_min(1e-9))
    q_p = ((y_n[second_p] - y_n[first_p])[differ_p] / run_p[differ_p] / y_n.median()).clamp(0, LARGEST_PART / middle)
    return q_p / (1 - q_p * middle)


def reassigned(owner_B: Tensor, home_B: Tensor, shares: Shares, cost_B: Tensor) -> Tensor:
    """Owners [B] with whom all ranks are done at once, in every set: whoever has too much gives away its last rows, first those
    that it did not read at the start; they go to ranks that read them then, and what is left in runs of the files' order."""
    new_B = owner_B.clone()
    if shares.half_B is not None:
        row_n = shares.order_B[torch.argsort(shares.half_B[shares.order_B], stable=True)]
        for _ in range(2):  # who begins with how many half-sets is known after the first time
            room_R = targets(float(cost_B.sum()), shares.pace, shares.starts_of(new_B))
            new_B = owner_B.clone()
            new_B[row_n] = _balanced(owner_B[row_n], home_B[row_n], cost_B[row_n], room_R)
        return new_B
    for number in shares.set_B.unique():
        row_n = shares.order_B[shares.set_B[shares.order_B] == number]
        room_R = targets(float(cost_B[row_n].sum()), shares.pace)
        new_B[row_n] = _balanced(owner_B[row_n], home_B[row_n], cost_B[row_n], room_R)
    return new_B


def targets(total: float, pace: Pace, starts_R: Tensor | None = None) -> Tensor:
    """Costs of all ranks' own rows that add up to `total`, so that all end at one time t: speed t - fixed - start. starts: how
    often each rank begins with a set, 1 if not said.

    None where that is less than nothing: a rank that would have to do a block for a few rows."""
    starts_R = torch.ones_like(pace.speed_R) if starts_R is None else starts_R
    fixed_R, used_R = pace.fixed + pace.start * starts_R, torch.ones(len(pace.speed_R), dtype=torch.bool)
    while True:
        end = (total + float(fixed_R[used_R].sum())) / float(pace.speed_R[used_R].sum())
        room_R = pace.speed_R * end - fixed_R
        late_R = used_R & (room_R <= 2 * pace.fixed)
        if torch.equal(late_R, used_R):  # of few rows, which take less than what a block does: somebody has to
            late_R = used_R & (room_R <= 0)
        if not bool(late_R.any()):
            return torch.where(used_R, room_R, 0.0)
        used_R &= ~late_R


def _balanced(owner_n: Tensor, home_n: Tensor, cost_n: Tensor, room_R: Tensor) -> Tensor:
    """New owners of the rows of a set, in the order of the files. room_R: cost of each rank's own rows; it is used up."""
    new_n = torch.full_like(owner_n, -1)

    def give(rank: int, candidate_n: Tensor) -> None:
        """As many of these rows, from the first on, as the rank has room for."""
        running_n = cost_n[candidate_n].cumsum(0)
        kept_n = candidate_n[running_n - 0.5 * cost_n[candidate_n] <= room_R[rank]]
        new_n[kept_n] = rank
        room_R[rank] -= cost_n[kept_n].sum()

    for rank in range(len(room_R)):
        own_n = (owner_n == rank).nonzero().squeeze(1)
        give(rank, own_n[torch.argsort((home_n[own_n] != rank).long(), stable=True)])
    for rank in range(len(room_R)):
        give(rank, ((new_n < 0) & (home_n == rank)).nonzero().squeeze(1))
    left_n = (new_n < 0).nonzero().squeeze(1)
    middle_n = cost_n[left_n].cumsum(0) - 0.5 * cost_n[left_n]
    new_n[left_n] = torch.searchsorted(room_R.clamp_min(0).cumsum(0), middle_n).clamp_max(len(room_R) - 1)
    return new_n
