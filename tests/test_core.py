"""core: transforms, pixel lists, rotations, the row table, masks and shells, against numpy and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from verglas.core import fourier, masks, rotations, rows, shells
from verglas.core.ordering import morton_order


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred_fft(image: np.ndarray) -> np.ndarray:
    """The whole transform about the centre pixel, frequencies in FFT order, forward 1/n: by rolling, not by signs."""
    return np.fft.fftn(np.fft.ifftshift(image), norm="forward")


# Transforms


def test_a_point_by_hand() -> None:
    image = torch.zeros(2, 8, 8, dtype=torch.float64)
    image[0, 4, 4] = image[1, 4, 5] = 64
    at_centre, beside = fourier.centred_rfft2(image)
    assert torch.allclose(at_centre, torch.ones_like(at_centre))
    assert torch.allclose(beside[0, 1], torch.tensor(math.sqrt(0.5) * (1 - 1j), dtype=torch.complex128))


@pytest.mark.parametrize("box", [2, 6, 8])
def test_transforms_are_about_the_centre(box: int) -> None:
    image, volume = noise(3, box, box), noise(box, box, box)
    expected = np.stack([centred_fft(one)[:, : box // 2 + 1] for one in image.numpy()])
    assert np.allclose(fourier.centred_rfft2(image).numpy(), expected, atol=1e-14)
    assert np.allclose(fourier.centred_rfft3(volume).numpy(), centred_fft(volume.numpy())[..., : box // 2 + 1], atol=1e-14)


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_transforms_there_and_back(dtype: torch.dtype, error: float) -> None:
    image, volume = noise(2, 10, 10).to(dtype), noise(10, 10, 10).to(dtype)
    back2 = fourier.centred_irfft2(fourier.centred_rfft2(image), 10)
    back3 = fourier.centred_irfft3(fourier.centred_rfft3(volume), 10)
    assert back2.dtype == back3.dtype == dtype
    assert (back2 - image).abs().max() < error and (back3 - volume).abs().max() < error


def test_white_noise_has_power_one_over_n_squared() -> None:
    power = fourier.centred_rfft2(noise(2000, 16, 16)).abs().square().mean()
    assert float(power) * 16**2 == pytest.approx(1, abs=0.01)


def test_signed_frequencies_count_nyquist_as_positive() -> None:
    assert fourier.signed_frequencies(8).tolist() == [0, 1, 2, 3, 4, -3, -2, -1]


# Pixel lists


@pytest.mark.parametrize("box, count", [(8, 25), (64, 1605), (128, 6427)])
def test_number_of_pixels(box: int, count: int) -> None:
    assert fourier.half_plane_pixels(box).count == count


@pytest.mark.parametrize("order", ["rows", "morton"])
@pytest.mark.parametrize("box, radius", [(2, None), (6, None), (12, 4), (12, 99)])
def test_pixels_by_brute_force(box: int, radius: int | None, order: str) -> None:
    pixels = fourier.half_plane_pixels(box, radius, order=order)
    limit = min(radius or box // 2, box // 2)
    expected = {}
    for row in range(box):
        for x in range(box // 2 + 1):
            y = row if row <= box // 2 else row - box
            if math.hypot(x, y) <= limit and not (x == 0 and y < 0):
                expected[x, y] = (row * (box // 2 + 1) + x, math.floor(math.hypot(x, y) + 0.5))
    found = list(zip(pixels.x_K.tolist(), pixels.y_K.tolist()))
    assert len(found) == len(set(found)) and pixels.radius == limit
    assert dict(zip(found, zip(pixels.index_K.tolist(), pixels.shell_K.tolist()))) == expected


def test_odd_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="even, got 7"):
        fourier.half_plane_pixels(7)


def test_coordinates_and_frequencies_of_pixels() -> None:
    pixels = fourier.half_plane_pixels(8)
    xy = torch.stack([pixels.x_K, pixels.y_K], 1).double()
    assert torch.equal(pixels.coordinates_K3(torch.float64), torch.cat([xy, torch.zeros(25, 1).double()], 1))
    assert torch.allclose(pixels.frequency_K2(2.5, torch.float64), xy / 20)


@pytest.mark.parametrize("radius", [None, 4])
def test_gather_and_scatter_are_a_low_pass(radius: int | None) -> None:
    """Cut out in the whole complex transform instead, where no coefficient has to be reconstructed from its partner."""
    box, image = 12, noise(3, 12, 12)
    pixels = fourier.half_plane_pixels(box, radius)
    values = pixels.gather(fourier.centred_rfft2(image))
    assert values.shape == (3, pixels.count)
    scattered = pixels.scatter(values)
    f = np.fft.fftfreq(box) * box
    inside = f[:, None] ** 2 + f[None, :] ** 2 <= (radius or 6) ** 2
    expected = np.stack([np.where(inside, centred_fft(one), 0) for one in image.numpy()])
    assert np.allclose(scattered.numpy(), expected[..., : box // 2 + 1], atol=1e-14)
    assert torch.equal(pixels.gather(scattered), values)
    low_passed = np.stack([np.fft.fftshift(np.fft.ifftn(one, norm="forward")).real for one in expected])
    assert np.allclose(fourier.centred_irfft2(scattered, box).numpy(), low_passed, atol=1e-13)


def test_morton_order_keeps_neighbours_together() -> None:
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(-8, 8), torch.arange(16), indexing="ij"))
    curve = morton_order(x, y)
    assert sorted(curve.tolist()) == list(range(256))
    for patch in curve.view(16, 16):  # every run of 16 pixels is a square of 4 x 4
        assert int(x[patch].max() - x[patch].min()) == int(y[patch].max() - y[patch].min()) == 3


@pytest.mark.parametrize("old, new", [(16, 10), (10, 16), (10, 10)])
def test_crop_resamples_a_wave_about_the_centre(old: int, new: int) -> None:
    def wave(box: int, *frequency: int) -> torch.Tensor:
        axes = [(torch.arange(box, dtype=torch.float64) - box // 2) / box] * len(frequency)
        phase = sum(f * g for f, g in zip(frequency, torch.meshgrid(*axes, indexing="ij")))
        return torch.cos(2 * math.pi * torch.as_tensor(phase) + 0.7)

    plane = fourier.crop_half_plane(fourier.centred_rfft2(wave(old, -3, 2)[None]), new)
    assert torch.allclose(fourier.centred_irfft2(plane, new)[0], wave(new, -3, 2), atol=1e-13)
    volume = fourier.crop_half_volume(fourier.centred_rfft3(wave(old, 4, -3, 2)), new)
    assert torch.allclose(fourier.centred_irfft3(volume, new), wave(new, 4, -3, 2), atol=1e-13)


# Rotations


def by_hand(rot: float, tilt: float, psi: float) -> np.ndarray:
    """Rz(psi) Ry(tilt) Rz(rot) of docs/conventions.md."""

    def rz(a: float) -> np.ndarray:
        return np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])

    a, b, c = np.deg2rad([rot, tilt, psi])
    ry = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    return rz(c) @ ry @ rz(a)


def test_matrices_by_hand() -> None:
    angles = torch.tensor([[0.0, 0, 90], [30, 90, 0], [-170, 12, 301]], dtype=torch.float64)
    matrices = rotations.matrix_from_euler(*angles.T)
    assert torch.allclose(matrices[0, 0], torch.tensor([0.0, 1, 0]).double(), atol=1e-15)
    assert torch.allclose(matrices[1, 2], torch.tensor([math.sqrt(0.75), 0.5, 0]).double(), atol=1e-15)
    for matrix, angle in zip(matrices, angles.tolist()):
        assert np.allclose(matrix.numpy(), by_hand(*angle), atol=1e-14)


angle = st.floats(-400, 400) | st.sampled_from([-180.0, -90.0, 0.0, 90.0, 180.0])
pole = st.sampled_from([0.0, 180.0, -180.0, 360.0, 1e-5, 180 - 1e-5])


@settings(max_examples=200, deadline=None)
@given(angle, st.floats(-400, 400) | pole, angle)
def test_euler_angles_there_and_back(rot: float, tilt: float, psi: float) -> None:
    matrix = rotations.matrix_from_euler(*torch.tensor([[rot], [tilt], [psi]], dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(3).double(), atol=1e-14) and torch.det(matrix) > 0
    found = rotations.euler_from_matrix(matrix)
    assert -180 <= found[0, 0] <= 180 and 0 <= found[0, 1] <= 180 and -180 <= found[0, 2] <= 180
    back = rotations.matrix_from_euler(*found.T)
    assert (back - matrix).abs().max() < 5e-6  # at a pole up to 2e-6 rad of tilt are dropped


def test_at_the_poles_rot_is_zero() -> None:
    matrix = rotations.matrix_from_euler(*torch.tensor([[40.0, 40.0], [0.0, 180.0], [25.0, 25.0]]).double())
    found = rotations.euler_from_matrix(matrix)
    assert torch.allclose(found, torch.tensor([[0.0, 0, 65], [0, 180, -15]]).double(), atol=1e-9)


def test_rotation_about_an_axis_by_hand() -> None:
    quarter = rotations.rotation_about_axis((0, 0, 2.5), 90)  # right-handed: x goes to y
    assert torch.allclose(quarter @ torch.tensor([1.0, 0, 0]).double(), torch.tensor([0.0, 1, 0]).double(), atol=1e-15)
    third = rotations.rotation_about_axis((1, 1, 1), 120)  # x to y to z
    assert torch.allclose(third, torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]).double(), atol=1e-15)


def test_quaternions_are_turns_about_axes() -> None:
    for axis, degrees in (((1.0, 2.0, -2.0), 77.0), ((0.0, -1.0, 0.3), 190.0)):
        half = math.radians(degrees) / 2
        unit = torch.tensor(axis, dtype=torch.float64) / math.sqrt(sum(v * v for v in axis))
        quaternion = 3.7 * torch.cat([torch.tensor([math.cos(half)]).double(), math.sin(half) * unit])
        expected = rotations.rotation_about_axis(axis, degrees)
        assert torch.allclose(rotations.matrix_from_quaternion(quaternion), expected, atol=1e-14)


def test_random_rotations_are_uniform() -> None:
    """Every matrix element is uniform on [-1, 1]; the angle from a fixed pose has density (1 - cos a) / pi."""
    matrix = rotations.random_rotations(20000, torch.Generator().manual_seed(1))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(3).double().expand_as(matrix), atol=1e-13)
    for element in matrix.flatten(1).T.numpy():
        assert stats.kstest(element, stats.uniform(-1, 2).cdf).pvalue > 1e-4
    fixed = rotations.rotation_about_axis((1, 0, 2), 50).expand_as(matrix)
    turned = np.deg2rad(rotations.angular_distance(matrix, fixed).numpy())
    assert stats.kstest(turned, lambda a: (a - np.sin(a)) / np.pi).pvalue > 1e-4


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 3e-3, 30.0, 179.999, 180.0])
def test_angular_distance(degrees: float) -> None:
    pose = rotations.random_rotations(1, torch.Generator().manual_seed(2))
    turned = pose @ rotations.rotation_about_axis((1, -2, 0.5), degrees)
    assert float(rotations.angular_distance(pose, turned)) == pytest.approx(degrees, rel=1e-6, abs=1e-9)


# Row table


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**31))
def test_packed_rows_hold_the_eight_corners_of_every_sample(radius: int, seed: int) -> None:
    table = rows.packed_sphere(radius)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    length = math.sqrt(table.limit2) * torch.rand(300, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
    length[:100] = math.sqrt(table.limit2)  # many at the very edge
    position = direction / direction.norm(dim=1, keepdim=True) * length
    position = torch.cat([position, position.round().clamp(-radius, radius)])
    position = position[position.square().sum(1) <= table.limit2]
    position = position * torch.where(position[:, :1] < 0, -1.0, 1.0)
    x, y, z = position.floor().long().T
    for dz in (0, 1):
        for dy in (0, 1):
            assert int((z + dz).abs().max()) <= table.half and int((y + dy).abs().max()) <= table.half
            held = table.length_ZY[z + dz + table.half, y + dy + table.half]
            assert (x + 1 < held).all()


@pytest.mark.parametrize("radius", [1.0, 5.0, 32.0])
def test_packed_rows_lie_one_after_the_other(radius: float) -> None:
    table = rows.packed_sphere(radius)
    ends = (table.start_ZY + table.length_ZY).flatten()
    assert table.start_ZY[0, 0] == 0 and torch.equal(ends[:-1], table.start_ZY.flatten()[1:]) and int(ends[-1]) == table.count
    x, y, z = table.coordinates_V3().long().T
    assert torch.equal(table.start_ZY[z + table.half, y + table.half] + x, torch.arange(table.count))
    assert (x < table.length_ZY[z + table.half, y + table.half]).all()
    starts = table.slab_starts_Z()
    assert len(starts) == table.edge + 1 and starts[-1] == table.count
    assert torch.equal(starts[:-1], table.start_ZY[:, 0].long())
    assert torch.equal(z, torch.repeat_interleave(torch.arange(table.edge), starts.diff()) - table.half)


def test_a_packed_sphere_takes_about_half_of_the_cube() -> None:
    packed, dense = rows.packed_sphere(64), rows.dense_half(64)
    assert dense.count == 131**2 * 66 and dense.limit2 == packed.limit2
    assert (dense.start_ZY.flatten() == torch.arange(131**2) * 66).all()
    assert math.pi / 6 < packed.count / dense.count < 0.56


# Masks


def test_raised_cosine_by_hand() -> None:
    at = torch.tensor([0.0, 4, 5, 6, 7, 9])
    assert masks.raised_cosine(at, 4, 3).tolist() == pytest.approx([1, 1, 0.75, 0.25, 0, 0], abs=1e-6)
    assert masks.raised_cosine(at, 5, 0).tolist() == [1, 1, 1, 0, 0, 0]


def test_soft_sphere_and_circle_lie_about_the_centre() -> None:
    sphere, circle = masks.soft_sphere(12, 3, 2), masks.soft_circle(12, 3, 2)
    assert sphere.shape == (12, 12, 12) and torch.allclose(sphere[6], circle) and torch.allclose(sphere[:, :, 6], circle)
    line = circle[6]
    assert line[3:10].tolist() == [1] * 7 and line.tolist() == pytest.approx([0, 0, 0.5, *[1] * 7, 0.5, 0], abs=1e-6)
    assert masks.radius_grid(12, 3)[6, 2, 9] == 5  # a triangle of sides 0, 4 and 3


def test_fill_outside_takes_the_background_mean() -> None:
    mask = masks.soft_circle(16, 4, 2)
    image = 5.0 + noise(2, 16, 16)
    expected = []
    for one in image:
        mean = np.average(one.numpy(), weights=1 - mask.numpy())
        expected.append(one.numpy() * mask.numpy() + mean * (1 - mask.numpy()))
    assert np.allclose(masks.fill_outside(image, mask).numpy(), np.stack(expected), atol=1e-6)
    assert masks.fill_outside(image, mask)[0, 0, 0] == pytest.approx(np.average(image[0], weights=1 - mask), abs=1e-6)


def test_low_pass_filter_by_hand() -> None:
    at = torch.tensor([3.0, 9, 10, 10.5, 11, 20])
    expected = [1, 1, 0.5, 0.5 + 0.5 * math.cos(0.75 * math.pi), 0, 0]
    assert masks.low_pass_filter(at, 10).tolist() == pytest.approx(expected, abs=1e-6)


# Shells


def test_shells_of_a_half_volume() -> None:
    f = fourier.signed_frequencies(6).tolist()
    found = fourier.shells_of_half_volume(6)
    for z in range(6):
        for y in range(6):
            for x in range(4):
                assert found[z, y, x] == math.floor(math.sqrt(f[z] ** 2 + f[y] ** 2 + x * x) + 0.5)


@pytest.mark.parametrize("box", [2, 8])
def test_friedel_weights_by_parseval(box: int) -> None:
    volume = noise(box, box, box)
    power = fourier.centred_rfft3(volume).abs().square()
    assert float((power * shells.friedel_weight_X(box)).sum()) == pytest.approx(float(volume.square().mean()), rel=1e-12)


def test_shell_sums_and_fsc_are_those_of_the_whole_transform() -> None:
    box = 10
    a, b = noise(box, box, box), noise(box, box, box, seed=1)
    b += 0.5 * a
    whole_a, whole_b = centred_fft(a.numpy()), centred_fft(b.numpy())
    f = np.fft.fftfreq(box) * box
    shell = np.floor(np.sqrt(f[:, None, None] ** 2 + f[:, None] ** 2 + f**2) + 0.5).astype(int).ravel()

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell, values.ravel())[: box // 2 + 1]

    power_a, power_b = total(abs(whole_a) ** 2), total(abs(whole_b) ** 2)
    found = shells.shell_sum(fourier.centred_rfft3(a).abs().square(), box)
    assert np.allclose(found.numpy(), power_a, rtol=1e-12)
    expected = total((whole_a * whole_b.conj()).real) / np.sqrt(power_a * power_b)
    assert np.allclose(shells.fsc(a, b).numpy(), expected, rtol=1e-10)


def test_fsc_of_identical_opposite_scaled_and_empty_maps() -> None:
    a = noise(12, 12, 12)
    ones = torch.ones(7, dtype=torch.float64)
    assert torch.allclose(shells.fsc(a, 3 * a), ones) and torch.allclose(shells.fsc(a, -a), -ones)
    assert torch.equal(shells.fsc(a, torch.zeros_like(a)), 0 * ones)


def test_fsc_of_independent_maps_scatters_as_one_over_the_root_of_the_shell() -> None:
    """Half of a shell's n coefficients are independent: the variance of the FSC is 1 / (n / 2) / 2 = 1 / n."""
    box, n_pairs = 16, 60
    pairs = noise(n_pairs, 2, box, box, box)
    curves = torch.stack([shells.fsc(a, b) for a, b in pairs])
    n_S = shells.shell_sum(torch.ones(box, box, box // 2 + 1), box)
    z = (curves * n_S.sqrt())[:, 2:]
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())
    assert float(z.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / z.numel()))


@pytest.mark.parametrize(
    ("curve", "shell"),
    [
        ([1, 0.9, 0.5, 0.2, 0.1, 0.3], 3),
        ([0, 0.9, 0.5, 0.143, 0.142, 0], 3),
        ([1, 0.1, 0.9, 0, 0, 0], 0),
        ([0.1, 1, 1, 1, 1, 1], 5),
    ],
)
def test_resolution_is_read_where_the_curve_first_drops(curve: list[float], shell: int) -> None:
    fsc_S = torch.tensor(curve, dtype=torch.float64)
    assert shells.last_shell_above(fsc_S, 0.143) == shell
    assert shells.resolution_angstrom(fsc_S, 10, 2.0) == 20 / max(shell, 1)


def test_resolution_at_another_threshold() -> None:
    assert shells.resolution_angstrom(torch.tensor([1, 0.9, 0.5, 0.49, 0.3]), 8, 1.5, threshold=0.5) == 6.0


def test_nested_pixels_fill_rows_with_the_origin() -> None:
    pixels = fourier.half_plane_pixels(20)
    exact, count, all_real = fourier.nested_pixels(pixels, 5.0)
    assert exact.count == pixels.count and count == int((pixels.x_K**2 + pixels.y_K**2 <= 25).sum()) and bool(all_real.all())
    assert bool((exact.x_K[:count] ** 2 + exact.y_K[:count] ** 2 <= 25).all())
    nested, inner, real_K = fourier.nested_pixels(pixels, 5.0, 16)
    assert nested.count % 16 == 0 and inner % 16 == 0 and int(real_K[:inner].sum()) == count
    assert torch.equal(nested.index_K[real_K], exact.index_K)
    assert bool((nested.x_K[~real_K] == 0).all() and (nested.y_K[~real_K] == 0).all())
