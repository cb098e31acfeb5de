"""Arrays that travel in pieces arrive as they were, whatever device there is."""

from __future__ import annotations

import pytest
import torch

from verglas.core import transfers
from verglas.core.transfers import at_once, piece_to_device, piece_to_host, to_device, to_host

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("where", DEVICES)
def test_there_and_back(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "PIECE", 1000)
    device = torch.device(where)
    values = torch.randn(31, 17, 5)
    for one in (values, values.transpose(0, 2)):  # the latter is not in one piece
        there = to_device(one, device)
        assert there.device.type == where and torch.equal(there.cpu(), one)
        assert torch.equal(to_host(there.transpose(0, 1)), one.transpose(0, 1))
    assert torch.equal(to_device(values, device, torch.float64).cpu(), values.double())


@pytest.mark.parametrize("where", DEVICES)
def test_every_piece_is_worked_on_once_after_what_came_before(where: str) -> None:
    device = torch.device(where)
    host, there = torch.zeros(40, 100_000), torch.zeros(40, 100_000, device=device)
    for number in range(40):
        there[number] = number

    def work(number: int) -> None:
        mine = there[number] + 1
        there[number] = piece_to_device(host[number] + 100 * number, device)
        piece_to_host(mine, host[number])

    at_once(range(40), work, device)
    assert torch.equal(host[:, 0], torch.arange(40.0) + 1) and bool((host == host[:, :1]).all())
    assert torch.equal(there[:, 0].cpu(), 100 * torch.arange(40.0)) and bool((there == there[:, :1]).all())
    at_once([], work, device)


@pytest.mark.parametrize("where", DEVICES)
def test_what_goes_wrong_is_told(where: str) -> None:
    def work(number: int) -> None:
        if number == 7:
            raise ValueError("piece 7")

    with pytest.raises(ValueError, match="piece 7"):
        at_once(range(20), work, torch.device(where))
