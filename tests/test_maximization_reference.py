"""References of a refinement: other boxes and pixel sizes, filters, spectra, masks, symmetry; against closed forms.

Letters at the end of a name are its axes: S shells, Z Y X volume.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blobs import Blobs
from verglas.core.fourier import centred_rfft3, shells_of_half_volume
from verglas.core.symmetry import symmetry_matrices
from verglas.errors import InputError
from verglas.io.mrc import Map
from verglas.maximization import reference as ref
from verglas.projection.volume import FourierVolume

BOX, PIXEL = 32, 3.0
FIELD = BOX * PIXEL
BLOBS = Blobs.random(25, spread=28.0, sigma=3.0)
MAP = BLOBS.map(BOX, PIXEL)


def away_from_zero(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def as_map(values: torch.Tensor, pixel: float = PIXEL) -> Map:
    return Map(values.float().numpy(), pixel)


def test_low_pass_is_a_raised_cosine_about_the_unrounded_shell() -> None:
    noise = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gain = centred_rfft3(ref.low_pass(noise, 17.0, PIXEL)) / centred_rfft3(noise)
    axis = torch.fft.fftfreq(BOX, 1 / BOX).double()
    r = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[: BOX // 2 + 1].abs() ** 2).sqrt()
    middle = FIELD / 17.0  # 5.65 shells
    expected = torch.where(r < middle - 1, 1.0, 0.5 - 0.5 * torch.cos(math.pi * (middle + 1 - r) / 2))
    expected = torch.where(r > middle + 1, 0.0, expected)
    assert torch.allclose(gain.real, expected, atol=1e-6) and float(gain.imag.abs().max()) < 1e-6


@pytest.mark.parametrize(("box", "pixel"), [(48, PIXEL), (40, 2.5), (64, 2.0), (40, 3.217), (24, 4.3)])
def test_a_reference_of_another_grid_becomes_the_same_density(box: int, pixel: float) -> None:
    """Blobs in closed form, sampled on the other grid, against the same blobs on the particles' grid."""
    found, notices = ref.initial_reference(as_map(BLOBS.map(box, pixel), pixel), BOX, PIXEL, 14.0)
    expected = ref.low_pass(MAP, 14.0, PIXEL)
    assert found.dtype == torch.float32 and found.shape == (BOX,) * 3
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert any("resampled" in notice for notice in notices) == (pixel != PIXEL)
    assert any("cropped around its centre" in notice for notice in notices)


def test_a_reference_of_a_smaller_box_is_padded() -> None:
    found, notices = ref.initial_reference(as_map(MAP[4:28, 4:28, 4:28]), BOX, PIXEL, 3 * PIXEL)
    assert len(notices) == 1 and "24 px (72 Å); it was padded with 0 to the particles' 32 px (96 Å)" in notices[0]
    inner = slice(8, 24)
    expected = ref.low_pass(ref.window(MAP[4:28, 4:28, 4:28], BOX), 3 * PIXEL, PIXEL)
    assert torch.allclose(found[inner, inner, inner].double(), expected[inner, inner, inner], atol=1e-5 * float(MAP.max()))


def test_a_reference_that_fits_is_only_filtered() -> None:
    found, notices = ref.initial_reference(as_map(MAP), BOX, PIXEL * (1 + 1e-5), 20.0)
    assert notices == [] and torch.allclose(found, ref.low_pass(MAP, 20.0, PIXEL).float(), atol=1e-4 * float(MAP.max()))


def test_cropping_away_much_of_a_reference_is_told() -> None:
    away = torch.zeros(64, 64, 64)
    away[10:20, 28:36, 28:36] = 1
    away[30:34, 30:34, 30:34] = 1
    _, notices = ref.initial_reference(as_map(away), BOX, PIXEL, 20.0)
    assert "55 % of its power lay outside" in notices[0]


def test_resampling_by_a_ratio_of_boxes_is_cropping_the_transform() -> None:
    noise = torch.randn(36, 36, 36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    smooth = ref.low_pass(noise, 4.0, 1.0)  # shell 9 of 36
    found = ref.resample(smooth, 1.0, 24, 1.5)
    fourier, crop = centred_rfft3(smooth), centred_rfft3(found)
    assert torch.allclose(crop[:12, :12, :12], fourier[:12, :12, :12], atol=1e-12)
    back = ref.resample(found, 1.5, 36, 1.0)
    inside = slice(3, 33)  # the last voxels of the finer grid lie beyond the coarser one's
    assert torch.allclose(back[inside, inside, inside], smooth[inside, inside, inside], atol=1e-9)


@pytest.mark.parametrize(
    ("volume", "pixel", "resolution", "words"),
    [
        (torch.full((8, 8, 8), torch.nan), 3.0, 20.0, "512 voxels are not finite"),
        (torch.ones(8, 8, 8), 3.0, 20.0, "every voxel holds 1"),
        (MAP, 0.0, 20.0, "verglas map --pixel"),
        (MAP[:, :, :16], 3.0, 20.0, "16 x 32 x 32 voxels"),
        (MAP, 3.0, 200.0, "--initial-resolution: 200 Å"),
        (torch.nn.functional.pad(torch.ones(2, 2, 2), [0, 94] * 3), 3.0, 20.0, "nothing of it lies within"),
    ],
)
def test_references_that_cannot_be_meant_are_refused(volume: torch.Tensor, pixel: float, resolution: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ref.initial_reference(as_map(volume, pixel), BOX, 3.0, resolution)


def test_flattening_multiplies_by_a_sphere_or_a_mask() -> None:
    ones = torch.ones(BOX, BOX, BOX)
    found = ref.flatten(ones, 8.0, 4.0)
    line = found[BOX // 2, BOX // 2]
    assert torch.equal(line[16:25], torch.ones(9)) and float(line[26]) == pytest.approx(0.5) and not line[28:].any()
    mask = torch.rand(BOX, BOX, BOX)
    assert torch.equal(ref.flatten(2 * ones, 3.0, 1.0, mask), 2 * mask)


@pytest.mark.parametrize(("padding", "radius"), [(2.0, 16), (1.5, 9)])
def test_the_spectrum_of_a_reference_is_that_of_its_padded_transform(padding: float, radius: int) -> None:
    found = ref.reference_spectrum(MAP, padding, radius)
    volume = FourierVolume.from_map(MAP, radius, padding, dtype=torch.float64)
    total, count = np.zeros((2, BOX // 2 + 1))
    for (x, y, z), value in zip(volume.rows.coordinates_V3().tolist(), volume.values.numpy()):
        r = math.sqrt(x * x + y * y + z * z)
        if r <= away_from_zero(padding * radius):
            total[away_from_zero(r / volume.padding)] += (value**2).sum() / 2
            count[away_from_zero(r / volume.padding)] += 1
    assert np.allclose(found[: radius + 1], total[: radius + 1] / count[: radius + 1], rtol=1e-4)
    assert found.shape == (BOX // 2 + 1,) and not found[radius + 1 :].any()


def test_the_spectrum_has_the_units_of_projections() -> None:
    """A single voxel of 3 projects to a single pixel of 3, whose transform is 3 / N^2 everywhere."""
    point = torch.zeros(BOX, BOX, BOX)
    point[BOX // 2, BOX // 2, BOX // 2] = 3
    found = ref.reference_spectrum(point, 2.0, BOX // 2)
    assert torch.allclose(found, torch.full((BOX // 2 + 1,), 9 / BOX**4 / 2).double(), rtol=1e-5)


def test_initial_ssnr() -> None:
    noise = torch.stack([torch.full((BOX // 2 + 1,), 2e-3), torch.full((BOX // 2 + 1,), 4e-3), torch.zeros(BOX // 2 + 1)])
    tau2, ssnr = ref.initial_ssnr(MAP, noise, 500, tau2_fudge=2.0)
    shells = shells_of_half_volume(BOX)
    power = centred_rfft3(MAP).abs().square()[shells == 7].mean()
    assert float(tau2[7]) == pytest.approx(float(2.0 * BOX**2 * power / 2), rel=1e-6)
    assert float(ssnr[7]) == pytest.approx(500 / 3e-3 / 14 * float(tau2[7]), rel=1e-6)
    assert float(ssnr[0]) == pytest.approx(500 / 3e-3 * float(tau2[0]), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "pixel", "words"),
    [
        (torch.ones(16, 16, 16), PIXEL, "16 x 16 x 16 voxels; expected 32 x 32 x 32"),
        (torch.ones(BOX, BOX, BOX), 2.0, "voxels of 2 Å"),
        (MAP * 0 + 2, PIXEL, "values from 2 to 2"),
        (MAP * 0 - 1, PIXEL, "values from -1"),
        (MAP * 0 + torch.nan, PIXEL, "values from nan"),
        (MAP * 0, PIXEL, "empty"),
    ],
)
def test_masks_that_cannot_serve_are_refused(values: torch.Tensor, pixel: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ref.check_mask(as_map(values, pixel), BOX, PIXEL)


def test_a_mask_is_taken_as_it_is() -> None:
    mask = ref.flatten(torch.ones(BOX, BOX, BOX), 8.0, 3.0)
    assert torch.equal(ref.check_mask(as_map(mask), BOX, PIXEL), mask)
    assert float(ref.check_mask(as_map(mask * 1.0005), BOX, PIXEL).max()) == 1


@pytest.mark.parametrize("symmetry", ["C3", "D2", "T", "O", "I1"])
def test_a_map_with_the_symmetry_correlates_with_its_copies(symmetry: str) -> None:
    operators = symmetry_matrices(symmetry)
    centres = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 10
    axis = (torch.arange(BOX) - BOX // 2).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    grid = torch.stack([x, y, z], -1)
    whole = torch.zeros(BOX, BOX, BOX).double()
    for centre in (centres @ operators.transpose(1, 2)).reshape(-1, 3) * (9 / centres.norm(dim=1).max()):
        whole += torch.exp(-(grid - centre).square().sum(-1) / 8)
    assert ref.symmetry_correlation(whole, symmetry) > 0.97
    assert ref.symmetry_correlation(MAP, symmetry) < 0.7
    assert ref.symmetry_correlation(MAP, "C1") == 1.0
