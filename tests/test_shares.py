"""Who works on which particles: nothing twice, nobody waits long, whoever is slow; and their images are there."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tests.test_streaming import shuffled
from torch import Tensor

from verglas.distributed.board import Board, Standing
from verglas.distributed.handout import Handout
from verglas.distributed.ranks import Ranks
from verglas.distributed.shares import Block, Pace, Shares, load, measured, owners, targets
from verglas.refinement.dataset import Dataset
from verglas.refinement.residency import Residency


@dataclass
class Counters:
    """A store of one process."""

    values: dict[str, int | str] = field(default_factory=dict)

    def add(self, key: str, amount: int) -> int:
        self.values[key] = int(self.values.get(key, 0)) + amount
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [str(self.values[key]).encode() for key in keys]


class Together:
    """Several ranks in one process, each a line of its own in time. Sets: even and odd rows; apart: as half-sets."""

    def __init__(self, n: int, speeds: list[float], apart: bool = False, noise: Callable[[], float] = lambda: 1.0) -> None:
        """noise: what the seconds of a block are multiplied with."""
        self.now, self.speeds, store, self.number, self.noise = 0.0, speeds, Counters(), 0, noise
        self.set_B = torch.arange(n) % 2
        ranks = [Ranks(rank, len(speeds), len(speeds), store) for rank in range(len(speeds))]  # type: ignore[arg-type]
        self.shares = [Shares(torch.arange(n), self.set_B, one, self.set_B if apart else None) for one in ranks]

    def iteration(self, cost_B: Tensor, fixed: float, size: int, start: float = 0.0) -> float:
        """Seconds of an iteration, relative to those of ranks that never wait and have blocks of the largest size.

        cost_B: seconds of rows at speed 1, which have cost_B - 0.5 samples; fixed: seconds of a block; start: what the first one
        of a set takes more, on every rank. Who is done with a set begins with the next one.
        """
        begin, done, self.begun = self.now, [list[Tensor](), list[Tensor]()], 0
        self.number += 1
        workers = [self._blocks(one, cost_B, size, done) for one in self.shares]
        waiting = [(self.now, rank) for rank in range(len(workers))]
        while waiting:
            self.now, rank = heapq.heappop(waiting)
            found = next(workers[rank], None)
            if found is not None:
                block, first = found
                seconds = (fixed + first * start + float(cost_B[block].sum())) / self.speeds[rank] * self.noise()
                heapq.heappush(waiting, (self.now + seconds, rank))
        for number in (0, 1):
            rows = (self.set_B == number).nonzero().squeeze(1)
            assert torch.equal(torch.cat(done[number]).sort().values, rows), "every row once"
        starts = 2 * len(workers) if self.shares[0].half_B is None else len(workers)
        ideal = float(cost_B.sum() + fixed * len(cost_B) / size) + starts * start
        return (self.now - begin) / (ideal / sum(self.speeds))

    def _blocks(self, shares: Shares, cost_B: Tensor, size: int, done: list[list[Tensor]]) -> Iterator[tuple[Tensor, bool]]:
        """The blocks that a rank gets, and whether each is its first one of a set."""
        sets = [(self.set_B == number).nonzero().squeeze(1) for number in (0, 1)]
        for number, helps in shares.turns(sets):
            handout = Handout(sets[number], shares, cost_B - 0.5, lambda: self.now, f"{self.number}.{number}", helps)
            for place, block in enumerate(handout.blocks(handout.best(size))):
                done[number].append(block)
                self.begun += place == 0
                yield block, place == 0

    def follow(self, samples_B: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        """What happens between iterations; the rows that each rank gets."""
        everyones = [list(one._blocks) for one in self.shares]
        monkeypatch.setattr(Ranks, "everyones", lambda self, value, name: everyones)
        return [one.follow(samples_B) for one in self.shares]


def test_ranks_own_equal_runs_of_every_half_set() -> None:
    order_B = torch.randperm(1003, generator=torch.Generator().manual_seed(0))
    half_B = 1 + (torch.arange(1003) % 3 == 0).long()
    shares = Shares(order_B, half_B, Ranks(0, 4))
    for half in (1, 2):
        counts = torch.bincount(shares.owner_B[half_B == half], minlength=4)
        assert int(counts.max() - counts.min()) <= 1
        mine = order_B[half_B[order_B] == half]
        assert bool((shares.owner_B[mine].diff() >= 0).all())  # a rank reads its part of the files in one go


@pytest.mark.parametrize(("size", "shares"), [(2, [1, 1]), (3, [1, 2, 1]), (4, [1] * 4), (8, [1] * 8)])
def test_ranks_have_half_sets_apart(size: int, shares: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank works on one half-set, but one of an odd number; no half-set is begun by others if all are alike."""
    draw = torch.Generator().manual_seed(0)
    half_B = 1 + (torch.randperm(4000, generator=draw) < 2020).long()
    owner_B = owners(torch.randperm(4000, generator=draw), half_B, size, half_B)
    counts = torch.bincount(owner_B, minlength=size).double() * size / 4000
    assert float((counts - 1).abs().max()) < 0.06
    assert [len(half_B[owner_B == rank].unique()) for rank in range(size)] == shares
    together, cost_B = Together(1000 * size, [1.0] * size, apart=True), torch.ones(1000 * size, dtype=torch.float64)
    for _ in range(4):
        found = together.iteration(cost_B, 30.0, 300, 200.0)
        assert not any(map(len, together.follow(cost_B - 0.5, monkeypatch)))
    assert together.begun == sum(shares) and (found < 1.05 or size == 3)


SLOW = [(2, 1.0, 0.0), (2, 0.5, 0.0), (8, 0.5, 0.0), (2, 0.5, 500.0), (8, 0.5, 500.0), (8, 0.1, 0.0), (4, 0.01, 0.0)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("ranks", "slow", "start"), SLOW)
def test_a_slow_rank_costs_its_own_part_alone(
    ranks: int, slow: float, start: float, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iteration takes at most 1.15 times the ideal; the first two, until a rank's speed is known, of what ranks that are alike
    would need, if one is half as fast as they.

    start: a third of the other work.
    """
    together, alike = (Together(3000 * ranks, speeds, apart) for speeds in ([1.0] * (ranks - 1) + [slow], [1.0] * ranks))
    cost_B = torch.ones(3000 * ranks, dtype=torch.float64)
    first = alike.iteration(cost_B, 30.0, 300, start)
    assert together.iteration(cost_B, 30.0, 300, start) < 1.15 * first or slow < 0.5
    assert not any(map(len, together.follow(cost_B - 0.5, monkeypatch)))  # it may have compiled kernels
    assert together.iteration(cost_B, 30.0, 300, start) < 1.15 * first or slow < 0.5
    gained = together.follow(cost_B - 0.5, monkeypatch)
    assert all(torch.equal(one.owner_B, together.shares[0].owner_B) for one in together.shares)
    assert (sum(map(len, gained)) > 0) == (slow < 1)
    assert len(gained[-1]) == 0
    for _ in range(3):
        assert together.iteration(cost_B, 30.0, 300, start) < 1.15
        together.follow(cost_B - 0.5, monkeypatch)
        speed_R = together.shares[0].pace.speed_R
        assert float(speed_R[-1] / speed_R[0]) == pytest.approx(slow, rel=0.3, abs=0.02)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("fixed", "apart"), [(40.0, False), (40.0, True), (200.0, True)])
def test_a_rank_that_gets_slow_is_helped_at_once(ranks: int, fixed: float, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as fast from the fifth iteration on: that one, and all later ones, take at most 1.15 times the ideal. Memory would do
    for blocks of all rows; fixed: 1 or 5 % of what a rank has to do."""
    together = Together(4000 * ranks, [1.0] * ranks, apart)
    cost_B, took = torch.ones(4000 * ranks, dtype=torch.float64), list[float]()
    for number in range(9):
        together.speeds[-1] = 0.5 if number > 4 else 1.0
        began = together.now
        together.iteration(cost_B, fixed, 12000, 0.6 * fixed)
        took.append(together.now - began)
        together.follow(cost_B - 0.5, monkeypatch)
    ideal = took[4] * ranks / (ranks - 0.5)
    assert max(took[5:]) < 1.15 * ideal and max(took[7:]) < 1.09 * ideal
    assert max(took[:5]) < 1.3 * min(took[:5])  # also before it is known what a block takes


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_blocks_of_uneven_times_mislead_nobody(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take 10 % more or less, as on a shared machine, and a rank is half as fast from the fifth iteration on: no rank is
    left without rows, and the iterations take at most 1.1 times the ideal on the mean."""
    found = list[float]()
    for seed in range(6):
        draw = np.random.default_rng(seed)
        together = Together(20000 * ranks, [1.0] * ranks, True, lambda draw=draw: float(np.exp(0.1 * draw.normal())))
        cost_B, took = torch.ones(20000 * ranks, dtype=torch.float64), list[float]()
        for number in range(12):
            together.speeds[-1] = 0.5 if number > 4 else 1.0
            began = together.now
            together.iteration(cost_B, 1000.0, 30000, 1000.0)
            took.append(together.now - began)
            together.follow(torch.ones(20000 * ranks), monkeypatch)
            assert int(torch.bincount(together.shares[0].owner_B, minlength=ranks).min()) > 5000
        found += [one / (float(np.mean(took[1:5])) * ranks / (ranks - 0.5)) for one in took[5:]]
    assert np.mean(found) < 1.1 and np.quantile(found, 0.9) < 1.2


def test_samples_that_cost_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows take three times as long: their rank is as quick as the other, and still gives some away."""
    together = Together(8000, [1.0, 1.0])
    draw = torch.Generator().manual_seed(0)
    cost_B = torch.where(torch.arange(8000) < 4000, 1.0, 3.0).double() * (0.6 + 0.8 * torch.rand(8000, generator=draw))
    for _ in range(2):
        together.iteration(cost_B, 10.0, 100)
        together.follow(cost_B - 0.5, monkeypatch)
    shares = together.shares[0]
    owned_R = torch.zeros(2, dtype=torch.float64).index_add_(0, shares.owner_B, cost_B)
    assert float((owned_R / owned_R.mean() - 1).abs().max()) < 0.1
    assert together.iteration(cost_B, 10.0, 100) < 1.1


def test_speeds_and_costs_are_found_again() -> None:
    draw = np.random.default_rng(0)
    blocks_R = []
    for speed in (2.0, 1.0, 0.5):
        rows = np.array([200] * 30 + [50, 25] * 5)
        samples = rows * draw.uniform(5, 15, len(rows))
        seconds = (0.3 + 0.01 * rows + 0.002 * samples) / speed * draw.uniform(0.99, 1.01, len(rows))
        seconds[0] += 20  # compiles
        blocks_R.append([Block(int(n), float(s), float(t)) for n, s, t in zip(rows, samples, seconds)])
    shares = Shares(torch.arange(10), torch.zeros(10), Ranks(0, 3))
    pace = measured(blocks_R, shares.pace)
    assert torch.allclose(pace.speed_R, torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64) / (3.5 / 3), rtol=0.03)
    unit = 3.5 / 3  # speeds are relative to their mean
    assert pace.per_sample * unit == pytest.approx(0.002, rel=0.15)
    assert pace.per_row * unit == pytest.approx(0.01 + 0.3 / 200, rel=0.15)


def test_the_first_block_of_a_set_does_not_make_a_rank_slow() -> None:
    """It takes 5 s more at speed 1; the last rank has no other blocks."""
    many = [Block(200, 0.0, 5 + 2.0, True), *[Block(200, 0.0, 2.0)] * 4]
    few = [Block(100, 0.0, (5 + 1.0) / 0.5, True)] * 2
    pace = measured([many, few], Shares(torch.arange(10), torch.zeros(10), Ranks(0, 2)).pace)
    assert float(pace.speed_R[1] / pace.speed_R[0]) == pytest.approx(0.5)
    assert pace.start / float(pace.speed_R[0]) == pytest.approx(5.0)
    alike = measured([few, few], pace)  # nothing but first blocks
    assert torch.allclose(alike.speed_R, torch.ones(2, dtype=torch.float64)) and alike.start == pace.start
    crumbs = [*few, Block(10, 0.0, 1.0)]  # others are too small to tell of speeds
    assert torch.allclose(measured([crumbs, crumbs], pace).speed_R, alike.speed_R)


@pytest.mark.parametrize("total", [0.5, 30.0, 1e5])
def test_few_rows_are_somebodys(total: float) -> None:
    """Also where all of them take less than a block does beside its rows."""
    pace = Pace(torch.tensor([1.1, 1.2, 1.1, 0.6], dtype=torch.float64), fixed=100.0, start=50.0, known=True)
    room_R = targets(total, pace)
    assert float(room_R.sum()) == pytest.approx(total) and float(room_R.min()) >= 0


def test_rows_that_are_gone_are_asked_for_no_more() -> None:
    """Others took all of this rank's: what it takes of theirs is told ahead."""
    shares = Together(40, [1.0, 1.0]).shares[0]
    handout = Handout(torch.arange(40), shares, torch.zeros(40), lambda: 0.0, name="1.0")
    handout._taken_of(0, 20)
    assert handout._own_left and handout._own_piece(8) is None and not handout._own_left


def test_a_round_begins_with_nothing() -> None:
    board = Together(40, [1.0, 1.0]).shares[0].board
    board.begins(5.0, lambda: 3.0, own=4)
    board.ends(5.0, lambda: 4.0)
    assert board.read([0])[0] == Standing(5.0, 5.0, 1.0, 4)
    board.next_round()
    assert board.read([0])[0] == Standing(0.0, 0.0, 0.0, 0)


def test_half_sets_that_a_rank_begins_with_are_counted() -> None:
    half_B, owner_B = torch.tensor([1, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 3])
    shares = Shares(torch.arange(5), half_B, Ranks(0, 4), half_B)
    assert shares.starts_of(owner_B).tolist() == [1, 2, 1, 1]  # nothing, and it may still be given something


def test_rows_go_back_to_whom_they_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is as quick as the others again takes its own back: it still has their images."""
    together = Together(4000, [1.0, 0.5])
    cost_B = torch.ones(4000, dtype=torch.float64)
    for _ in range(2):
        together.iteration(cost_B, 10.0, 100)
        gained = together.follow(cost_B, monkeypatch)[0]
    together.speeds[1] = 1.0
    together.iteration(cost_B, 10.0, 100)
    back = together.follow(cost_B, monkeypatch)[1]
    shares = together.shares[1]
    assert len(back) > 0.8 * len(gained) and bool((shares.home_B[back] == 1).all())
    assert load(shares.owner_B, cost_B, torch.ones(2, dtype=torch.float64)) < 1.05


def test_little_is_not_worth_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    together = Together(4000, [1.0, 0.95])
    cost_B = torch.ones(4000, dtype=torch.float64)
    together.iteration(cost_B, 10.0, 100)
    assert not any(map(len, together.follow(cost_B, monkeypatch)))


def test_rows_move_where_reading_their_images_is_paid_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as fast: 667 of 2,000 rows move, which saves 1,333 s of 4,000 in each of eight iterations."""
    cost_B = torch.ones(4000, dtype=torch.float64)
    for reading in (15.0, 17.0):
        together = Together(4000, [1.0, 0.5])
        for one in together.shares:
            one.reading = reading
        for _ in range(2):
            together.iteration(cost_B, 0.0, 100)
            gained = together.follow(cost_B - 0.5, monkeypatch)
        assert any(map(len, gained)) == (reading < 16)


def test_waiting_for_images_does_not_make_a_rank_slow() -> None:
    together = Together(400, [1.0, 1.0])
    shares = together.shares[0]
    for _ in Handout(torch.arange(400), shares, torch.zeros(400), lambda: together.now).blocks(100):
        together.now += 5.0
        shares.waited += 4.0
    assert all(block.seconds == pytest.approx(1.0) for block in shares._blocks)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two, of which the other one has nothing to say."""
    monkeypatch.setattr(Ranks, "everyones", lambda self, value, name="counts": [value, value])
    monkeypatch.setattr(Ranks, "agreed", lambda self, value, name="decisions": value)


@pytest.mark.parametrize("residency", [Residency(), Residency("host", None, 2560), Residency("disk", None, 2560)])
@pytest.mark.parametrize("room", [float("inf"), 10 * 8 * 8 * 4.0])
def test_images_that_come_later_are_those_of_the_files(tmp_path, residency, room, alone, monkeypatch) -> None:
    """A rank gets rows from a slow one: it reads them once, as far as there is room, and every row gets its image."""
    table, expected = shuffled(tmp_path)
    ranks = Ranks(0, 2, 2, Counters())  # type: ignore[arg-type]
    residency = Residency(residency.home, None, residency.budget, "", room)
    data = Dataset.read(table, "cpu", residency, ranks=ranks)
    assert data.shares is not None and data.stream is not None
    before = int((data.shares.owner_B == 0).sum())
    paces = [[Block(10, 0.0, seconds)] * 3 for seconds in (1.0, 3.0)]
    monkeypatch.setattr(Ranks, "everyones", lambda self, value, name: paces)
    assert not data.follow_speed(torch.zeros(len(table)))
    assert "1.50, 0.50" in data.follow_speed(torch.zeros(len(table)))[0]
    own = (data.shares.owner_B == 0).nonzero().squeeze(1)
    assert len(own) > before
    if data.taken_over is not None:
        later = int(data.taken_over.has(own).sum())
        assert later == (len(own) - before if room == float("inf") else 10)
    rows = torch.from_numpy(np.random.default_rng(3).permutation(len(table)))
    for part in rows.split(7):
        assert np.array_equal(data.images_of(part, 0).numpy(), expected[part.numpy()])
    read: list[Tensor] = []
    if residency.home == "device":
        data.stream.source = lambda row_B, out: (read.append(row_B), plain(row_B, out))
        plain = data.stream.files.read
        for part in own.split(7):
            data.images_of(part, 0)
        assert (len(read) > 0) == (room < float("inf"))


def test_batches_that_are_not_all_here_are_read_ahead(tmp_path, alone) -> None:
    """A rank goes through all rows, of which it has half: what it lacks a part of is read as announced, and nothing else."""
    table, expected = shuffled(tmp_path)
    data = Dataset.read(table, "cpu", ranks=Ranks(0, 2, 2, Counters()))  # type: ignore[arg-type]
    assert data.shares is not None and data.stream is not None
    begun: list[Tensor] = []
    plain = data.stream.files.read
    data.stream.source = lambda row_B, out: (begun.append(torch.from_numpy(row_B)), plain(row_B, out))
    rows = torch.argsort(data.shares.owner_B, stable=True)
    missing = [part for part in rows.split(7) if bool((data.shares.owner_B[part] == 1).any())]
    data.announce(rows, 7)
    for part in rows.split(7):
        assert np.array_equal(data.images_of(part, 0).numpy(), expected[part.numpy()])
    assert len(begun) == len(missing) and all(map(torch.equal, begun, missing))


@pytest.mark.parametrize("room", [float("inf"), 0.0])
def test_pieces_of_others_are_read_ahead(tmp_path, room, alone) -> None:
    """As they are taken; and kept, where there is room, for the next iteration."""
    table, expected = shuffled(tmp_path)
    ranks = Ranks(0, 2, 2, Counters())  # type: ignore[arg-type]
    data = Dataset.read(table, "cpu", Residency(room=room), ranks=ranks)
    assert data.shares is not None
    Board(ranks.store, 1, data.shares.board.name)
    assert data.shares is not None and data.stream is not None and data.taken_over is not None
    begun: list[list[int]] = []
    plain = data.stream.files.read
    data.stream.source = lambda row_B, out: (begun.append(row_B.tolist()), plain(row_B, out))
    foreign: list[list[int]] = []
    for _ in range(2):
        handout = Handout(torch.arange(len(table)), data.shares, torch.zeros(len(table)))
        data.announce(handout.own(), 10)
        for block in handout.blocks(10, data.announce_next):
            assert np.array_equal(data.images_of(block, 0).numpy(), expected[block.numpy()])
            foreign += [block.tolist()] if int(data.shares.owner_B[block[0]]) == 1 else []
    assert begun == ([] if room else foreign) and len(foreign) > 2  # each piece once: it was announced as it was asked for
    if room:
        kept_n = torch.cat([part.result()[0] for part in data.taken_over._parts])
        assert len(kept_n) == len({row for block in foreign for row in block})


def test_rows_that_others_take_while_a_rank_looks_are_let_be() -> None:
    """Whoever takes the last ones adds more to the counter than there are."""
    shares = Together(40, [1.0, 1.0]).shares[0]
    handout = Handout(torch.arange(40), shares, torch.zeros(40), name="1.0")
    handout._taken_of(1, len(handout.line(1).row_n) + 5)
    assert handout._take(1, 3.0, 8) is None
