"""The scores of the classification benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.classify3d_sets import ATOMS_OF_CHAIN, adjusted_rand, classes_in, confusion, scored, without_domain


def test_scores_do_not_depend_on_the_names_of_the_classes() -> None:
    truth_B = np.array([0] * 10 + [1] * 20 + [2] * 10)
    found_B = np.array([3] * 8 + [1, 2] + [2] * 19 + [1] + [1] * 10)
    assert scored(confusion(found_B, truth_B)) == pytest.approx((29 / 30, 0.8))
    renamed_B = np.array([0, 3, 1, 2])[found_B]
    assert scored(confusion(renamed_B, truth_B)) == scored(confusion(found_B, truth_B))


def test_agreement_is_one_for_the_same_division_and_nothing_by_chance() -> None:
    draw = np.random.default_rng(0)
    a_B = draw.integers(1, 4, 3000)
    assert adjusted_rand(a_B, np.array([0, 2, 3, 1])[a_B]) == pytest.approx(1)
    assert abs(adjusted_rand(a_B, draw.integers(1, 4, 3000))) < 0.01


def test_the_domain_is_cut_from_every_chain(tmp_path: Path) -> None:
    count = 2 * ATOMS_OF_CHAIN
    np.savez(tmp_path / "whole.npz", xyz=np.arange(3 * count).reshape(count, 3), w=np.ones(count))
    with np.load(without_domain(tmp_path / "whole.npz", tmp_path)) as cut:
        assert len(cut["w"]) == 2 * (ATOMS_OF_CHAIN - 2308) and len(cut["xyz"]) == len(cut["w"])
        assert {5897 * 3, 8206 * 3} <= set(cut["xyz"][:, 0]) and 5898 * 3 not in cut["xyz"][:, 0]


def test_classes_are_told_by_image_whatever_the_order(tmp_path: Path) -> None:
    text = "data_particles\n\nloop_\n_rlnImageName\n_rlnClassNumber\n_rlnOpticsGroup\n"
    optics = "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n_rlnVoltage\n_rlnSphericalAberration\n"
    optics += "_rlnAmplitudeContrast\n1 3.0 32 300 2.7 0.1\n\n"
    (tmp_path / "data.star").write_text(optics + text + "3@a.mrcs 1 1\n1@a.mrcs 2 1\n2@a.mrcs 3 1\n")
    assert classes_in(tmp_path / "data.star").tolist() == [2, 3, 1]
