"""projection/volume.py: slices of a map against the closed form of a Gaussian and against plain transforms.

Letters at the end of a name are its axes: R rotations, K Fourier coefficients, Z Y X volume, V packed voxels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from blobs import Blobs
from verglas.core.fourier import centred_rfft2, centred_rfft3, half_plane_pixels
from verglas.core.rotations import random_rotations, rotation_about_axis
from verglas.core.rows import packed_sphere
from verglas.projection import volume as v

BOX = 32
BLOB = Blobs(torch.tensor([[5.0, -3.0, 4.0]]).double(), torch.tensor([2.0]).double(), 2.2)  # on pixels of 1 Å
POSES = random_rotations(12, torch.Generator().manual_seed(3))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complex_slices(volume: v.FourierVolume, poses: torch.Tensor, pixels: object) -> torch.Tensor:
    return torch.view_as_complex(volume.slices(poses, pixels).double().transpose(1, 2).contiguous())  # type: ignore[arg-type]


def error_of_a_slice(padding: float, radius: int = BOX // 2) -> torch.Tensor:
    """|slice - closed form| [R, K] of the blob."""
    pixels = half_plane_pixels(BOX, radius)
    found = complex_slices(v.FourierVolume.from_map(BLOB.map(BOX, 1.0), padding=padding, dtype=torch.float64), POSES, pixels)
    return (found - BLOB.slices(POSES, pixels.frequency_K2(1.0, torch.float64), BOX, 1.0)).abs()


def bound_of_trilinear_interpolation(padding: float) -> float:
    """Interpolating F on a grid of step 1/P is off by at most sum over axes of max |F''| / (8 P^2), and |F''| along x is at
    most (2 pi)^2 sum x^2 |f|; here of the map after the gridding correction, which itself changes F by no more than the sum
    of its changes. In units of the 1/N^2 transform."""
    map_ZYX, correction = BLOB.map(BOX, 1.0), v.gridding_correction(BOX, padding).double()
    axis2 = (torch.arange(BOX).double() - BOX // 2) ** 2
    r2_ZYX = axis2[:, None, None] + axis2[:, None] + axis2
    interpolation = math.pi**2 / (2 * (padding * BOX) ** 2) * (r2_ZYX * map_ZYX / correction).sum()
    return float(interpolation + (map_ZYX * (1 / correction - 1)).sum()) / BOX**2


@pytest.mark.parametrize("padding", [1.0, 2.0, 4.0])
def test_slices_of_a_gaussian_off_the_centre(padding: float) -> None:
    """Within the rigorous bound everywhere. A wrong sign, transpose or centre is off by the signal, 7 times that at padding 2."""
    error, bound = error_of_a_slice(padding), bound_of_trilinear_interpolation(padding)
    signal = float(BLOB.map(BOX, 1.0).sum()) / BOX**2
    assert float(error.max()) <= bound
    assert bound < signal * 0.7 / padding**2


def test_the_interpolation_error_falls_with_the_square_of_the_padding() -> None:
    errors = [float(error_of_a_slice(padding).square().mean().sqrt()) for padding in (2.0, 4.0)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_the_gridding_correction_takes_away_the_mean_error() -> None:
    """Interpolation damps by 1 - (2 pi r / P)^2 / 12, 6 % for this blob; corrected, away from the origin, on average nothing."""
    pixels = half_plane_pixels(BOX)
    exact = BLOB.slices(POSES, pixels.frequency_K2(1.0, torch.float64), BOX, 1.0)
    found = complex_slices(v.FourierVolume.from_map(BLOB.map(BOX, 1.0), dtype=torch.float64), POSES, pixels)
    away = pixels.shell_K >= 4
    gain = (found * exact.conj()).real[:, away].sum() / exact[:, away].abs().square().sum()
    assert float(gain) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("box, padding", [(16, 2.0), (10, 1.0), (12, 1.5)])
def test_at_identity_a_slice_is_the_transform_of_the_sum_along_z(box: int, padding: float) -> None:
    """Of the map after the gridding correction; where positions fall on the grid (padding 1.5: on every second pixel)."""
    map_ZYX = noise(box, box, box)
    pixels = half_plane_pixels(box)
    found = complex_slices(v.FourierVolume.from_map(map_ZYX, padding=padding), torch.eye(3)[None], pixels)[0]
    corrected = map_ZYX / v.gridding_correction(box, padding).double()
    expected = pixels.gather(centred_rfft2(corrected.sum(0)[None]))[0]
    on_grid = ((pixels.x_K * padding) % 1 == 0) & ((pixels.y_K * padding) % 1 == 0)
    assert on_grid.sum() > 10
    assert (found - expected)[on_grid].abs().max() < 1e-5 * expected.abs().max()


def test_a_turned_slice_is_the_sum_along_another_axis() -> None:
    """A quarter turn about x brings object y to image z: the image is the sum along y, with its y along -z or z."""
    map_ZYX = noise(12, 12, 12)
    turn = rotation_about_axis((1, 0, 0), 90)[None]
    assert torch.allclose(turn[0] @ torch.tensor([0.0, 1, 0]).double(), torch.tensor([0.0, 0, 1]).double(), atol=1e-12)
    pixels = half_plane_pixels(12, 5)  # without Nyquist, whose sign is a matter of taste
    found = complex_slices(v.FourierVolume.from_map(map_ZYX, dtype=torch.float64), turn, pixels)[0]
    corrected = map_ZYX / v.gridding_correction(12, 2.0).double()
    image_YX = corrected.sum(1).flip(0).roll(1, 0)  # image y is -z of the object, about pixel 6
    expected = pixels.gather(centred_rfft2(image_YX[None]))[0]
    assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_precision(dtype: torch.dtype, error: float) -> None:
    """float64 stays float64 throughout; float32 agrees with it. Mean of the image: grey values of the map, exactly."""
    map_ZYX = noise(BOX, BOX, BOX).abs()
    pixels = half_plane_pixels(BOX)
    volume = v.FourierVolume.from_map(map_ZYX, dtype=dtype)
    slices = volume.slices(POSES, pixels)
    assert slices.dtype == volume.values.dtype == dtype and slices.shape == (12, 2, pixels.count)
    exact = v.FourierVolume.from_map(map_ZYX, dtype=torch.float64).slices(POSES, pixels)
    assert (slices.double() - exact).norm() <= error * exact.norm()
    mean = float((map_ZYX / v.gridding_correction(BOX, 2.0).double()).sum()) / BOX**2
    zero = int(((pixels.x_K == 0) & (pixels.y_K == 0)).nonzero())
    assert torch.allclose(slices[:, 0, zero].double(), torch.full((12,), mean).double(), rtol=max(error, 1e-7))


def test_pixels_beyond_the_radius_are_zero_and_those_within_are_unchanged() -> None:
    pixels = half_plane_pixels(BOX)
    whole = v.FourierVolume.from_map(noise(BOX, BOX, BOX))
    small = v.FourierVolume.from_map(noise(BOX, BOX, BOX), radius=9)
    assert small.rows.count < whole.rows.count / 4
    within = pixels.x_K**2 + pixels.y_K**2 <= 8**2  # at 9 itself the eight corners reach beyond what is kept
    slices = small.slices(POSES, pixels)
    assert torch.allclose(slices[:, :, within], whole.slices(POSES, pixels)[:, :, within])
    assert (slices[:, :, pixels.x_K**2 + pixels.y_K**2 > 9**2 + 1] == 0).all()


def test_coordinates_may_be_anything() -> None:
    """Given as a list of 3-vectors, pixels at half frequencies and out of the plane are slices of the same volume."""
    coordinates = torch.tensor([[0.5, 0.0, 0.0], [1.0, -2.5, 0.5], [-3.0, 2.0, 1.0]], dtype=torch.float64)
    volume = v.FourierVolume.from_map(BLOB.map(BOX, 1.0), padding=4.0, dtype=torch.float64)
    found = complex_slices(volume, POSES, coordinates)
    object_RK3 = torch.einsum("rji,kj->rki", POSES, coordinates) / BOX
    assert (found - BLOB.transform(object_RK3) / BOX**2).abs().max() <= bound_of_trilinear_interpolation(4.0)


def test_padded_size_is_even() -> None:
    assert [v.padded_size(*a) for a in ((64, 2.0), (10, 1.5), (10, 1.25), (10, 1.24), (6, 1.0))] == [128, 16, 14, 12, 6]


def test_gridding_correction_by_hand() -> None:
    correction = v.gridding_correction(8, 2.0)
    assert correction[4, 4, 4] == 1
    assert float(correction[4, 4, 0]) == pytest.approx((math.sin(math.pi / 4) / (math.pi / 4)) ** 2, rel=1e-6)
    assert float(correction[6, 5, 2]) == pytest.approx((math.sin(math.pi * 3 / 16) / (math.pi * 3 / 16)) ** 2, rel=1e-6)


@pytest.mark.parametrize("size, radius", [(16, 8), (16, 5), (10, 5)])
def test_packing_there_and_back(size: int, radius: int) -> None:
    fourier = centred_rfft3(noise(size, size, size))
    rows = packed_sphere(radius)
    packed = v.pack(fourier, rows)
    assert packed.shape == (rows.count, 2)
    x, y, z = rows.coordinates_V3().T
    within = x**2 + y**2 + z**2 <= radius**2
    assert torch.equal(torch.view_as_complex(packed)[within], fourier[z % size, y % size, x.clamp(max=size // 2)][within])
    assert (packed[~within] == 0).all() and (~within).any()
    inside = packed * (x**2 + y**2 + z**2 < radius**2)[:, None]
    f = torch.arange(size)
    f = torch.where(f > size // 2, f - size, f)
    keep = f[:, None, None] ** 2 + f[:, None] ** 2 + f[: size // 2 + 1] ** 2 < radius**2
    assert torch.allclose(v.unpack(inside, rows, size), torch.where(keep, fourier, 0), atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_loses_no_bit(dtype: torch.dtype) -> None:
    rows = packed_sphere(9)
    x, y, z = rows.coordinates_V3().T
    packed = torch.randn(rows.count, 2, dtype=dtype) * (x**2 + y**2 + z**2 < 81)[:, None]
    assert torch.equal(v.pack(v.unpack(packed, rows, 20), rows), packed)


def test_packed_voxels_are_a_quarter_of_the_cube() -> None:
    """pi / 12 = 26.2 % of a cube of the sphere's diameter, and the rim that interpolation touches."""
    for radius in (200, 400):
        share = packed_sphere(float(radius)).count / (2 * radius) ** 3
        assert math.pi / 12 < share < math.pi / 12 + 0.01


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 0, 1)])
def test_packing_along_another_axis_is_packing_the_turned_map(axes: tuple[int, int, int]) -> None:
    """Copies for GPU kernels: their x runs along volume axis axes[0] (0 = x), which is array axis 2 - axes[0]."""
    map_ZYX, rows = noise(12, 12, 12), packed_sphere(6)
    turned = map_ZYX.permute(2 - axes[2], 2 - axes[1], 2 - axes[0]).contiguous()
    expected = v.pack(centred_rfft3(turned), rows)
    assert torch.allclose(v.pack(centred_rfft3(map_ZYX), rows, axes), expected, atol=1e-15)


def test_coordinates_come_in_chunks_of_whole_planes() -> None:
    rows = packed_sphere(7)
    parts = list(v.coordinate_chunks(rows, voxels=150))
    assert len(parts) > 5 and parts[0][0].start == 0 and parts[-1][0].stop == rows.count
    assert all(a[0].stop == b[0].start for a, b in pairwise(parts))
    assert torch.equal(torch.cat([c for _, c in parts], 1).T, rows.coordinates_V3())


def test_sampling_matrices_are_the_padded_inverse() -> None:
    """Of rotations, and of poses that hold an anisotropic magnification."""
    magnification = torch.tensor([[1.04, 0.02, 0], [-0.01, 0.95, 0], [0, 0, 1.0]], dtype=torch.float64)
    assert torch.allclose(v.sampling_matrices(POSES, 2.0), 2 * POSES.mT, atol=1e-14)
    magnified = magnification @ POSES
    assert torch.allclose(v.sampling_matrices(magnified, 1.5), 1.5 * torch.linalg.inv(magnified), atol=1e-13)
    assert v.sampling_matrices(magnified.float(), 1.5).dtype == torch.float64
