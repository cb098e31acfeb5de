"""Local searches: the selection against a loop over particles, mates and all orientations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from verglas.core.rotations import angular_distance, matrix_from_euler, random_rotations
from verglas.core.symmetry import mates_beyond, symmetry_matrices
from verglas.errors import InputError
from verglas.expectation.local import select_local, select_relaxed
from verglas.expectation.sampling import OrientationGrid
from verglas.refinement.expect import HalfExpectation
from verglas.simulation.model import AtomModel
from verglas.testing.log_probability import REFERENCE
from verglas.testing.made_up import searched, shell_of_domains, simulate_particles


def plain_log_prior(grid: OrientationGrid, pose_33: Tensor, sigma: float) -> Tensor:
    """Log prior of every coarse orientation for one pose, [O], -inf outside the cut; each step as the words say it."""
    grid_O33 = OrientationGrid.build(grid.healpix_order, 0, grid.symmetry).rotations()
    density_O = torch.full((grid.count,), -math.inf, dtype=torch.float64)
    for mate_33 in symmetry_matrices(grid.symmetry):
        a_33 = pose_33 @ mate_33
        tilt_O = torch.rad2deg((grid_O33[:, 2] @ a_33[2]).clamp(-1, 1).acos())
        between_O33 = grid_O33 @ a_33.T  # Rz(turn) times the shortest tilt of one view onto the other
        turn_O = torch.rad2deg(torch.atan2(between_O33[:, 0, 1] - between_O33[:, 1, 0],
                                           between_O33[:, 0, 0] + between_O33[:, 1, 1]))  # fmt: skip
        log_O = -(tilt_O**2 + turn_O**2) / (2 * sigma**2)
        near_O = (tilt_O < 3 * sigma) & (turn_O.abs() < 3 * sigma)
        density_O = torch.where(near_O & (log_O > density_O), log_O, density_O)
    return density_O - torch.logsumexp(density_O, 0)


def poses_to_try(count: int) -> Tensor:
    """Random poses, one near a pole, two on the border of asymmetric units."""
    special = torch.tensor([[10.0, 1.0, 20.0], [25.7, 63.0, 4.0], [0.1, 90.1, 45.0]], dtype=torch.float64)
    return torch.cat([random_rotations(count - 3, torch.Generator().manual_seed(3)), matrix_from_euler(*special.T)])


@pytest.mark.parametrize("symmetry, order", [("C1", 1), ("C1", 3), ("C7", 3), ("D2", 3), ("T", 3), ("O", 4), ("I2", 3)])
def test_selection_agrees_with_a_loop_over_everything(symmetry: str, order: int) -> None:
    grid = OrientationGrid.build(order, 1, symmetry, perturbation=0.3)
    sigma, poses = 0.93 * grid.angular_step, poses_to_try(8)
    ptr_B1, orientation_N, log_prior_N = select_local(grid, poses, sigma, symmetry)
    assert (ptr_B1.dtype, orientation_N.dtype, log_prior_N.dtype) == (torch.int64, torch.int64, torch.float64)
    assert ptr_B1[-1] == len(orientation_N) == len(log_prior_N)
    for number, pose_33 in enumerate(poses):
        mine = slice(ptr_B1[number], ptr_B1[number + 1])
        expected_O = plain_log_prior(grid, pose_33, sigma)
        assert orientation_N[mine].tolist() == torch.nonzero(expected_O > -math.inf)[:, 0].tolist()
        torch.testing.assert_close(log_prior_N[mine], expected_O[orientation_N[mine]], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "symmetry, relaxed, order",
    [("C1", "D2", 3), ("C1", "C7", 2), ("C2", "D4", 3), ("C1", "T", 3), ("C4", "O", 3), ("C2", "I2", 3)],
)
def test_relaxed_selection_is_the_mean_over_the_mates(symmetry: str, relaxed: str, order: int) -> None:
    """Over all mates, those that the map's own group makes equivalent included: these have the same prior."""
    grid = OrientationGrid.build(order, 1, symmetry, perturbation=0.3)
    sigma, poses = 1.1 * grid.angular_step, poses_to_try(5)
    ptr_B1, orientation_N, log_prior_N = select_relaxed(grid, poses, sigma, symmetry, relaxed)
    mates_G33 = symmetry_matrices(relaxed)
    for number, pose_33 in enumerate(poses):
        mine = slice(ptr_B1[number], ptr_B1[number + 1])
        each_GO = torch.stack([plain_log_prior(grid, pose_33 @ mate_33, sigma) for mate_33 in mates_G33])
        expected_O = torch.logsumexp(each_GO, 0) - math.log(len(mates_G33))
        assert orientation_N[mine].tolist() == torch.nonzero(expected_O > -math.inf)[:, 0].tolist()
        torch.testing.assert_close(log_prior_N[mine], expected_O[orientation_N[mine]], rtol=0, atol=1e-9)
        assert float(log_prior_N[mine].exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("symmetry, relaxed, count", [("C1", "D2", 4), ("C2", "D2", 2), ("C1", "I", 60), ("D2", "O", 6)])
def test_mates_beyond_a_group_and_it_make_the_larger_one(symmetry: str, relaxed: str, count: int) -> None:
    mates_R33 = mates_beyond(symmetry, relaxed)
    assert len(mates_R33) == count and torch.equal(mates_R33[0], torch.eye(3, dtype=torch.float64))
    products_G33 = (mates_R33[:, None] @ symmetry_matrices(symmetry)).reshape(-1, 3, 3)
    apart_GG = (products_G33[:, None] - symmetry_matrices(relaxed)).abs().amax((2, 3))
    assert (apart_GG.amin(0) < 1e-6).all() and (apart_GG.amin(1) < 1e-6).all()


@pytest.mark.parametrize("symmetry, relaxed", [("C3", "D2"), ("D2", "D2"), ("D2", "C2"), ("C1", "C1"), ("C1", "X2")])
def test_a_group_that_relaxes_nothing_is_refused(symmetry: str, relaxed: str) -> None:
    with pytest.raises(InputError, match="--relax-sym"):
        mates_beyond(symmetry, relaxed)


def test_wide_prior_selects_every_in_plane_angle_once() -> None:
    grid = OrientationGrid.build(1, 1, "C1")
    _, orientation_N, log_prior_N = select_local(grid, poses_to_try(4), 90.0, "C1")
    assert orientation_N.reshape(4, -1).tolist() == [list(range(grid.count))] * 4
    assert log_prior_N.exp().reshape(4, -1).sum(1).tolist() == pytest.approx([1.0] * 4)


def test_narrow_prior_selects_the_nearest_direction_and_angle() -> None:
    grid = OrientationGrid.build(2, 1, "D2")
    poses = poses_to_try(20)
    ptr_B1, orientation_N, log_prior_N = select_local(grid, poses, 0.01, "D2")
    assert ptr_B1.tolist() == list(range(21)) and log_prior_N.abs().max() < 1e-12
    mates_BG33 = poses[:, None] @ symmetry_matrices("D2")
    closeness_B = (mates_BG33[:, :, 2] @ grid.views_D33[:, 2].T).amax((1, 2))
    chosen = grid.rotations(orientation_N)
    assert torch.allclose((mates_BG33[:, :, 2] * chosen[:, None, 2]).sum(-1).amax(1), closeness_B)
    distance_BG = angular_distance(chosen[:, None], mates_BG33)
    assert distance_BG.amin(1).max() < 1.2 * grid.angular_step


def test_near_the_pole_the_right_orientations_are_found() -> None:
    """There psi of a pose and of its neighbours have nothing in common: a window in psi would miss most of them."""
    grid = OrientationGrid.build(4, 1, "C1")
    pose_133 = matrix_from_euler(*torch.tensor([[33.0, 0.4, 57.0]], dtype=torch.float64).T)
    _, orientation_N, _ = select_local(grid, pose_133, grid.angular_step, "C1")
    near = torch.nonzero(angular_distance(grid.rotations(), pose_133) < 2.9 * grid.angular_step)[:, 0]
    assert len(near) > 50 and set(near.tolist()) <= set(orientation_N.tolist())


def test_blocks_of_particles_give_what_single_particles_give(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = OrientationGrid.build(3, 1, "C7")
    poses = poses_to_try(9)
    at_once = select_local(grid, poses, grid.angular_step, "C7")
    monkeypatch.setattr("verglas.expectation.local._PAIRS_AT_ONCE", 1)
    for mine, expected in zip(select_local(grid, poses, grid.angular_step, "C7"), at_once, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 200.0, math.nan])
def test_impossible_priors_are_refused(sigma: float) -> None:
    with pytest.raises(InputError):
        select_local(OrientationGrid.build(1, 1, "C1"), poses_to_try(4), sigma, "C1")


def with_a_gap(symmetry: str) -> AtomModel:
    """Copies of a molecule as the group places them, but one."""
    unit = shell_of_domains(400, 10.0, 22.0, seed=2).xyz_N3 + torch.tensor([26.0, 6.0, 9.0], dtype=torch.float64)
    xyz_N3 = (unit @ symmetry_matrices(symmetry)[1:].mT).reshape(-1, 3)
    return AtomModel("gap", xyz_N3, torch.full((len(xyz_N3),), 6.7, dtype=torch.float64))


@pytest.mark.parametrize("group", ["C4", "D2"])
def test_relaxation_finds_the_mate_that_a_local_search_cannot(group: str) -> None:
    """A subunit is missing; poses are those of a refinement with the symmetry: any mate of the right one, 2 degrees off."""
    problem = simulate_particles(with_a_gap(group), 24, 6.0, 80, 400.0, "C1")
    truth_B33, mates_G33 = problem.poses.rotation_B33, symmetry_matrices(group)
    draw = torch.Generator().manual_seed(5)
    drawn_B = torch.randint(len(mates_G33), (80,), generator=draw)
    off_B33 = matrix_from_euler(*(2 * torch.randn(3, 80, generator=draw, dtype=torch.float64)))
    poses = replace(problem.poses, rotation_B33=off_B33 @ truth_B33 @ mates_G33[drawn_B])
    schedule = replace(problem.plan.schedule, healpix_order=3, local_sigma=5.0)
    right = {}
    for relaxed in (None, group):
        local = searched(replace(problem, poses=poses, config=replace(problem.config, relax_symmetry=relaxed)), schedule)
        half = HalfExpectation([local.model], local.data, local.poses, local.plan, local.config, REFERENCE)
        found = [(rows, result.rotation_B33) for rows, result in half.run(torch.arange(80))]
        away_B = torch.cat([angular_distance(rotation_B33, truth_B33[rows]) for rows, rotation_B33 in found])
        right[relaxed] = float((away_B < 15).double().mean())
    assert right[group] >= 0.9
    assert right[None] == pytest.approx(float((drawn_B == 0).double().mean()), abs=0.08)  # what chance has given


def test_more_orientations_than_32_bits_can_number() -> None:
    """HEALPix order 9: 2.4e9 orientations in D2. A search near the truth finds it, wherever it lies in their numbering."""
    problem = simulate_particles(shell_of_domains(900, 0.0, 16.0), 16, 4.0, 16, 400.0, "D2")
    schedule = replace(problem.plan.schedule, healpix_order=9, local_sigma=0.12, offset_range=1.0, offset_step=1.0)
    fine = searched(problem, schedule)
    assert int(select_local(fine.plan.grid, problem.poses.rotation_B33, 0.12, "D2")[1].max()) >= 2**31
    half = HalfExpectation([fine.model], fine.data, fine.poses, fine.plan, fine.config, REFERENCE)
    mates_G33 = symmetry_matrices("D2")
    for rows, found in half.run(torch.arange(16)):
        for row, rotation_33 in zip(rows.tolist(), found.rotation_B33, strict=True):
            assert float(angular_distance(rotation_33, problem.poses.rotation_B33[row] @ mates_G33).min()) < 1.0
    assert float(half.sums.to("cpu").direction_D.sum()) == pytest.approx(16, rel=0.01)
