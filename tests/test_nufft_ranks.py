"""Transforms that 2 and 3 processes share find what one finds: ways, types, gradients, adjoint; as much travels as is told."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forked import PATIENCE, answers_of
from verglas.distributed.ranks import Ranks
from verglas.distributed.ways import Ways
from verglas.errors import InputError
from verglas.nufft import Plan

SHAPES = [(17, 12), (24, 7, 10)]
SHARES = {2: (150, 90), 3: (150, 0, 90)}  # points of each rank
ACCURACY = 1e-5


def points(shape: tuple[int, ...]) -> torch.Tensor:
    """Far outside of the period, half of them on a plane or line."""
    point_MD = (torch.rand(240, len(shape), generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.5) * 20
    point_MD[::2, -1] = 0.2 * point_MD[::2, 0]
    return point_MD


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.complex128)


def transforms(plan: Plan, values: torch.Tensor, modes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Both types of a batch and of one vector, and the gradients of a function of both."""
    values, modes = values.clone().requires_grad_(), modes.clone().requires_grad_()
    first, second = plan.type1(values), plan.type2(modes, -1)
    ((first.abs() ** 2).sum() + (second.real ** 3).sum()).backward()
    found = {"type 1": first, "type 2": second, "gradient 1": values.grad, "gradient 2": modes.grad}
    found |= {"one": plan.type1(values[1], +1), "other": plan.type2(modes[1])}
    return {name: value.detach() for name, value in found.items()}


def plan_of(shape: tuple[int, ...], mine: slice, **options: Any) -> Plan:
    return Plan(points(shape)[mine], shape, ACCURACY, dtype=torch.complex128, implementation="reference", **options)


def shared(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "meeting"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    ranks = Ranks(rank, size, size, behind=dist.new_group(), ways=Ways(overlap=size == 3))
    first = sum(SHARES[size][:rank])
    mine = slice(first, first + SHARES[size][rank])
    answers = {}
    for shape in SHAPES:
        for way in ("values", "sums"):
            plan = plan_of(shape, mine, ranks=ranks, way=way)
            assert plan.shared is not None
            values, modes = drawn(2, 240)[:, mine], drawn(2, *shape)[:, :, plan.shared.turn.mine]
            ranks.meter.read()
            one, other = plan.type1(values), plan.type2(modes, +1)
            found = transforms(plan, values, modes)
            sent = sum(entry.bytes for entry in ranks.meter.read().values())
            told = sum(plan.shared.traffic(kind, 2 * 3 + 1) for kind in (1, 2))  # forward, with its gradient, and one vector
            product = torch.stack([(one.conj() * modes).sum(), (values.conj() * other).sum()])
            answers[shape, way] = found | {"products": product, "sent": sent, "told": told, "kernel": plan.kernel}
    torch.save(answers, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SHARES))
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    """Of all ranks, by shape and way."""
    return answers_of(shared, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", ["values", "sums"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_find_what_one_finds(answers: list[dict[Any, dict[str, Any]]], shape: tuple[int, ...], way: str) -> None:
    wanted = transforms(plan_of(shape, slice(None)), drawn(2, 240), drawn(2, *shape))
    of_ranks = [answer[shape, way] for answer in answers]
    for name, value in wanted.items():
        at_points = name in ("type 2", "gradient 1", "other")
        along = value.ndim - 1 if at_points else value.ndim - len(shape) + 1
        found = torch.cat([answer[name] for answer in of_ranks], along)
        assert float((found - value).norm()) < 1e-12 * float(value.norm()), name
    assert all(way in answer["kernel"] for answer in of_ranks)


@pytest.mark.parametrize("way", ["values", "sums"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_types_are_adjoint(answers: list[dict[Any, dict[str, Any]]], shape: tuple[int, ...], way: str) -> None:
    one, other = sum(answer[shape, way]["products"] for answer in answers)
    assert float((one - other).abs()) < 1e-12 * float(one.abs())


@pytest.mark.parametrize("way", ["values", "sums"])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_much_travels_as_is_told(answers: list[dict[Any, dict[str, Any]]], shape: tuple[int, ...], way: str) -> None:
    for answer in answers:
        assert answer[shape, way]["sent"] == pytest.approx(answer[shape, way]["told"], rel=1e-12)


def test_what_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(InputError, match="second axis"):
        Plan(points((8, 2)), (8, 2), ranks=Ranks(0, 3))
    with pytest.raises(InputError, match="finufft"):
        Plan(points((8, 8)), (8, 8), implementation="finufft", ranks=Ranks(0, 3))
