"""shells.cu on the CPU, thread by thread (block_on_cpu.h), or on a GPU: against passes of the CPU and torch."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.axes_on_cpu import on_cpu

from verglas.core.rows import packed_sphere
from verglas.distributed.ranks import Ranks
from verglas.maximization import apart, halves, shells, solve, solvers
from verglas.maximization.halves import fsc_of_sums
from verglas.maximization.slabs import Slabs
from verglas.maximization.solve import SolvedSums
from verglas.maximization.waiting import Waiting

CASES = {"14": (14, 7, 2.0), "40": (40, 20, 2.0), "15": (15, 6, 1.6), "70": (70, 33, 1.0)}  # box, radius, padding


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the kernels run: on the CPU shells.cu stands in for a GPU's."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shells, "kernel", functools.partial(on_cpu, shells, tmp_path_factory.mktemp("shells")))
        patch.setattr(shells, "BLOCKS", 7)
        yield "cpu"


def made_up(case: str, device: str, together: bool, seed: int) -> SolvedSums:
    box, radius, padding = CASES[case]
    rows, generator = packed_sphere(float(int(radius * padding + 0.5)), device), torch.Generator().manual_seed(seed)
    sums_V4 = torch.randn(rows.count, 4, generator=generator)
    sums_V4[:, 2] = sums_V4[:, 2].abs() * 3
    sums_V4[::5, 2] = 0
    sums_V4 = sums_V4.to(device)
    weight_V = sums_V4[:, 2] if together else sums_V4[:, 2].contiguous()
    return SolvedSums(sums_V4[:, :2], weight_V, rows, box, radius, padding)


def in_double(sums: SolvedSums) -> SolvedSums:
    return replace(sums, data_V2=sums.data_V2.double(), weight_V=sums.weight_V.double())


@pytest.mark.parametrize("case", CASES)
def test_shell_sums(case: str, device: str) -> None:
    sums = made_up(case, device, case != "15", 1)
    if case == "40":
        sums = replace(sums, rows=replace(sums.rows, start_ZY=sums.rows.start_ZY.long()))
    count = sums.radius + 1
    prior_S = torch.linspace(0.5, 4, count, dtype=torch.float64, device=device)
    for rounding, prior in ((0.0, None), (0.5, None), (0.5, prior_S)):
        found = shells.shell_sums_cuda(sums.weight_V, sums.rows, sums.padding, count, rounding, prior)
        wanted = in_double(sums).shell_sums(rounding, prior)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    gains = shells.shell_sums_cuda(sums.weight_V, sums.rows, sums.padding, count, 0.5, prior_S, gains=True)
    wanted_2 = in_double(sums).gains(prior_S)
    torch.testing.assert_close(gains[0], wanted_2[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(gains[1], wanted_2[1])


@pytest.mark.parametrize("case", CASES)
def test_correlation_of_halves(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made_up(case, device, True, 1), made_up(case, device, case != "15", 2)
    second.data_V2.add_(first.data_V2)
    wanted_S = fsc_of_sums([in_double(first), in_double(second)])
    monkeypatch.setattr(halves, "serves", lambda *sums: True)
    found_S = fsc_of_sums([first, second])
    assert float(wanted_S[1:].abs().max()) > 0.3
    torch.testing.assert_close(found_S, wanted_S, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_correlation_where_one_half_waits_on_the_host(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made_up(case, device, True, 1), made_up(case, device, False, 2)
    monkeypatch.setattr(halves, "serves", lambda *sums: True)
    wanted = halves._fsc_sums(first, second)
    pieces = list[int]()
    kernel = halves.fsc_sums_cuda
    monkeypatch.setattr(halves, "fsc_sums_cuda", lambda *given, second_from: (
        pieces.append(second_from), kernel(*given, second_from=second_from))[1])  # fmt: skip
    monkeypatch.setattr(halves, "PIECE", 400)
    found = halves._fsc_sums(first, Waiting.of(second))
    assert len(pieces) > 3 and max(pieces) > 0
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_correlation_of_averages(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half's averages of its own, which then are correlated, as both halves in one place."""
    first, second = made_up(case, device, True, 1), made_up(case, device, case != "15", 2)
    second.data_V2.add_(first.data_V2)
    first.weight_V[: len(first.weight_V) // 3] = 0
    wanted_S = fsc_of_sums([in_double(first), in_double(second)])
    plain_S = solvers.fsc_of_averages(first, solvers.averages(in_double(first)), solvers.averages(in_double(second)))
    monkeypatch.setattr(solvers, "serves", lambda *sums: True)
    found_S = solvers.fsc_of_averages(first, solvers.averages(first), solvers.averages(second))
    torch.testing.assert_close(plain_S, wanted_S, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_S, wanted_S, rtol=0, atol=2e-6)


def test_planes_of_one_rank(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks find of their planes adds up to what one finds of all."""
    whole, other = made_up("40", device, True, 3), made_up("40", device, True, 4)
    wanted, wanted_3S = shells.shell_sums_cuda(whole.weight_V, whole.rows, 2.0, 21, 0.5), None
    monkeypatch.setattr(halves, "serves", lambda *sums: True)
    wanted_3S = torch.stack(halves._fsc_sums(whole, other))
    totals, sums_3S = torch.zeros(3, 21, dtype=torch.float64, device=device), torch.zeros_like(wanted_3S)
    for rank in range(3):
        slabs = Slabs.of(whole.rows, 2.0, 40, Ranks(rank, 3, 3))
        assert slabs is not None
        parts = [replace(one, data_V2=slabs.cut(one.data_V2), weight_V=slabs.cut(one.weight_V), rows=slabs.rows, slabs=slabs)
                 for one in (whole, other)]  # fmt: skip
        totals += torch.stack(shells.shell_sums_cuda(parts[0].weight_V, slabs.rows, 2.0, 21, 0.5))
        sums_3S += torch.stack(halves._fsc_sums(parts[0], parts[1]))
    torch.testing.assert_close(totals, torch.stack(wanted), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums_3S, wanted_3S, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_quotients_and_priors_in_place(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a transform reads sums: against the same in torch."""
    sums = made_up(case, device, False, 5)
    sums = replace(sums, data_V2=sums.data_V2.contiguous(), rows=replace(sums.rows, start_ZY=sums.rows.start_ZY.long()))
    count = sums.radius + 1
    curves_S = tuple(torch.linspace(low, 4, count, dtype=torch.float64, device=device) for low in (0.5, 0.1, 1))
    if case == "15":
        curves_S = (0 * curves_S[0], 0 * curves_S[1], curves_S[2])  # where nothing was seen nothing is divided
    wanted = replace(sums, data_V2=sums.data_V2.clone(), weight_V=sums.weight_V.clone())
    monkeypatch.setattr(apart, "serves", lambda *some: False)
    apart.divide(wanted, curves_S)
    apart.add_prior(wanted, curves_S[0])
    monkeypatch.setattr(apart, "serves", lambda *some: True)
    apart.divide(sums, curves_S)
    apart.add_prior(sums, curves_S[0])
    assert bool((wanted.data_V2 == 0).any()) == (case == "15") and bool((wanted.weight_V == 0).any())
    torch.testing.assert_close(sums.data_V2, wanted.data_V2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.weight_V, wanted.weight_V, rtol=1e-6, atol=1e-6)


def test_what_is_served() -> None:
    assert not solve.serves(torch.zeros(1)) and not halves.serves(torch.zeros(1, dtype=torch.float64))
