"""2-D classification: views told apart whatever the seed, classes divided, averages judged and selected."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2, half_plane_pixels
from verglas.core.rotations import matrix_from_euler
from verglas.errors import InputError
from verglas.io.mrc import Stack, StackWriter
from verglas.io.star import StarBlock, write_star
from verglas.maximization.planes import moved_planes
from verglas.maximization.running import NOTHING, stepped_planes
from verglas.optics.ctf import CtfParameters, ctf_reference_BK
from verglas.optics.group import OpticsGroup
from verglas.particles.table import ParticleTable
from verglas.projection.volume import FourierVolume
from verglas.refinement import classify2d
from verglas.refinement import classify2d_schedule as schedule
from verglas.refinement.class_fit import class_fits, halves_of
from verglas.refinement.class_quality import (
    ClassQuality,
    check_rule,
    chosen_classes,
    chosen_particles,
    class_qualities,
    distances,
    scores,
)
from verglas.refinement.config import Classify2dConfig
from verglas.refinement.state import State
from verglas.simulation.maps import truth_map
from verglas.testing.made_up import shell_of_domains

BOX, PIXEL, VIEWS, EACH, SNR = 32, 5.0, 6, 100, 0.3
DIRECTIONS_2V = torch.tensor([[0.0, 0.0, 90.0, 45.0, 0.0, 90.0], [0.0, 90.0, 90.0, 55.0, 45.0, 45.0]]).double()  # rot, tilt
CONFIG = Classify2dConfig(diameter=130, classes=VIEWS, max_iterations=25, psi_step=24, gradient=False, select="score>=0.7")
GRADIENT = replace(CONFIG, gradient=True, batch=25)


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> tuple[ParticleTable, np.ndarray]:
    """Particles of six views of one molecule, in any in-plane angle, off centre, with CTF and noise; and which view each is."""
    folder, draw, n = tmp_path_factory.mktemp("views"), torch.Generator().manual_seed(0), VIEWS * EACH
    map_ZYX = truth_map(shell_of_domains(1500, 5.0, 45.0), BOX, PIXEL, 60.0).double()
    view_B = torch.arange(n) % VIEWS
    psi_B, defocus_B = (torch.rand(n, generator=draw, dtype=torch.float64) for _ in range(2))
    psi_B, defocus_B, zero_B = 360 * psi_B, 10000 + 15000 * defocus_B, torch.zeros(n, dtype=torch.float64)
    to_view_V33 = matrix_from_euler(*DIRECTIONS_2V, torch.zeros(VIEWS, dtype=torch.float64))
    rotation_B33 = matrix_from_euler(zero_B, zero_B, psi_B) @ to_view_V33[view_B]
    pixels, group = half_plane_pixels(BOX), OpticsGroup("one", 1, 300.0, 2.7, 0.1, PIXEL, BOX)
    slices_B2K = FourierVolume.from_map(map_ZYX, dtype=torch.float64).slices(rotation_B33, pixels)
    ctf = CtfParameters(defocus_B, defocus_B, zero_B, zero_B, zero_B, zero_B + 1, has_envelope=False)
    shift_B2 = 4 * torch.rand(n, 2, generator=draw, dtype=torch.float64) - 2  # px
    phase_BK = 2 * math.pi / BOX * (shift_B2[:, :1] * pixels.x_K + shift_B2[:, 1:] * pixels.y_K)
    contrast_BK = ctf_reference_BK(pixels.frequency_K2(PIXEL), ctf, group)
    signal_BK = torch.polar(contrast_BK, phase_BK) * torch.complex(slices_B2K[:, 0], slices_B2K[:, 1])
    image_BYX = centred_irfft2(pixels.scatter(signal_BK), BOX)
    image_BYX *= math.sqrt(SNR) / image_BYX.std()
    image_BYX += torch.randn(n, BOX, BOX, generator=draw, dtype=torch.float64)
    return _written(folder, image_BYX, defocus_B), view_B.numpy()


def _written(folder: Path, image_BYX: Tensor, defocus_B: Tensor) -> ParticleTable:
    with StackWriter(folder / "p.mrcs", len(image_BYX), (BOX, BOX), PIXEL) as stack:
        stack.append(image_BYX.float().numpy())
    particles = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@p.mrcs" for i in range(len(image_BYX))], "rlnDefocusU": defocus_B.numpy(),
        "rlnDefocusV": defocus_B.numpy(), "rlnDefocusAngle": 0.0, "rlnOpticsGroup": 1,
    })  # fmt: skip
    optics = pd.DataFrame({
        "rlnOpticsGroupName": ["one"], "rlnOpticsGroup": [1], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [PIXEL], "rlnImageSize": [BOX], "rlnImageDimensionality": [2],
    })  # fmt: skip
    blocks = {"optics": StarBlock.table("optics", optics), "particles": StarBlock.table("particles", particles)}
    write_star(folder / "p.star", blocks)
    return ParticleTable.read(folder / "p.star")


def classified(table: ParticleTable, config: Classify2dConfig) -> list[State]:
    session = classify2d.prepare(table, config)
    return [done.state for done in classify2d.iterations(session)]


def adjusted_rand(a_B: np.ndarray, b_B: np.ndarray) -> float:
    """Agreement of two partitions: 1 the same, 0 what chance gives."""
    table = np.zeros((a_B.max() + 1, b_B.max() + 1))
    np.add.at(table, (a_B, b_B), 1)
    same, rows, columns = (float((x * (x - 1) / 2).sum()) for x in (table, table.sum(1), table.sum(0)))
    chance = rows * columns / (len(a_B) * (len(a_B) - 1) / 2)
    return (same - chance) / ((rows + columns) / 2 - chance)


def test_views_are_told_apart_whatever_the_seed(views: tuple[ParticleTable, np.ndarray]) -> None:
    table, view_B = views
    found = [classified(table, replace(CONFIG, seed=seed))[-1].poses.class_B.numpy() for seed in (0, 1, 2)]
    assert min(adjusted_rand(one_B, view_B) for one_B in found) > 0.9
    assert min(adjusted_rand(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.9


def test_classes_grow_in_number_and_shares_sum_to_one(views: tuple[ParticleTable, np.ndarray]) -> None:
    states = classified(views[0], replace(CONFIG, classes=7, max_iterations=6))
    assert schedule.first_count(replace(CONFIG, classes=7, max_iterations=6)) == 3
    assert [len(state.halves) for state in states] == [3, 4, 6, 7, 7, 7]
    for state in states:
        assert sum(float(model.direction_prior_D.sum()) for model in state.halves) == pytest.approx(1)
        assert int(state.poses.class_B.max()) < len(state.halves)


def test_a_class_that_shows_what_another_shows_is_given_up(views: tuple[ParticleTable, np.ndarray]) -> None:
    state = classified(views[0], CONFIG)[-1]
    like_CC = classify2d.likeness(state, CONFIG)
    assert float(like_CC.max()) < classify2d.ALIKE
    turned = state.halves[0].map_ZYX.rot90(1, (0, 1)).roll(1, 0)  # about the centre pixel
    doubled = replace(state, iteration=3, halves=[*state.halves, replace(state.halves[0], map_ZYX=turned)])
    doubled.halves[-1].direction_prior_D = 0.9 * doubled.halves[0].direction_prior_D
    share_C = torch.stack([model.direction_prior_D.sum() for model in doubled.halves])
    assert classify2d.twin_classes(doubled, CONFIG, share_C) == [VIEWS]
    grown, notes = classify2d.grown(doubled, replace(CONFIG, classes=VIEWS + 1))
    assert len(grown.halves) == VIEWS + 1 and "1 classes showed what others show" in notes[0]
    largest = int(share_C.argmax())
    for k in (largest, VIEWS):  # both are the largest class, plus and minus noise
        both = torch.stack([grown.halves[k].map_ZYX.flatten(), state.halves[largest].map_ZYX.flatten()])
        assert 0.8 < float(torch.corrcoef(both)[0, 1]) < 1


def test_a_class_without_particles_keeps_its_average(views: tuple[ParticleTable, np.ndarray]) -> None:
    session = classify2d.prepare(views[0], replace(CONFIG, classes=2, max_iterations=2))
    state = session.state
    far = moved_planes(-50 * state.halves[0].map_ZYX[None], torch.tensor([[5.0, 0.0]]))[0]  # like no particle
    state = replace(state, iteration=24, halves=[state.halves[0], replace(state.halves[0], map_ZYX=far)])
    done = classify2d.iterate(state, session.data, replace(CONFIG, classes=2), session.on, lambda *_: None)
    assert "Class 2 has no particles any more" in " ".join(done.notes)
    assert torch.equal(done.state.halves[1].map_ZYX, far) and not done.state.poses.class_B.any()


def test_fits_tell_particles_from_noise(views: tuple[ParticleTable, np.ndarray], tmp_path: Path) -> None:
    table, _ = views
    stack, draw = Stack.open(table.folder / "p.mrcs"), np.random.default_rng(5)
    image_BYX = torch.tensor(stack.read(slice(0, len(table)))).double()
    noise_B = np.arange(len(table)) % 3 == 0
    image_BYX[noise_B] = torch.from_numpy(draw.normal(size=(noise_B.sum(), BOX, BOX)))
    mixed = _written(tmp_path, image_BYX, torch.tensor(table.frame["rlnDefocusU"].to_numpy(float)))
    *_, before, state = classified(mixed, replace(CONFIG, classes=8, max_iterations=12))
    assert before.fit_B2 is None and state.fit_B2 is not None
    fit_2 = (state.fit_B2[~noise_B].mean(0) - state.fit_B2[noise_B].mean(0)).tolist()
    assert fit_2[0] > 3 and fit_2[1] > 1.5
    qualities = class_qualities(state, CONFIG.diameter)
    assert sum(one.particles for one in qualities) == len(table)
    kept = chosen_particles("auto", qualities, state).numpy()
    assert noise_B[kept].mean() < 0.05 and (~noise_B[kept]).sum() > 0.85 * (~noise_B).sum()
    assert not any(one.score for one in class_qualities(before, CONFIG.diameter))


def test_a_fit_is_that_of_the_average_of_the_other_half(views: tuple[ParticleTable, np.ndarray]) -> None:
    class_B = torch.arange(21) % 4
    half_B = halves_of(class_B, 3)
    for k in range(4):
        assert abs(int((2 * half_B[class_B == k] - 1).sum())) <= 1
    assert not torch.equal(half_B, halves_of(class_B, 4))
    session = classify2d.prepare(views[0], replace(CONFIG, classes=1, max_iterations=1))
    # Pure chance: images compared at the poses of others, so that averages hold nothing but noise.
    state = replace(session.state, current_size=BOX)
    noise = replace(session.data, images=[torch.randn_like(session.data.images[0].float())])
    fit_B2 = class_fits(state, noise, classify2d.plan_of(state, CONFIG), CONFIG, session.on)
    assert (fit_B2.mean(0).abs() < 4 / math.sqrt(len(fit_B2))).all()
    assert (fit_B2.std(0) > 0.5).all() and (fit_B2.std(0) < 1.3).all()  # below 1, as the mask takes part of the noise


def test_scores_are_relative_to_the_better_classes_and_leave_out_what_is_no_particle() -> None:
    class_B = torch.arange(6).repeat_interleave(20)
    fit_C2 = torch.tensor([[10.0, 5.0], [9.0, 4.0], [5.0, 4.5], [30.0, 5.0], [10.0, 5.0], [0.0, 0.0]])
    contrast_C = torch.tensor([20.0, 9.0, 6.0, 50.0, 3.0, 9.0])
    assert scores(fit_C2, contrast_C, class_B).tolist() == pytest.approx([1, 0.8, 0.5, 0, 0, 0])
    assert not scores(0 * fit_C2, contrast_C, class_B).any()


def test_particles_far_from_the_centre_of_their_class_are_left_out(views: tuple[ParticleTable, np.ndarray]) -> None:
    state = classified(views[0], replace(CONFIG, max_iterations=1))[-1]
    n, draw = len(state.poses.class_B), torch.Generator().manual_seed(1)
    class_B = torch.arange(n) % 2
    centre_C2 = torch.tensor([[30.0, 0.0], [0.0, -20.0]], dtype=torch.float64)  # of the averages, in their own frames
    offset_B2 = torch.randn(n, 2, generator=draw, dtype=torch.float64)
    offset_B2[:10] = torch.tensor([20.0, 0.0], dtype=torch.float64)
    origin_B2 = torch.einsum("bij,bj->bi", state.poses.rotation_B33[:, :2, :2], centre_C2[class_B] + offset_B2)
    poses = replace(state.poses, class_B=class_B, origin_B2=origin_B2)
    state = replace(state, poses=poses, halves=state.halves[:1] * 2)
    assert distances(state)[10:].median() == pytest.approx(1.18, abs=0.15)
    good = [ClassQuality(0.5, n // 2, 20.0, 9.0, 5.0, 9.0, score) for score in (1.0, 0.9)]
    kept = chosen_particles("auto", good, state)
    assert int(kept.min()) >= 10 and len(kept) > 0.95 * (n - 10)
    assert len(chosen_particles("1-2", good, state)) == n
    assert len(chosen_particles("auto", [replace(one, score=0.1) for one in good], state)) == 0


def test_batches_grow_and_whole_passes_come_last() -> None:
    steps = [schedule.step_of(number, 10_000, replace(GRADIENT, classes=16)) for number in range(1, 26)]
    sizes = [len(step.rows) for step in steps]
    assert sizes[0] == schedule.FEWEST_IN_BATCH and sizes[:-3] == sorted(sizes[:-3]) and sizes[-3:] == [10_000] * 3
    assert sizes[-4] == pytest.approx(3 * GRADIENT.batch * 16, rel=0.01)
    assert [step.whole for step in steps] == [False] * 22 + [True] * 3
    assert steps[0].size == schedule.LARGEST_STEP and steps[21].size == pytest.approx(schedule.SMALLEST_STEP)
    assert not torch.equal(steps[0].rows, steps[1].rows) and len(steps[15].rows.unique()) == sizes[15]
    assert schedule.searches_left(25, 10_000, GRADIENT) == 0
    assert schedule.searches_left(24, 10_000, GRADIENT) == 1 and schedule.searches_left(1, 10_000, GRADIENT) > 60


def test_the_gradient_is_the_default_for_many_particles_only() -> None:
    enough = schedule.ENOUGH_PER_CLASS * VIEWS
    auto = replace(CONFIG, gradient=None)
    assert schedule.uses_gradient(auto, enough) and not schedule.uses_gradient(auto, enough - 1)
    assert "the gradient" in schedule.mode_notice(auto, enough) and "by EM" in schedule.mode_notice(auto, 9)
    assert schedule.uses_gradient(GRADIENT, 9) and not schedule.uses_gradient(CONFIG, 10**6)
    assert "25.0 times" in schedule.mode_notice(CONFIG, enough) and "as asked for" in schedule.mode_notice(CONFIG, enough)


def test_the_gradient_tells_views_apart_from_batches(
    views: tuple[ParticleTable, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, view_B = views
    monkeypatch.setattr(schedule, "FEWEST_IN_BATCH", 100)
    states = classified(table, GRADIENT)
    assert adjusted_rand(states[-1].poses.class_B.numpy(), view_B) > 0.9
    before_last = states[21]  # from batches alone: no iteration has seen all particles at once
    assert len(before_last.running) == VIEWS and not states[22].running
    seen = [set(schedule.step_of(number, len(table), GRADIENT).rows.tolist()) for number in range(1, 23)]
    assert max(len(rows) for rows in seen) == 3 * GRADIENT.batch * VIEWS and len(seen[0]) == 100
    assert len(seen[0] & set(states[0].poses.significant_B.nonzero().squeeze(1).tolist())) == 100
    assert int((states[0].poses.significant_B > 0).sum()) == 100  # nothing is known of the others yet
    share_C = torch.stack([model.direction_prior_D.sum() for model in before_last.halves])
    assert float(share_C.min()) > 0.5 / VIEWS and float(share_C.sum()) == pytest.approx(1)
    assert bool((states[-1].poses.significant_B > 0).all())


def test_sums_of_batches_are_remembered(views: tuple[ParticleTable, np.ndarray]) -> None:
    fresh_3CYX = torch.randn(3, 2, 8, 5, dtype=torch.float64)
    first = stepped_planes([NOTHING, NOTHING], fresh_3CYX, 10, 0.5)
    second = stepped_planes([first[0], NOTHING], 3 * fresh_3CYX, 10, 0.5)
    unit_3CYX = (fresh_3CYX / 10).float()
    torch.testing.assert_close(torch.stack(first, 1), 0.5 * unit_3CYX)
    torch.testing.assert_close(second[0], 0.5 * first[0] + 1.5 * unit_3CYX[:, 0])
    torch.testing.assert_close(second[1], 1.5 * unit_3CYX[:, 1])
    session = classify2d.prepare(views[0], replace(GRADIENT, classes=1))
    once = next(classify2d.iterations(session)).state
    again = classify2d.iterate(once, session.data, replace(GRADIENT, classes=2), session.on, lambda *_: None).state
    assert len(once.running) == 1 and len(again.running) == 2
    twice = classify2d.iterate(once, session.data, replace(GRADIENT, classes=1), session.on, lambda *_: None).state
    weights = [float(state.running[0][2].sum()) for state in (once, twice)]
    assert weights[1] > 1.2 * weights[0]  # those of the first batch are still in it


def test_rules_of_selection() -> None:
    qualities = [ClassQuality(0.25, 10, 20.0, 9.0, 5.0, 9.0, score) for score in (0.3, 0.9, 0.7, 1.2)]
    assert chosen_classes("auto", qualities) == [4, 2, 3]
    assert chosen_classes("score>=0.85", qualities) == [4, 2]
    assert chosen_classes("1,3-4", qualities) == [4, 3, 1]
    for rule in ("5", "0", "1-9"):
        with pytest.raises(InputError, match="classes from 1 to 4"):
            check_rule(rule, 4)
    for rule in ("good", "score>=", "1;2"):
        with pytest.raises(InputError, match="score>=X"):
            check_rule(rule, 4)
