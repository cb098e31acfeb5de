"""CPU processes that help beside GPUs: what they find is what would be found without them, and a slow or dead one costs nothing.

Here the rank that they help computes on a CPU, too: it does not know of it what a helper does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest
import torch
from tests.generous import LENT, make_generous
from tests.test_ranks import check_same, command, simulated, together

from verglas.cli.main import main
from verglas.distributed import lending
from verglas.distributed.lending import Found, Lending
from verglas.distributed.wire import Packed, Wire
from verglas.refinement.helpers import Helper, Task, helpers_of_host, threads_beside, without

__all__ = ["simulated"]


@dataclass
class Thing:
    name: str
    tensors: list[torch.Tensor] = field(default_factory=list)


def test_values_arrive_as_they_were() -> None:
    ends = [Wire(end) for end in socket.socketpair()]
    big = torch.arange(3_000_000, dtype=torch.float64).view(3, -1)
    thing = Thing("one", [big, big[:, ::7], torch.zeros(0, 3), torch.ones(2, dtype=torch.bool), torch.ones(1).expand(4)])
    packed = Packed.of(thing)
    assert packed.nbytes > big.nbytes and packed.parts[0].nbytes < big.nbytes  # arrays go beside what is pickled
    sender = Thread(target=ends[0].send, args=(packed,))
    sender.start()
    found = ends[1].receive()
    sender.join()
    assert found.name == "one" and all(torch.equal(a, b) for a, b in zip(found.tensors, thing.tensors, strict=True))
    found.tensors[0][0, 0] = 7  # its own memory, which may be changed
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()


def test_a_helper_gets_what_it_is_back_with_in_time() -> None:
    lend = Lending()
    assert lend.wants_trial(1000) and lend.rows(1000, 500) == 0  # nothing is known of it
    lend.heard(Found(1.0, 0.1, 1.0), lent=False)
    lend.passed(1000, 60.0)
    assert lend.rows(1000, 500) == 0  # the first expectation compiled
    lend.passed(1000, 20.0)
    count = lend.rows(1000, 500)
    assert count == int((lending.MARGIN * 20 - 2) / 0.1) and f"{count} of 1000" in lend.told
    assert lend.rows(1000, 50) == 50
    lend.late()
    assert lend.rows(1000, 500) == int((lending.MARGIN * 20 / 2 - 2) / 0.1)  # half as long
    lend.late()
    tried = [lend.wants_trial(1000) or lend.rows(1000, 500) > 0 for _ in range(lending.RESTS)]
    assert tried == [False] * (lending.RESTS - 1) + [True]


@pytest.mark.parametrize("found", [Found(1.0, 8.0, 1.0), Found(20.0, 0.001, 1.0)])
def test_a_slow_helper_rests_and_is_tried_again(found: Found) -> None:
    lend = Lending()
    assert lend.wants_trial(1000)
    lend.heard(found, lent=False)
    for _ in range(2):
        lend.passed(1000, 20.0)
    tried = []
    for _ in range(lending.RESTS):
        tried.append(lend.wants_trial(1000))
        assert lend.rows(1000, 500) == 0 and "rests" in lend.told
    assert tried == [False] * (lending.RESTS - 1) + [True]
    tried = [lend.wants_trial(1000) for _ in range(2 * lending.RESTS)]
    assert tried == [False] * (2 * lending.RESTS - 1) + [True]  # after twice as many
    for _ in range(2):
        lend.passed(1000, 2000.0)  # it has more time
    assert lend.rows(1000, 500) > 100


def test_a_short_expectation_has_no_trial() -> None:
    """It would take cores from who starts the GPU's kernels, for nothing."""
    lend = Lending()
    lend.passed(1000, 0.9 * lending.SHORTEST)
    assert not any(lend.wants_trial(1000) for _ in range(3 * lending.RESTS))
    lend.passed(1000, 1.1 * lending.SHORTEST)
    assert lend.wants_trial(1000)


def test_lending_that_takes_longer_than_it_saves_is_left() -> None:
    lend = Lending(cost=0.1)
    lend.heard(Found(0.0, 0.1, 0.0), lent=True)
    for _ in range(2):
        lend.passed(1000, 2.0)
    assert lend.rows(1000, 500) == 0  # 14 particles save 28 ms
    lend.heard(Found(0.0, 0.001, 0.0), lent=True)
    assert lend.rows(1000, 500) == 500


def test_rows_are_left_out_in_their_order() -> None:
    rows = torch.tensor([5, 2, 9, 0])
    assert without(rows, torch.tensor([9, 5]), 10).tolist() == [2, 0]


def test_helpers_take_the_cores_that_gpus_leave() -> None:
    assert threads_beside(16, 2, 1) == 12 and threads_beside(16, 2, 3) == 4 and threads_beside(2, 4, 1) == 1
    assert helpers_of_host("auto", True, 16, 1) == 1 and helpers_of_host("auto", True, 4, 1) == 0
    assert helpers_of_host("auto", False, 16, 1) == 0 and helpers_of_host("3", False, 1, 1) == 3


def helped_of(out: Path) -> list[dict[str, object]]:
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event["helpers"] for event in events if event["event"] == "iteration" and "helpers" in event]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("classify3d", "abinitio")]


@pytest.mark.parametrize("name", ["refine", "classify2d", *SLOW])
def test_with_a_helper_the_result_is_the_same(
    name: str, simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(name, simulated, tmp_path / "one")) == 0
    make_generous(monkeypatch)
    assert main([*command(name, simulated, tmp_path / "two"), "--cpu-ranks", "1"]) == 0
    check_same(tmp_path)
    found = helped_of(tmp_path / "two")
    assert found and all(one["particles"] in (LENT, 2 * LENT) for one in found)


def test_ranks_may_have_helpers(simulated: Path, tmp_path: Path) -> None:
    """Two ranks of one host, a helper beside each."""
    assert main(command("refine", simulated, tmp_path / "one")) == 0
    words = [*command("refine", simulated, tmp_path / "two"), "--cpu-ranks", "2"]
    done = together(words, start=["-m", "tests.generous"])
    assert done.returncode == 0, done.stderr[-6000:]
    check_same(tmp_path)
    found = helped_of(tmp_path / "two")
    # Each rank's helper has some of the half-set that is its rank's, unless that rank lags and the other one has taken them.
    assert len(found) == 3 and all(one["particles"] in (15, 30) for one in found), found


def killed(self: Helper, task: Task) -> None:
    give(self, task)
    os.kill(self.process.pid, signal.SIGKILL)


def never(self: Helper, seconds: float = 0.0) -> None:
    """No answer comes in time."""


give = Helper.give


@pytest.mark.parametrize(("name", "to", "said"), [("give", killed, "process has ended"), ("answer", never, "not back in time")])
def test_a_helper_that_dies_or_is_late_changes_nothing(
    name: str, to: object, said: str, simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*command("refine", simulated, tmp_path / "one"), "--max-iterations", "1"]) == 0
    make_generous(monkeypatch)
    monkeypatch.setattr(Helper, name, to)
    assert main([*command("refine", simulated, tmp_path / "two"), "--max-iterations", "1", "--cpu-ranks", "1"]) == 0
    check_same(tmp_path)
    found = helped_of(tmp_path / "two")
    assert found and found[0]["particles"] == 0 and said in str(found[0]["said"])


def test_a_number_of_helpers_is_asked_for(simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command("refine", simulated, tmp_path / "out"), "--cpu-ranks", "many"]) == 2
    assert "--cpu-ranks" in capsys.readouterr().err and not (tmp_path / "out").exists()
