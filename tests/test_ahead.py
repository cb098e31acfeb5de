"""Batches that are begun while the last one is finished: in order, and what comes out is what one thread makes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from verglas.refinement import ahead, driver
from verglas.refinement.ahead import one_ahead
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.state import Schedule
from verglas.testing.log_probability import REFERENCE
from verglas.testing.made_up import searched, shell_of_domains, simulate_particles

CPU = torch.device("cpu")


def test_each_is_finished_while_the_next_is_begun() -> None:
    """The second half of a work waits for the first half of the next one: one thread alone would wait for ever."""
    begun = [threading.Event() for _ in range(4)]

    def works() -> Iterator[Callable[[], int]]:
        for number in range(3):
            begun[number].set()
            yield lambda number=number: number if number == 2 or begun[number + 1].wait(20) else -1  # type: ignore[misc]

    assert list(one_ahead(works(), CPU)) == [0, 1, 2]


def test_what_a_second_half_raises_ends_it_after_those_under_way() -> None:
    done = []

    def failing() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(one_ahead(iter([failing, lambda: done.append(1), lambda: done.append(2)]), CPU))  # type: ignore[list-item]
    assert done == [1]


@pytest.mark.parametrize("local", [False, True])
def test_an_expectation_comes_out_the_same(local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(1 if local else 0, 1, 8.0, 8.0, local_sigma=20.0 if local else 0.0, perturbation=0.3)
    problem = searched(simulate_particles(shell_of_domains(900, 0.0, 16.0), 16, 4.0, 5, 40.0), schedule)

    def found() -> tuple[list[Tensor], HalfExpectation]:
        half = HalfExpectation([problem.model], problem.data, problem.poses, problem.plan, problem.config, REFERENCE)
        results = list(half.run(torch.arange(5)))
        assert len(results) == 5  # this computation has memory for one particle
        return [torch.cat([rows for rows, _ in results]), *(result.rotation_B33 for _, result in results)], half

    alone, first = found()
    monkeypatch.setattr(ahead, "room_ahead", lambda *_: True)
    together, second = found()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.sums.noise_GS, second.sums.noise_GS)
    assert torch.equal(first.sums.totals_5, second.sums.totals_5)
    assert torch.equal(first.accumulators[0].total(), second.accumulators[0].total())


@pytest.mark.parametrize(("device", "on_device", "wanted"), [("cuda", True, 1), ("cuda", False, 3), ("cpu", True, 3)])
def test_the_host_of_a_gpu_computes_in_one_thread(device: str, on_device: bool, wanted: int) -> None:
    on, data = SimpleNamespace(device=torch.device(device)), SimpleNamespace(on_device=on_device)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with driver.own_threads(cast(driver.Session, SimpleNamespace(on=on, data=data))):
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
