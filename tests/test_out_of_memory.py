"""A device that runs out of memory although it was planned: batches are halved once, and nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from verglas.cli.main import main
from verglas.errors import VerglasError
from verglas.expectation.search import Searcher
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import driver
from verglas.refinement.config import RefineConfig
from verglas.refinement.driver import Session
from verglas.refinement.step import Iteration


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """60 small images, ready for their first iteration."""
    out = tmp_path_factory.mktemp("simulated") / "set"
    words = ["simulate", "--n", "60", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "1", "--device", "cpu"]
    assert main([*words, "--out", str(out)]) == 0
    config = RefineConfig(diameter=120, initial_resolution=40, absolute_greyscale=True, healpix_order=1)
    return driver.prepare(ParticleTable.read(out / "particles.star"), read_map(out / "start.mrc"), config)


def failing(original: Callable[..., Any], calls: set[int]) -> Callable[..., Any]:
    """`original`, out of memory in these calls (counted from 1)."""
    count = 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("no memory left")
        return original(*arguments)

    return wrapped


def first(session: Session) -> Iteration:
    return next(driver.iterations(session))


@pytest.mark.parametrize("where", ["coarse", "fine"])
def test_batches_are_halved_and_nothing_is_counted_twice(session: Session, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = first(session)
    monkeypatch.setattr(Searcher, where, failing(getattr(Searcher, where), {1}))
    disturbed = first(session)
    assert sum("ran out of memory" in note for note in disturbed.notes) == 1
    for a, b in zip(undisturbed.state.halves, disturbed.state.halves, strict=True):
        torch.testing.assert_close(a.sigma2_noise_GS, b.sigma2_noise_GS, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.direction_prior_D, b.direction_prior_D, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(a.map_ZYX, b.map_ZYX, rtol=1e-3, atol=1e-4 * float(a.map_ZYX.abs().max()))
    torch.testing.assert_close(undisturbed.state.poses.origin_B2, disturbed.state.poses.origin_B2)


def test_twice_is_an_error_that_names_the_way_on(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Searcher, "fine", failing(Searcher.fine, {1, 2}))
    with pytest.raises(VerglasError, match="--memory"):
        first(session)
