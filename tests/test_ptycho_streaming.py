"""Patterns that stay in host memory: block by block in any order, the same result, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptycho_world import made_up, scan_of
from verglas.errors import InputError
from verglas.kernels import farfield
from verglas.ptychography import memory
from verglas.ptychography.collect import bytes_of
from verglas.ptychography.memory import Needs, kept
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.problem import Problem
from verglas.ptychography.reconstruct import PassDone, reconstruct
from verglas.ptychography.scan import Scan
from verglas.ptychography.streaming import Blocks

SCAN = scan_of(made_up(window=16, side=6, step=4.0))
LITTLE = 1e-6  # GB


def last(scan: Scan, **options: Any) -> PassDone:
    *_, done = reconstruct(scan, PtychoOptions(**options))
    return done


@pytest.mark.parametrize("kind", [torch.float32, torch.int16])
def test_blocks_come_in_any_order(kind: torch.dtype) -> None:
    patterns_BYX = torch.arange(10 * 6).view(10, 2, 3).to(kind)
    blocks = Blocks(patterns_BYX, torch.device("cpu"))
    for rows_B in (torch.arange(10), torch.tensor([7, 2, 3, 4, 9]), torch.tensor([5])):
        seen = [(piece_B, blocks.patterns(piece_B)) for piece_B in blocks.walk(rows_B, 3)]
        assert torch.equal(torch.cat([piece_B for piece_B, _ in seen]), rows_B)
        assert torch.equal(torch.cat([some_BYX for _, some_BYX in seen]), patterns_BYX[rows_B])
    other_B = torch.tensor([8, 1])
    assert torch.equal(blocks.patterns(other_B), patterns_BYX[other_B])  # which no walk has handed out


@pytest.mark.parametrize("options", [
    {"engine": "rpie"}, {"engine": "lsq", "positions_from": 2}, {"engine": "raar"}, {"engine": "cg", "passes": 12},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [torch.float32, torch.uint16])
def test_streamed_patterns_give_the_same_result(options: dict[str, Any], kind: torch.dtype) -> None:
    scan = Scan(SCAN.patterns_BYX.round().to(kind), SCAN.positions_B2, SCAN.geometry, probe_MYX=SCAN.probe_MYX)
    chosen = {"passes": 4, "double": True, **options}
    whole, streamed = last(scan, **chosen), last(scan, **chosen, pattern_memory=LITTLE)
    assert "block by block" in streamed.plan[0] and "--pattern-memory" in streamed.plan[0] and "stay in" in whole.plan[0]
    # Only the line search differs: several lengths at once instead of Newton's.
    tolerance = 1e-3 if options["engine"] == "cg" else 1e-12
    assert streamed.found.error_P == pytest.approx(whole.found.error_P, rel=tolerance)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("engine", ["cg", "lsq"])
def test_nobody_waits_for_a_pattern(engine: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sums take patterns as `walk` hands them out, also those of the far field's kernels."""
    of_walks = Blocks.patterns

    def patterns(self: Blocks, rows_B: torch.Tensor) -> torch.Tensor:
        assert self._now is not None and self._now[0] is rows_B
        return of_walks(self, rows_B)

    monkeypatch.setattr(Blocks, "patterns", patterns)
    monkeypatch.setattr(farfield, "why_not", lambda device, dtype, window: None if kernels else "not asked for")
    streamed = last(SCAN, engine=engine, passes=3, warm_up=1, pattern_memory=LITTLE)
    assert streamed.error == pytest.approx(last(SCAN, engine=engine, passes=3, warm_up=1).error, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"engine": "rpie"}, {"engine": "lsq", "batch_size": 5}, {"engine": "cg"}], ids=str)
def test_patterns_are_streamed_to_a_gpu(options: dict[str, Any]) -> None:
    chosen = [PtychoOptions(passes=6, double=True, pattern_memory=limit, **options) for limit in (0.0, LITTLE)]
    (*_, whole), (*_, streamed) = (reconstruct(SCAN, one, "cuda") for one in chosen)
    assert "block by block" in streamed.plan[0]
    assert streamed.found.error_P == pytest.approx(whole.found.error_P, rel=1e-3)


def test_what_is_planned_is_what_is_there() -> None:
    for engine in ("cg", "rpie", "raar"):
        options = PtychoOptions(engine=engine, passes=3, warm_up=0)  # type: ignore[arg-type]
        problem = Problem(SCAN, options)
        done = last(SCAN, engine=engine, passes=3, warm_up=0)
        assert problem.needs.patterns == bytes_of(problem.counts.stored_BYX)
        kept_bytes = bytes_of(done.found.object_OLYX, done.memory)
        assert kept_bytes <= problem.needs.object + problem.needs.exits
        assert problem.needs.exits == bytes_of(done.memory.get("exit", {}))


def test_where_things_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_device_memory", lambda device: 80e9)
    gpu = torch.device("cuda")
    assert kept(Needs(10**10, 10**9, 0, 4 * 10**10), gpu).line
    small = kept(Needs(10**10, 10**9, 0, 8 * 10**10), gpu)
    assert small.patterns and not small.line
    large = kept(Needs(8 * 10**10, 10**9, 0, 0), gpu)
    assert not large.patterns and "do not fit" in large.text and "80 GB" in large.text
    with pytest.raises(InputError, match="--gpus"):
        kept(Needs(10**9, 10**9, 9 * 10**10, 0), gpu)
