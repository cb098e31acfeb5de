"""The schedule of the refinement against values worked out by hand from RELION's rules."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from verglas.core.rotations import matrix_from_euler, random_rotations
from verglas.core.symmetry import symmetry_matrices
from verglas.refinement import schedule as rules
from verglas.refinement.config import RefineConfig
from verglas.refinement.state import HalfModel, Poses, Schedule, State

CONFIG = RefineConfig(diameter=180.0)
BOX, PIXEL = 128, 1.5


def make_poses(rotation_B33: Tensor, origin_B2: Tensor | None = None) -> Poses:
    zeros_B = torch.zeros(len(rotation_B33), dtype=torch.float64)
    origin_B2 = zeros_B[:, None].repeat(1, 2) if origin_B2 is None else origin_B2
    return Poses(
        rotation_B33, origin_B2, zeros_B + 1, zeros_B, zeros_B, zeros_B.long(), zeros_B, zeros_B.long() + 1,
        *2 * [zeros_B.long()], zeros_B, zeros_B, zeros_B,
    )  # fmt: skip


def make_half(pmax: float) -> HalfModel:
    empty = torch.zeros(0)
    return HalfModel(empty, empty, empty, 10.0, 1.0, empty, empty, empty, empty, empty, average_pmax=pmax)


def make_state(pmax: float = 0.5, iteration: int = 5, current_size: int = 60, resolution: float = 12.0, **fields: Any) -> State:
    """A state in the middle of a refinement: order 2, offsets 6 px and 2 px of 1.5 Å; `fields` are of its schedule."""
    schedule = replace(Schedule(2, 1, offset_range=9.0, offset_step=3.0), **fields)
    poses = make_poses(random_rotations(4, torch.Generator().manual_seed(0)))
    halves = [make_half(pmax), make_half(pmax)]
    return State(iteration, halves, poses, schedule, BOX, PIXEL, resolution, current_size, torch.ones(BOX // 2 + 1))


SETTLED: dict[str, Any] = {
    "iterations_without_gain": 1, "iterations_without_changes": 1, "smallest_angles": 1.0, "smallest_offsets": 0.5,
    "accuracy_angles": 2.0, "accuracy_offsets": 1.0, "changes_offsets": 0.8,
}  # fmt: skip


def test_initial_schedule_turns_pixels_into_angstrom() -> None:
    schedule = rules.initial_schedule(CONFIG, PIXEL)
    assert (schedule.offset_range, schedule.offset_step, schedule.local_sigma) == (7.5, 3.0, 0.0)
    assert (schedule.angular_step, schedule.fine_angular_step, schedule.best_resolution) == (15.0, 7.5, 60.0)
    fine = rules.initial_schedule(replace(CONFIG, healpix_order=4), PIXEL)
    assert fine.local_sigma == 2 * 1.875  # two steps after oversampling, from the first iteration


def test_perturbation_walks_half_to_one_limit_and_wraps() -> None:
    schedule = rules.initial_schedule(replace(CONFIG, seed=7), PIXEL)
    values = [schedule.perturbation]
    for iteration in range(1, 200):
        schedule = rules.perturb(schedule, replace(CONFIG, seed=7), iteration)
        values.append(schedule.perturbation)
    steps = [(new - old) % 1.0 for old, new in pairwise(values)]
    assert all(-0.5 <= value <= 0.5 for value in values) and min(values) < -0.4 and max(values) > 0.4
    assert all(0.25 <= step <= 0.5 + 1e-12 for step in steps)
    again = rules.perturb(replace(schedule, perturbation=values[41]), replace(CONFIG, seed=7), 42)
    assert again.perturbation == values[42]  # depends on nothing but the last value, seed and number
    assert rules.perturb(replace(schedule, perturbation=values[41]), replace(CONFIG, seed=8), 42).perturbation != values[42]
    assert rules.perturb(rules.initial_schedule(CONFIG, PIXEL), replace(CONFIG, perturbation=0.0), 1).perturbation == 0.0


@pytest.mark.parametrize("fields, pmax, size", [
    ({}, 0.5, 52),  # 128 * 1.5 / 12 = shell 16, + 10 shells, * 2
    ({"size_increment": 14}, 0.5, 60),
    ({"high_fsc_at_limit": True}, 0.5, 64),  # + a quarter of 64 shells
    ({"high_fsc_at_limit": True}, 0.1, 52),  # poses are too blurred to trust the FSC
    ({"size_increment": 60}, 0.5, 128),  # never more than the box
    ({"converged": True}, 0.5, 128),  # last iteration: everything
])  # fmt: skip
def test_image_size(fields: dict[str, Any], pmax: float, size: int) -> None:
    assert rules.image_size(make_state(pmax=pmax, **fields), CONFIG) == size


def test_coarse_size_follows_the_arc_of_a_step() -> None:
    schedule = rules.initial_schedule(CONFIG, PIXEL)
    # 15 degrees at a diameter of 180 Å: 23.56 Å, / 1.2 = 19.63 Å; 192 Å / 19.63 Å = 9.78, so 10 shells
    assert rules.coarse_size(schedule, CONFIG, BOX, PIXEL, 60) == 20
    assert rules.coarse_size(replace(schedule, healpix_order=4), CONFIG, BOX, PIXEL, 128) == 80  # 39.1 shells
    assert rules.coarse_size(replace(schedule, healpix_order=4), CONFIG, BOX, PIXEL, 60) == 60
    assert rules.coarse_size(replace(schedule, oversampling=0), CONFIG, BOX, PIXEL, 60) == 60


def local_state(ssnr_S: Tensor, accuracy: float = 0.5) -> State:
    """Local searches at order 5 (steps of 1.875 degrees, as wide as their prior) with 40 shells, as sharp as `ssnr_S`."""
    state = make_state(current_size=80, healpix_order=5, local_sigma=1.875, accuracy_angles=accuracy)
    return replace(state, halves=[replace(half, ssnr_S=ssnr_S) for half in state.halves])


def test_local_coarse_search_leaves_out_shells_that_tell_little() -> None:
    shell_S = torch.arange(BOX // 2 + 1, dtype=torch.float64)
    flat, low = torch.ones_like(shell_S), (shell_S <= 20).double()
    # s^4 summed to 35 of 40 shells is half of the sum: (35 / 40)^5 = 0.51
    assert rules.local_coarse_size(local_state(flat), 80) == 70
    # half of it below 18 of 20 shells: (18 / 20)^5 = 0.59, (17 / 20)^5 = 0.44; nothing beyond
    assert rules.local_coarse_size(local_state(low), 80) == 36
    assert rules.local_coarse_size(local_state(low), 30) == 30  # never more than the arc of a step allows
    first, second = local_state(flat).halves[0], local_state(low).halves[0]
    assert rules.local_coarse_size(replace(local_state(low), halves=[first, second]), 80) == 70  # that of the sharper half
    assert rules.local_coarse_size(local_state(torch.zeros_like(flat)), 80) == 80  # nothing is known: everything is looked at


def test_local_coarse_search_looks_at_more_where_children_would_cost_more() -> None:
    shell_S = torch.arange(BOX // 2 + 1, dtype=torch.float64)
    # Poses as uncertain as the step is wide: a wider posterior would have more children than the coarse pass spares.
    sizes = [rules.local_coarse_size(local_state((shell_S <= 20).double(), accuracy), 80) for accuracy in (0.5, 6.0, 999.0)]
    assert sizes[0] < sizes[1] == sizes[2] == 40


def test_settled_refinement_gets_the_next_grid() -> None:
    state = make_state(**SETTLED)
    before = copy.deepcopy(state.schedule)
    finer = rules.update_sampling(state, CONFIG)
    assert state.schedule == before
    # step min(1.5, 0.75 * 1.0) * 2 = 1.5; range 5 * 0.8 = 4.0, not above 1.3 * 9, not below 2.25, not above 4 steps
    assert (finer.healpix_order, finer.offset_step, finer.offset_range) == (3, 1.5, 4.0)
    assert (finer.iterations_without_gain, finer.iterations_without_changes, finer.fine_enough) == (0, 0, False)
    assert (finer.smallest_angles, finer.smallest_offsets, finer.local_sigma) == (999.0, 999.0, 0.0)
    assert finer.accuracy_angles == 2.0
    third = rules.update_sampling(make_state(**{**SETTLED, "healpix_order": 3}), CONFIG)
    assert (third.healpix_order, third.local_sigma) == (4, 3.75)  # local, six fine steps of 1.875 are 3 sigma


@pytest.mark.parametrize("accuracy, change, old_range, old_step, expected", [
    (4.0, 0.8, 9.0, 4.0, (4.5, 3.0)),  # step at most 1.5 Å after oversampling; range at least 1.5 steps
    (1.0, 10.0, 4.0, 3.0, (5.2, 1.5)),  # range at most 1.3 times the old one
    (1.0, 2.0, 9.0, 3.0, (5.0, 1.5)),  # 10 Å are more than 4 steps: halved
    (0.4, 2.0, 9.0, 3.0, (5.0, 1.25)),  # still more than 4 steps of 0.6 Å: then a quarter of the range
    (4.0, 0.8, 9.0, 2.5, (9.0, 2.5)),  # 3 Å would be coarser than before: all stays
])  # fmt: skip
def test_offsets_of_the_next_grid(
    accuracy: float, change: float, old_range: float, old_step: float, expected: tuple[float, float]
) -> None:
    fields = {
        **SETTLED,
        "accuracy_offsets": accuracy,
        "changes_offsets": change,
        "offset_range": old_range,
        "offset_step": old_step,
    }
    finer = rules.update_sampling(make_state(**fields), CONFIG)
    assert (finer.offset_range, finer.offset_step) == pytest.approx(expected)


@pytest.mark.parametrize("changed, iteration, word", [
    ({"iterations_without_gain": 0}, 5, "resolution still improves"),
    ({"iterations_without_changes": 0}, 5, "poses still change"),
    ({"accuracy_angles": 999.0}, 5, "not estimated"),
    ({}, 0, "second iteration"),
])  # fmt: skip
def test_unsettled_refinement_keeps_its_grid(changed: dict[str, Any], iteration: int, word: str) -> None:
    state = make_state(iteration=iteration, **{**SETTLED, **changed})
    assert rules.update_sampling(state, CONFIG) == state.schedule
    assert "kept" in rules.explain_sampling(state, CONFIG) and word in rules.explain_sampling(state, CONFIG)


def test_grid_finer_than_three_quarters_of_the_accuracy_is_fine_enough() -> None:
    state = make_state(**{**SETTLED, "accuracy_angles": 10.1})  # 7.5 < 0.75 * 10.1
    assert rules.update_sampling(state, CONFIG) == replace(state.schedule, fine_enough=True)
    assert "fine enough" in rules.explain_sampling(state, CONFIG)
    just_not = make_state(**{**SETTLED, "accuracy_angles": 10.0})
    assert rules.update_sampling(just_not, CONFIG).healpix_order == 3
    line = rules.explain_sampling(just_not, CONFIG)
    assert "refined to 3.75°" in line and "global" in line and "10°" in line
    assert "local searches, sigma 3.75°" in rules.explain_sampling(make_state(**{**SETTLED, "healpix_order": 3}), CONFIG)


def test_distance_of_poses_is_the_mean_over_their_axes() -> None:
    start = torch.eye(3, dtype=torch.float64)[None]
    turned = matrix_from_euler(*torch.tensor([[0.0], [0.0], [30.0]], dtype=torch.float64))
    assert rules.axes_distance(turned, start, "C1").item() == pytest.approx(20.0)  # x and y by 30, z by 0
    assert rules.axes_distance(turned, start, "C7").item() == pytest.approx(2 / 3 * (360 / 7 - 30))
    poses = random_rotations(20, torch.Generator().manual_seed(1))
    assert rules.axes_distance(poses @ symmetry_matrices("O")[13], poses, "O").max() < 1e-5


def changes(state: State, degrees: float, shift: float) -> Schedule:
    """Changes when every pose turns in its plane by `degrees` and moves by `shift` Å along x."""
    old = make_poses(state.poses.rotation_B33)
    angles = torch.tensor([[0.0], [0.0], [degrees]], dtype=torch.float64)
    moved = torch.tensor([[shift, 0.0]], dtype=torch.float64).expand(4, 2)
    return rules.monitor_changes(old, make_poses(matrix_from_euler(*angles) @ old.rotation_B33, moved), state, CONFIG)


def test_changes_are_measured() -> None:
    schedule = changes(make_state(), 6.0, 2.0)
    assert schedule.changes_angles == pytest.approx(4.0)  # two axes of three move
    assert schedule.changes_offsets == pytest.approx(math.sqrt(2.0))  # rms along one axis
    assert (schedule.smallest_angles, schedule.smallest_offsets) == (schedule.changes_angles, schedule.changes_offsets)


# Fine steps of the start (order 2, 2 px of 1.5 Å): 7.5 degrees, so 3.0 degrees (4.5 in the plane) count as none; 1.5 Å, so
# 0.6 Å (0.85 Å along x alone).
@pytest.mark.parametrize("smallest, degrees, shift, count", [
    ((999.0, 999.0), 0.0, 0.0, 0),  # first iteration on this grid
    ((5.0, 1.0), 4.4, 0.84, 3),  # small against the steps
    ((5.0, 1.0), 4.6, 0.84, 0),  # angles improve
    ((5.0, 1.0), 4.4, 0.86, 0),  # offsets improve
    ((5.0, 1.0), 7.3, 0.84, 3),  # 4.87 is within 3 per cent of the smallest
    ((5.0, 1.0), 30.0, 9.0, 3),  # worse than before is no improvement either
])  # fmt: skip
def test_changes_are_counted(smallest: tuple[float, float], degrees: float, shift: float, count: int) -> None:
    smaller = {"healpix_order": 4, "offset_step": 0.7}  # does not matter
    state = make_state(smallest_angles=smallest[0], smallest_offsets=smallest[1], iterations_without_changes=2, **smaller)
    after = changes(state, degrees, shift)
    assert after.iterations_without_changes == count
    assert after.smallest_angles == pytest.approx(min(smallest[0], 2 / 3 * degrees), abs=1e-5)
    assert state.schedule.iterations_without_changes == 2


def curve(half: int, seventh: int, edge: float) -> Tensor:
    """An FSC of 1, below 0.5 from one shell and below 0.143 from another, and a value at shell 29."""
    fsc_S = torch.ones(BOX // 2 + 1, dtype=torch.float64)
    fsc_S[half:], fsc_S[seventh:] = 0.3, 0.05
    fsc_S[29] = edge
    return fsc_S


def test_resolution_counts_gain_beyond_rounding() -> None:
    state = make_state(iterations_without_gain=1, best_resolution=12.0)
    better = rules.update_resolution(replace(state, fsc_S=curve(20, 24, 0.05)), 11.0)
    assert (better.current_resolution, better.schedule.iterations_without_gain, better.schedule.best_resolution) == (
        11.0,
        0,
        11.0,
    )
    same = rules.update_resolution(state, 1 / (1 / 12.0 + 0.00005))
    assert same.schedule.iterations_without_gain == 2
    worse = rules.update_resolution(state, 13.0)
    assert (worse.current_resolution, worse.schedule.iterations_without_gain, worse.schedule.best_resolution) == (13.0, 2, 12.0)
    assert (state.current_resolution, state.schedule.iterations_without_gain) == (12.0, 1)


@pytest.mark.parametrize("fsc, increment, high", [
    (curve(20, 24, 0.05), 10, False),  # 24 - 20 + 5 = 9
    (curve(15, 28, 0.19), 18, False),
    (curve(20, 24, 0.21), 10, True),  # at shell 60 / 2 - 1
    (torch.ones(BOX // 2 + 1), 10, True),  # never below
])  # fmt: skip
def test_size_increment_and_high_fsc(fsc: Tensor, increment: int, high: bool) -> None:
    after = rules.update_resolution(replace(make_state(), fsc_S=fsc), 11.0).schedule
    assert (after.size_increment, after.high_fsc_at_limit) == (increment, high)


def test_size_increment_and_high_fsc_never_go_back() -> None:
    state = replace(make_state(size_increment=20, high_fsc_at_limit=True), fsc_S=curve(20, 24, 0.05))
    after = rules.update_resolution(state, 11.0).schedule
    assert (after.size_increment, after.high_fsc_at_limit) == (20, True)


@pytest.mark.parametrize("accuracy, expected", [(10.1, True), (10.0, False), (999.0, True)])  # 999: not measured
def test_a_grid_is_fine_enough_only_as_long_as_poses_are_no_more_accurate(accuracy: float, expected: bool) -> None:
    state = make_state(fine_enough=True, **{**SETTLED, "iterations_without_changes": 0, "accuracy_angles": accuracy})
    assert rules.update_sampling(state, CONFIG) == replace(state.schedule, fine_enough=expected)


@pytest.mark.parametrize("fine, gain, moves, expected", [(True, 1, 1, True), (True, 3, 2, True), (False, 3, 3, False),
                                                         (True, 0, 1, False), (True, 1, 0, False)])  # fmt: skip
def test_convergence(fine: bool, gain: int, moves: int, expected: bool) -> None:
    schedule = make_state(fine_enough=fine, iterations_without_gain=gain, iterations_without_changes=moves).schedule
    assert rules.is_converged(schedule, CONFIG) is expected
