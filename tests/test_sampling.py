"""Sampling grids: HEALPix against known pixels and healpy, asymmetric units, children, offsets, and RELION's own samples."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.core.rotations import angular_distance, matrix_from_euler, random_rotations
from verglas.core.symmetry import order as group_order
from verglas.core.symmetry import symmetry_matrices
from verglas.errors import InputError
from verglas.expectation import sampling
from verglas.expectation.healpix import child_pixels, directions_of_pixels, largest_radius, pixel_count
from verglas.expectation.sampling import OffsetGrid, OrientationGrid, view_vectors
from verglas.io.star import read_star

GROUPS = ["C1", "C2", "C7", "D1", "D2", "D3", "D7", "T", "O", "I1", "I2", "I3", "I4"]


# (order, pixel, longitude, latitude), from an independent HEALPix program
@pytest.mark.parametrize("order, pixel, rot, latitude", [
    (0, 0, 45.0, 41.81031489577859), (0, 4, 0.0, 0.0), (0, 11, -45.0, -41.81031489577862), (1, 0, 45.0, 19.47122063449069),
    (1, 17, 22.5, 0.0), (2, 37, -101.25, 41.81031489577859), (3, 500, -78.75, 14.477512185929925),
    (6, 40000, 140.625, -34.953865257188454),
])  # fmt: skip
def test_pixel_centres_are_where_healpix_puts_them(order: int, pixel: int, rot: float, latitude: float) -> None:
    centre = directions_of_pixels(order, torch.tensor([pixel]))[0]
    assert centre.tolist() == pytest.approx([rot, 90 - latitude], abs=1e-10)


@pytest.mark.interop
@pytest.mark.parametrize("order", range(8))
def test_all_pixels_agree_with_healpy(order: int) -> None:
    healpy = pytest.importorskip("healpy", reason="needs healpy")
    ours = view_vectors(directions_of_pixels(order, torch.arange(pixel_count(order))))
    theirs = np.stack(healpy.pix2vec(2**order, np.arange(pixel_count(order)), nest=True), -1)
    assert np.abs(ours.numpy() - theirs).max() < 1e-13
    assert largest_radius(order) == pytest.approx(np.degrees(healpy.max_pixrad(2**order)), abs=1e-12)


def test_children_of_a_pixel_are_its_four_quarters_in_rows() -> None:
    assert child_pixels(torch.tensor([0, 5]), 1).tolist() == [[0, 1, 2, 3], [20, 21, 22, 23]]
    assert child_pixels(torch.tensor([1]), 2)[0].tolist() == [16, 17, 20, 21, 18, 19, 22, 23, 24, 25, 28, 29, 26, 27, 30, 31]
    parents = view_vectors(directions_of_pixels(3, torch.arange(768)))
    children = view_vectors(directions_of_pixels(4, child_pixels(torch.arange(768), 1).reshape(-1))).reshape(768, 4, 3)
    assert torch.rad2deg((children * parents[:, None]).sum(-1).acos()).max() < largest_radius(3)


def test_matrices_of_a_grid_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, most = OrientationGrid.build(4, 1, "D3"), []
    monkeypatch.setattr(sampling, "PIXELS_AT_ONCE", 100)
    directions = sampling.directions_of_pixels

    def counted(order: int, pixel_D: torch.Tensor) -> torch.Tensor:
        most.append(len(pixel_D))
        return directions(order, pixel_D)

    monkeypatch.setattr(sampling, "directions_of_pixels", counted)
    sampling.views_of_unit.cache_clear()
    found_E33 = sampling.views_of_unit(4, 1, "D3", torch.device("cpu"))
    rot, tilt = directions(5, child_pixels(grid.healpix_D, 1).reshape(-1)).unbind(-1)
    assert torch.equal(found_E33, matrix_from_euler(rot, tilt, torch.zeros_like(rot)))
    assert max(most) == 400 and sum(most) == len(found_E33)


@pytest.mark.parametrize("symmetry", GROUPS)
def test_asymmetric_unit_and_its_mates_cover_the_sphere_once(symmetry: str) -> None:
    grid = OrientationGrid.build(4, 0, symmetry)
    assert bool((grid.healpix_D.diff() > 0).all())
    mates_GD3 = view_vectors(grid.direction_D2) @ symmetry_matrices(symmetry)
    whole_D3 = view_vectors(directions_of_pixels(4, torch.arange(3072)))
    to_nearest = torch.rad2deg((whole_D3 @ mates_GD3.reshape(-1, 3).T).amax(1).clamp(max=1).acos())
    # Grids on the two sides of a seam do not fit, so gaps there are wider than within; but there is no hole of two pixels.
    assert to_nearest.max() < 1.75 * largest_radius(4)
    cosine_DD = (mates_GD3[:, None] @ view_vectors(grid.direction_D2).T).amax((0, 1)).fill_diagonal_(-1)
    assert torch.rad2deg(cosine_DD.max().acos()) >= 0.5 * largest_radius(4)  # no direction is there twice
    assert grid.n_directions * group_order(symmetry) == pytest.approx(3072, rel=0.1)


def test_coarse_orientations_are_numbered_direction_times_n_psi_plus_psi() -> None:
    grid = OrientationGrid.build(1, 0, "C1")
    assert (grid.n_directions, grid.n_psi, grid.count, grid.children_per_orientation) == (48, 12, 576, 1)
    o = torch.tensor([0, 13, 575])
    assert grid.direction_of(o).tolist() == [0, 1, 47]
    rot, tilt = grid.direction_D2[[0, 1, 47]].T
    expected = matrix_from_euler(rot, tilt, torch.tensor([0.0, 30.0, 330.0], dtype=torch.float64))
    torch.testing.assert_close(grid.rotations(o), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(grid.rotations()[o], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(grid.child_rotations(o), expected, rtol=0, atol=1e-14)  # without oversampling it is its own child


def test_children_are_fine_directions_outside_and_cell_centred_psi_inside() -> None:
    grid = OrientationGrid.build(2, 1, "D2")
    o, step = 77, 15.0
    direction, psi = divmod(o, grid.n_psi)
    angles = []
    for pixel in child_pixels(grid.healpix_D[direction][None], 1)[0]:
        rot, tilt = directions_of_pixels(3, pixel[None])[0].tolist()
        angles += [(rot, tilt, psi * step - step / 4), (rot, tilt, psi * step + step / 4)]
    expected = matrix_from_euler(*torch.tensor(angles, dtype=torch.float64).T)
    torch.testing.assert_close(grid.child_rotations(torch.arange(8 * o, 8 * o + 8)), expected, rtol=0, atol=1e-14)


def test_perturbation_turns_every_pose_from_the_right_by_three_equal_angles() -> None:
    still, moved = OrientationGrid.build(2, 1, "C1"), OrientationGrid.build(2, 1, "C1", perturbation=-0.4)
    turn = matrix_from_euler(*torch.full((3,), -0.4 * 15.0, dtype=torch.float64))
    index = torch.arange(0, still.count, 97)
    torch.testing.assert_close(moved.rotations(index), still.rotations(index) @ turn, rtol=0, atol=1e-14)
    torch.testing.assert_close(moved.child_rotations(index), still.child_rotations(index) @ turn, rtol=0, atol=1e-14)


@pytest.mark.parametrize("oversampling", [1, 2])
def test_children_stay_close_and_every_pose_is_near_some_child(oversampling: int) -> None:
    grid = OrientationGrid.build(1, oversampling, "C1", perturbation=0.3)
    fine = grid.child_rotations(torch.arange(grid.count * grid.children_per_orientation))
    poses = random_rotations(40, torch.Generator().manual_seed(1))
    trace_B = torch.einsum("bij,fij->bf", poses, fine).amax(1)
    distance_B = torch.rad2deg(((trace_B - 1) / 2).clamp(max=1).acos())
    assert distance_B.max() < 1.2 * grid.angular_step / 2**oversampling


def test_psi_step_divides_the_circle() -> None:
    grid = OrientationGrid.build(1, 0, "C1", psi_step=50.0)
    assert grid.psi_P.tolist() == pytest.approx([0, 45, 90, 135, 180, 225, 270, 315])
    assert OrientationGrid.build(5, 0, "C1").n_psi == 192


def test_millions_of_children_in_about_a_second() -> None:
    grid = OrientationGrid.build(4, 1, "C1", perturbation=0.2)
    index = torch.randint(grid.count * 8, (2_400_000,), generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    matrices = grid.child_rotations(index)
    assert time.process_time() - started < 6  # one core beside other load: about 0.6 s
    assert angular_distance(matrices[:100] @ matrices[:100].mT, torch.eye(3, dtype=torch.float64)).max() < 1e-6


@pytest.mark.parametrize(
    "order, oversampling, symmetry", [(-1, 0, "C1"), (11, 0, "C1"), (2, 5, "C1"), (0, 1, "I2"), (2, 1, "Q7")]
)
def test_impossible_grids_are_refused(order: int, oversampling: int, symmetry: str) -> None:
    with pytest.raises(InputError):
        OrientationGrid.build(order, oversampling, symmetry)


def test_offsets_fill_a_disc_with_x_outer_and_y_inner() -> None:
    grid = OffsetGrid.build(5.0, 2.0, 0)
    assert grid.count == 21  # RELION's defaults: range 5, step 2
    assert grid.coarse_T2[:4].tolist() == [[-4, -2], [-4, 0], [-4, 2], [-2, -4]]
    torch.testing.assert_close(grid.fine_F2, grid.coarse_T2)
    assert OffsetGrid.build(3 * 1.1, 1.1, 0).count == 29  # the rim at exactly the range belongs to it
    assert OffsetGrid.build(0.0, 1.0, 0).coarse_T2.tolist() == [[0.0, 0.0]]


def test_children_of_offsets_are_centred_in_their_cells_and_moved_along() -> None:
    grid = OffsetGrid.build(2.0, 2.0, 1, perturbation=0.25)
    assert (grid.count, grid.children_per_offset) == (5, 4)
    assert grid.coarse_T2[2].tolist() == [0.5, 0.5]
    assert grid.fine_F2[8:12].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert OffsetGrid.build(2.0, 2.0, 2).fine_F2[32:36].tolist() == [[-0.75, -0.75], [-0.75, -0.25], [-0.75, 0.25], [-0.75, 0.75]]


@pytest.mark.parametrize("reach, step", [(5.0, 0.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_impossible_offsets_are_refused(reach: float, step: float) -> None:
    with pytest.raises(InputError):
        OffsetGrid.build(reach, step, 1)


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen tiny particles for RELION to look at."""
    if shutil.which("relion_refine") is None:
        pytest.skip("needs relion_refine")
    folder = tmp_path_factory.mktemp("tiny") / "set"
    command = [sys.executable, "-m", "verglas", "simulate", "--n", "12", "--box", "16", "--pixel", "12", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.interop
@pytest.mark.parametrize("symmetry, order, oversampling", [
    ("C1", 2, 0), ("C7", 2, 1), ("C7", 3, 1), ("D1", 2, 0), ("D2", 2, 1), ("D2", 3, 0), ("D7", 3, 0), ("T", 3, 0), ("T", 2, 2),
    ("O", 2, 1), ("O", 4, 1), ("I", 2, 1), ("I1", 3, 0), ("I2", 4, 1), ("I3", 3, 0), ("I4", 3, 1),
])  # fmt: skip
def test_relion_samples_the_same_poses(tiny_set: Path, symmetry: str, order: int, oversampling: int) -> None:
    (tiny_set / "relion").mkdir(exist_ok=True)
    psi = 15 if order < 4 else 90  # coarse, to be quick
    options = {"--o": "relion/run", "--i": "particles.star", "--ref": "start.mrc", "--iter": 1, "--sym": symmetry,
               "--healpix_order": order, "--oversampling": oversampling, "--ini_high": 60, "--particle_diameter": 120, "--pad": 1,
               "--psi_step": psi, "--offset_range": 3, "--offset_step": 2, "--random_seed": 1}  # fmt: skip
    command = ["relion_refine", *(str(word) for pair in options.items() for word in pair), "--ctf", "--firstiter_cc"]
    done = subprocess.run([*command, "--dont_check_norm"], cwd=tiny_set, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sampling = read_star(tiny_set / "relion/run_it001_sampling.star")
    general = sampling["sampling_general"].values
    grid = OrientationGrid.build(order, oversampling, symmetry, float(general["rlnSamplingPerturbInstance"]), psi)
    theirs = sampling["sampling_directions"].frame[["rlnAngleRot", "rlnAngleTilt"]].to_numpy(float)
    assert theirs.shape == tuple(grid.direction_D2.shape)
    assert np.abs(theirs - grid.direction_D2.numpy()).max() < 1e-5
    assert grid.psi_step == pytest.approx(float(general["rlnPsiStep"]))

    best = read_star(tiny_set / "relion/run_it001_data.star")["particles"].frame
    angles = torch.tensor(best[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float))
    every_child = grid.child_rotations(torch.arange(grid.count * grid.children_per_orientation))
    poses = matrix_from_euler(*angles.T)
    closest = every_child[torch.einsum("bij,fij->bf", poses, every_child).argmax(1)]
    assert (closest - poses).abs().max() < 1e-6
    offsets = OffsetGrid.build(float(general["rlnOffsetRange"]), float(general["rlnOffsetStep"]), oversampling, grid.perturbation)
    origins = torch.tensor(best[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy(float))
    assert torch.cdist(origins, offsets.fine_F2).amin(1).max() < 1e-4
