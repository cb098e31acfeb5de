"""What travels between ranks is counted by the ring formula, and told."""

from __future__ import annotations

import pytest
import torch

from verglas.cli.refine_report import ranks
from verglas.cli.refine_watch import sent_text, work_lines
from verglas.distributed.meter import Meter, record_of, share_sent
from verglas.distributed.ranks import ALONE
from verglas.distributed.ways import Ways
from verglas.distributed.work import Work
from verglas.errors import InputError
from verglas.report import Table

CPU = torch.device("cpu")


def test_bytes_follow_the_ring_formula() -> None:
    meter = Meter()
    for _ in range(2):
        with meter.standing(meter.count("all-reduce", "sums", 1000, 4), CPU):
            pass
    meter.count("all-gather", "maps", 400, 4)
    sums, maps = (meter.entries[name] for name in ("sums", "maps"))
    assert (sums.count, sums.payload, sums.bytes) == (2, 2000, 2 * 2 * 3 / 4 * 1000)
    assert maps.bytes == 300 and 0 <= sums.seconds < 1
    assert set(meter.read()) == {"sums", "maps"} and meter.read() == {}  # each reading begins anew


def test_two_ranks_send_a_tensor_once() -> None:
    assert share_sent("all-reduce", 2) == 2 * share_sent("reduce", 2) == 1 and share_sent("wait", 2) == 0


def test_waiting_is_told_apart() -> None:
    ranks = []
    for seconds in (0.5, 2.0):
        meter = Meter()
        meter.count("wait", "expectation", 0, 2).seconds = seconds
        meter.count("reduce", "sums", 8_000_000, 2).seconds = 0.25
        ranks.append(meter.read())
    record = record_of(ranks, 0)
    assert record["waiting_seconds_of_ranks"] == [0.5, 2.0] and record["seconds_of_ranks"] == [0.25, 0.25]
    assert record["by_name"]["sums"]["kind"] == "reduce" and record["by_name"]["sums"]["bytes"] == 4_000_000
    assert sent_text(record) == "2 ranks: each sent 4 MB in 0.25 s, waited up to 2 s for others"


def test_a_process_alone_sends_nothing() -> None:
    ALONE.add_up(torch.ones(3), "sums")
    ALONE.meet("anywhere")
    assert ALONE.communication() is None


def test_switches_are_read_from_the_environment() -> None:
    assert Ways.of({}) == Ways() and Ways().share_solving
    assert Ways().overlap is None and Ways.of({"VERGLAS_OVERLAP": "1"}).overlap
    assert Ways.of({"VERGLAS_OVERLAP": "0"}).overlap is False
    assert not Ways.of({"VERGLAS_SHARE_SOLVING": "0"}).share_solving
    assert Ways().ahead and not Ways.of({"VERGLAS_AHEAD": "0"}).ahead
    assert Ways().compress is None and Ways.of({"VERGLAS_COMPRESS": "1"}).compress
    with pytest.raises(InputError, match="VERGLAS_SHARE_SOLVING"):
        Ways.of({"VERGLAS_SHARE_SOLVING": "no"})


def test_what_ranks_have_worked_on_is_told() -> None:
    mine, theirs = Work(host="one", owned=50), Work(host="two", owned=50)
    mine.add(50, True, 2.0, 0.0)
    mine.add(10, False, 0.5, 0.0)
    theirs.add(40, True, 3.0, 0.0)
    tables = [{"ranks": 2, "work": [mine.read(), theirs.read()]}, {"ranks": 2, "work": [mine.read(), theirs.read()]}]
    text = "  computing 2.5 s (rank 0) to 3 s (rank 1), 10 % of the particles for others"
    assert work_lines(tables[0]["work"]) == [text]  # type: ignore[arg-type]
    assert work_lines(tables[1]["work"]) == []  # type: ignore[arg-type]
    (table,) = ranks(tables)
    assert isinstance(table, Table)
    assert [list(row) for row in table.rows] == [["0", "one", "cpu", 50, 60, 10, 2.5], ["1", "two", "cpu", 50, 40, 0, 3.0]]
