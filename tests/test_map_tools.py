"""Operations on maps and alignment, against formulas."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from verglas.cli.main import main
from verglas.core.rotations import angular_distance, matrix_from_euler
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import Map, read_map, write_map
from verglas.postprocess import mapops
from verglas.postprocess.align import align, even_rotations

BOX, PIXEL = 32, 2.5


def blob(position: tuple[float, float, float], box: int = BOX, sigma: float = 2.0) -> torch.Tensor:
    """Gaussian at (x, y, z) px from the centre voxel, [Z, Y, X]."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    squares = (x - position[0]) ** 2 + (y - position[1]) ** 2 + (z - position[2]) ** 2
    return torch.exp(-squares / (2 * sigma**2))


def lumpy(box: int = BOX, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    points = np.zeros((box, box, box))
    at = (box // 2 + rng.uniform(-box / 5, box / 5, (25, 3))).astype(int)
    np.add.at(points, tuple(at.T), rng.uniform(0.5, 1.5, 25))
    return torch.from_numpy(ndimage.gaussian_filter(points, 1.5))


def matrix(rot: float, tilt: float, psi: float) -> torch.Tensor:
    return matrix_from_euler(*(torch.tensor([a], dtype=torch.float64) for a in (rot, tilt, psi)))[0]


def test_rotation_moves_a_point_by_the_matrix():
    rotation, shift = matrix(30, 60, -20), torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)
    place = torch.tensor([5.0, -3.0, 2.0], dtype=torch.float64)
    turned = mapops.rotate(blob(tuple(place.tolist())), rotation, shift)
    expected = blob(tuple((rotation @ place + shift).tolist()))
    assert (turned - expected).abs().max() < 0.01


def test_flip_mirrors_x_about_the_centre_voxel():
    difference = mapops.flip_hand(blob((4, 2, -3))) - blob((-4, 2, -3))
    assert difference[..., 1:].abs().max() < 1e-12  # the first column, x = -N/2, has no partner
    one = lumpy()
    assert torch.equal(mapops.flip_hand(mapops.flip_hand(one)), one)


def test_symmetrised_map_is_invariant():
    group = symmetry_matrices("D3")
    even = mapops.symmetrise(lumpy(), group)
    for rotation in group[1:]:
        turned = mapops.rotate(even, rotation)
        assert (turned - even).norm() < 0.02 * even.norm()


def test_filters_add_up_and_cut_where_they_should():
    one = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = mapops.low_passed(one, PIXEL, 10.0), mapops.high_passed(one, PIXEL, 10.0)
    assert (low + high - one).abs().max() < 1e-12
    axis = torch.fft.fftfreq(BOX, dtype=torch.float64) * BOX
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    spectrum = torch.fft.fftn(low).abs() / torch.fft.fftn(one).abs()
    assert (spectrum[radius <= 7] - 1).abs().max() < 1e-9 and spectrum[radius >= 9].max() < 1e-9  # 80 Å / 10 Å = shell 8
    assert (spectrum[radius == 8] - 0.5).abs().max() < 1e-9


@pytest.mark.parametrize("new", [PIXEL / 2, PIXEL * 0.8, PIXEL * 1.3])
def test_resampling_keeps_a_blob_in_place(new):
    place, sigma = (6.0, -4.0, 3.0), 3.0
    resampled, pixel = mapops.resample(blob(place, sigma=sigma), PIXEL, new)
    assert pixel == pytest.approx(new, rel=2e-3)
    scale = PIXEL / pixel
    expected = blob(tuple(scale * p for p in place), len(resampled), sigma * scale)
    assert (resampled - expected).abs().max() < 0.01


def test_window_keeps_the_centre():
    one = blob((3, 1, -2))
    padded = mapops.window(one, 48)
    assert (padded - blob((3, 1, -2), 48)).abs().max() < 1e-6
    assert torch.equal(mapops.window(padded, BOX), one)


def test_normalise_measures_the_background():
    one = 7 + 3 * torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one[12:20, 12:20, 12:20] += 100
    outside = mapops.radius_grid(BOX, 3) > BOX / 2 - 1
    done = mapops.normalise(one)
    assert abs(float(done[outside].mean())) < 1e-9 and float(done[outside].std()) == pytest.approx(1)


def test_even_rotations_cover_the_group():
    rotations = even_rotations(2000)
    identity = torch.eye(3, dtype=torch.float64)
    assert (rotations @ rotations.transpose(1, 2) - identity).abs().max() < 1e-12
    # Uniform on SO(3): the angle w has density (1 - cos w) / pi, so a share (w - sin w) / pi lies below w.
    angles = angular_distance(rotations, identity[None])
    for degrees in (45, 90, 135):
        w = math.radians(degrees)
        assert float((angles < degrees).double().mean()) == pytest.approx((w - math.sin(w)) / math.pi, abs=0.01)


def test_alignment_finds_pose_and_hand():
    reference = lumpy()
    rotation, shift = matrix(100, 50, -70), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = mapops.flip_hand(mapops.rotate(reference, rotation, shift))
    found = align(moved, reference, n_rotations=1200, either_hand=True)
    assert found.mirrored and found.correlation > 0.98
    assert float(angular_distance((found.rotation_33 @ rotation)[None], torch.eye(3, dtype=torch.float64)[None])) < 0.5
    assert (found.rotation_33 @ shift + found.shift_3).abs().max() < 0.1


def test_command_changes_grid_and_says_so(tmp_path):
    write_map(tmp_path / "in.mrc", Map(blob((4, 0, 0), sigma=3.0).float().numpy(), PIXEL, origin=(10.0, 20.0, 30.0)))
    arguments = ["map", "--map", tmp_path / "in.mrc", "--out", tmp_path / "out.mrc", "--invert", "--rotate", 0, 0, 90]
    assert main([str(a) for a in [*arguments, "--new-pixel", PIXEL / 2, "--box", 40]]) == 0
    done = read_map(tmp_path / "out.mrc")
    assert (done.box, done.pixel_size) == (40, pytest.approx(PIXEL / 2))
    # psi = 90: row 0 of A is (0, 1, 0), so the point x = 4 goes to A (4, 0, 0) = (0, -4, 0), 8 pixels of half the size.
    expected = -blob((0, -8, 0), 40, sigma=6.0)
    assert np.abs(done.data_ZYX - expected.numpy()).max() < 0.01
    # The centre voxel stays where it is in space: 16 * 2.5 Å from the old first voxel, 20 * 1.25 Å from the new one.
    assert done.origin == pytest.approx([o + 16 * PIXEL - 20 * PIXEL / 2 for o in (10, 20, 30)])
    figures = json.loads((tmp_path / "out.result.json").read_text())["figures"]
    assert figures["box"]["value"] == 40


@pytest.mark.parametrize(
    "options, word",
    [
        (["--box", "31"], "--box"),
        (["--new-pixel", "-1"], "--new-pixel"),
        (["--sym", "X9"], "symmetry"),
        (["--either-hand"], "--align-to"),
    ],
)
def test_command_refuses_what_makes_no_sense(tmp_path, capsys, options, word):
    write_map(tmp_path / "in.mrc", Map(lumpy().float().numpy(), PIXEL))
    assert main(["map", "--map", str(tmp_path / "in.mrc"), "--out", str(tmp_path / "out.mrc"), *options]) == 2
    assert word in capsys.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == ["in.mrc"]


def test_command_aligns_maps_of_different_grids(tmp_path):
    reference = lumpy(40, seed=3)
    moved, pixel = mapops.resample(mapops.rotate(reference, matrix(20, 35, 50)), PIXEL, 3.0)
    write_map(tmp_path / "reference.mrc", Map(reference.float().numpy(), PIXEL))
    write_map(tmp_path / "moved.mrc", Map(moved.float().numpy(), pixel))
    arguments = ["map", "--map", "moved.mrc", "--out", "back.mrc", "--align-to", "reference.mrc"]
    assert main([str(tmp_path / a) if a.endswith(".mrc") else a for a in arguments]) == 0
    figures = json.loads((tmp_path / "back.result.json").read_text())["figures"]
    assert figures["correlation"]["value"] > 0.97 and figures["mirrored"]["value"] is False
    back = torch.tensor(read_map(tmp_path / "back.mrc").data_ZYX).double()
    expected = mapops.window(mapops.resample(reference, PIXEL, 3.0)[0], len(back))
    assert float(torch.corrcoef(torch.stack([back.flatten(), expected.flatten()]))[0, 1]) > 0.97


def test_a_map_that_is_no_even_cube_is_brought_to_one(tmp_path, capsys):
    data = np.zeros((9, 12, 15), np.float32)
    data[4, 6, 7] = 1  # the centre voxel, n // 2 along each axis
    write_map(tmp_path / "odd.mrc", Map(data, 2.0, (1.0, 2.0, 3.0)))
    words = ["map", "--map", str(tmp_path / "odd.mrc"), "--out", str(tmp_path / "even.mrc")]
    assert main(words) == 2
    assert "box of 15 x 12 x 9 voxels" in capsys.readouterr().err and not (tmp_path / "even.mrc").exists()
    assert main([*words, "--box", "10"]) == 0
    even = read_map(tmp_path / "even.mrc")
    assert even.data_ZYX.shape == (10, 10, 10) and even.data_ZYX[5, 5, 5] == 1 and even.data_ZYX.sum() == 1
    assert even.origin == (1.0 + 2 * 2, 2.0 + 1 * 2, 3.0 - 1 * 2)  # the first voxel moved by n // 2 - 5
