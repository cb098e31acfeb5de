"""Particles judged by a map that is made of the good classes: junk is left over, particles that were not in the map are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.particles.table import ParticleTable
from verglas.refinement import classify2d, model_fit
from verglas.refinement.class_quality import ClassQuality, central, chosen_particles, particle_merits
from verglas.refinement.config import Classify2dConfig
from verglas.refinement.driver import Session, quiet

CONFIG = Classify2dConfig(diameter=150, classes=2, max_iterations=1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, np.ndarray]:
    """A session of particles and junk, and which are particles."""
    out = tmp_path_factory.mktemp("set") / "set"
    words = ["simulate", "--n", "300", "--box", "32", "--pixel", "6", "--snr", "0.5", "--junk", "0.3", "--seed", "3"]
    assert main([*words, "--device", "cpu", "--model", "demo", "--out", str(out)]) == 0
    true_B = ParticleTable.read(out / "truth.star").frame["rlnClassNumber"].to_numpy(int) == 1
    return classify2d.prepare(ParticleTable.read(out / "particles.star"), CONFIG), true_B


def test_a_map_of_some_particles_tells_all_from_junk(
    mixed: tuple[Session, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, true_B = mixed
    original = model_fit.model_config
    monkeypatch.setattr(model_fit, "model_config", lambda config: replace(original(config), steps=40, full_iterations=1))
    good, junk = np.flatnonzero(true_B), np.flatnonzero(~true_B)
    rows = torch.from_numpy(np.sort(np.concatenate([good[:150], junk[:15]])))
    fit_B2 = model_fit.model_fits(rows, session.data, CONFIG, session.on, quiet)
    assert fit_B2 is not None and fit_B2.shape == (300, 2)
    poses = replace(session.state.poses, class_B=torch.zeros(300, dtype=torch.int64))
    state = replace(session.state, poses=poses, model_fit_B2=fit_B2)
    merit_B = particle_merits(state, torch.isin(torch.arange(300), rows)).numpy()
    unseen = np.concatenate([good[150:], junk[15:]])
    better = merit_B[good[150:], None] > merit_B[junk[15:]]
    assert len(unseen) > 100 and better.mean() > 0.8


def test_too_few_particles_make_no_map(mixed: tuple[Session, np.ndarray]) -> None:
    session, _ = mixed
    assert model_fit.model_fits(torch.arange(model_fit.FEWEST - 1), session.data, CONFIG, session.on, quiet) is None


def test_particles_that_the_map_does_not_hold_are_left_out(mixed: tuple[Session, np.ndarray]) -> None:
    state = mixed[0].state
    count = len(state.poses.class_B)
    origin_B2 = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    class_B = torch.arange(count) % 3
    fit_B2 = torch.tensor([[40.0, 0.8]]).double() * (1 + 0.1 * torch.rand(count, 2, dtype=torch.float64))
    fit_B2[:30, 0] = 0.1  # as likely noise; much left over
    fit_B2[30:60, 1] = 3
    poses = replace(state.poses, class_B=class_B, origin_B2=origin_B2)
    state = replace(state, poses=poses, model_fit_B2=fit_B2, halves=[state.halves[0]] * 3)
    qualities = [ClassQuality(1 / 3, count // 3, 20.0, 9.0, 5.0, 9.0, score) for score in (1.0, 0.6, 0.4)]
    assert set(class_B[central(qualities, state)].tolist()) == {0}
    kept = chosen_particles("auto", qualities, state)
    assert set(class_B[kept].tolist()) == {0, 1} and int(kept.min()) >= 60
    assert len(kept) > 0.95 * (class_B[60:] < 2).sum()
    assert len(chosen_particles("1-3", qualities, state)) == count
    without = chosen_particles("auto", qualities, replace(state, model_fit_B2=None))
    assert set(class_B[without].tolist()) == {0} and int(without.min()) < 30
