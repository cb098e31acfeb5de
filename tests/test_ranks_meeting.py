"""Processes of a run that do not all come to their meeting point, or that would use the same GPU: told soon, and clearly."""

from __future__ import annotations

import socket
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from verglas.distributed import meeting
from verglas.distributed.beat import Beat, Judge
from verglas.distributed.place import LeadMissing, Place
from verglas.errors import VerglasError


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(("rank", "kind", "said"), [(0, VerglasError, "2 of the 3 .* did not come .*: 1, 2."),
                                                    (1, LeadMissing, "Nobody answered at localhost:")])  # fmt: skip
def test_ranks_that_never_arrive_are_named(rank: int, kind: type, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING", timedelta(seconds=1))
    place = Place(rank, 3, rank, 3, ("localhost", free_port()))
    with pytest.raises(kind, match=said), meeting.joined(place, torch.device("cpu")):
        pass
    assert not torch.distributed.is_initialized()


def test_two_ranks_on_one_gpu_are_refused() -> None:
    meeting.check_apart(["one GPU-1", "one GPU-2", "two GPU-1"])
    meeting.check_apart(["one", "one"])  # processors are shared
    with pytest.raises(VerglasError, match=r"Ranks 0 and 2 .* same GPU of one"):
        meeting.check_apart(["one GPU-1", "two GPU-1", "one GPU-1"])
    with pytest.raises(VerglasError, match=r"Rank 1 .two. would compute on a CPU"):
        meeting.check_apart(["one GPU-1", "two", "one GPU-2"])


def test_a_script_may_take_its_time_between_two_runs() -> None:
    """One rank is not in a run while the other waits for it in the first collective of the next one."""
    judge = Judge(1, patience=2)
    beats = [Beat(0, "a", 1, ""), Beat(1, "b", 2, "", waits=True)]
    judge.begin(beats)
    busy, stuck = ([replace(beats[0], idle=idle), beats[1]] for idle in (True, False))
    heard = [judge.hear([replace(beat, count=second) for beat in busy], [], 1.0) for second in range(1, 100)]
    assert heard == [None] * 99
    assert judge.hear([replace(beat, count=100) for beat in stuck], [], 1.0) is not None
