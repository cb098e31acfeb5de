"""Preprocessing against per-image numpy definitions and facts that can be checked by eye."""

from __future__ import annotations

import math
import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import torch

from verglas.core.fourier import centred_rfft2, half_plane_pixels
from verglas.particles.preprocess import (
    normalise_background,
    resample,
    shift_whole_pixels,
    transform,
    whole_pixels,
)

DTYPES = [torch.float32, torch.float64]


def noisy(n: int, box: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, box, box))).to(dtype)


def normalise_by_hand(image: np.ndarray, radius: float, ramp: bool) -> np.ndarray:
    box = len(image)
    y, x = np.mgrid[:box, :box] - box // 2
    outside = x**2 + y**2 > radius**2
    columns = np.stack([np.ones_like(x), x, y], -1) if ramp else np.ones_like(x)[..., None]
    plane = columns @ np.linalg.lstsq(columns[outside].astype(float), image[outside], rcond=None)[0]
    flat = image - plane
    return flat / flat[outside].std()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ramp", [True, False])
@pytest.mark.parametrize("box", [8, 30])
def test_normalisation_is_the_definition(box, ramp, dtype):
    y, x = np.mgrid[:box, :box]
    data = 3 * noisy(4, box, dtype=dtype) + 50 + torch.from_numpy(0.7 * x - 1.3 * y).to(dtype)
    actual = normalise_background(data, 0.375 * box, ramp)
    for image, result in zip(data.double().numpy(), actual):
        expected = normalise_by_hand(image, 0.375 * box, ramp)
        assert np.abs(result.numpy() - expected).max() < (1e-9 if dtype == torch.float64 else 1e-4)
    assert actual.dtype == dtype


def test_normalised_background_does_not_see_the_particle():
    data = noisy(1, 32)
    bright = data.clone()
    bright[:, 12:20, 12:20] += 100
    change = normalise_background(bright, 12) - normalise_background(data, 12)
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[12:20, 12:20] = False
    assert change[0][outside].abs().max() < 1e-10


def test_flat_background_keeps_its_scale_and_a_too_large_radius_is_refused():
    data = torch.full((1, 16, 16), 5.0)
    data[0, 8, 8] = 7.0
    result = normalise_background(data, 6)
    assert result[0, 0, 0].abs() < 1e-5 and result[0, 8, 8] == pytest.approx(2.0, abs=1e-5)
    with pytest.raises(ValueError, match="radius"):
        normalise_background(data, 20)


def test_whole_pixels_round_halves_away_from_zero():
    origin = torch.tensor([[3.0, -3.0], [2.9, -2.9], [0.0, 7.1]], dtype=torch.float64)
    assert whole_pixels(origin, 2.0).tolist() == [[2, -2], [1, -1], [0, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -2), (-5, 4), (12, 0), (-40, 1)])
def test_shift_moves_content_by_plus_and_fills_with_zero(shift, dtype):
    data = noisy(2, 12, dtype=dtype)
    expected = np.zeros((12, 12))
    for y in range(12):
        for x in range(12):
            if 0 <= y - shift[1] < 12 and 0 <= x - shift[0] < 12:
                expected[y, x] = data[1, y - shift[1], x - shift[0]]
    moved = shift_whole_pixels(data, torch.tensor([[1, 1], shift]))
    assert np.array_equal(moved[1].numpy(), expected)


def test_shifting_by_the_origin_centres_the_particle():
    """A particle at -origin from the centre comes to the centre pixel N/2."""
    data = torch.zeros(1, 16, 16)
    data[0, 8 + 2, 8 - 3] = 1.0
    origin = torch.tensor([[3 * 1.5, -2 * 1.5]])
    assert shift_whole_pixels(data, whole_pixels(origin, 1.5))[0, 8, 8] == 1.0


@pytest.mark.parametrize("box, new", [(24, 16), (24, 24), (16, 24)])
def test_resampling_keeps_centre_and_grey_values_of_a_band_limited_image(box, new):
    def waves(n: int) -> torch.Tensor:
        t = (torch.arange(n, dtype=torch.float64) - n // 2) / n
        y, x = torch.meshgrid(t, t, indexing="ij")
        return 2 + torch.cos(2 * math.pi * (3 * x - 2 * y) + 0.3) + 0.5 * torch.sin(2 * math.pi * 5 * y)

    assert torch.allclose(resample(waves(box)[None], new)[0], waves(new), atol=1e-12)


def test_resampling_removes_what_the_new_grid_cannot_hold():
    t = torch.arange(24, dtype=torch.float64)
    too_fine = torch.cos(2 * math.pi * 10 * t / 24).expand(1, 24, 24)
    assert resample(too_fine, 16).abs().max() < 1e-12
    with pytest.raises(ValueError, match="even"):
        resample(too_fine, 15)


def test_transform_is_the_fourier_sum_about_the_centre():
    image = noisy(1, 8)
    t = np.arange(8) - 4
    for y, x in ((0, 0), (1, 2), (-3, 1)):
        wave = np.exp(-2j * np.pi * (y * t[:, None] + x * t[None, :]) / 8)
        assert abs((image[0].numpy() * wave).sum() / 64 - complex(transform(image)[0, y, x])) < 1e-12
        if max(abs(y), x) < 3:
            assert transform(image, 6)[0, y, x] == transform(image)[0, y, x]
    assert transform(image, 6).shape == (1, 6, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_same():
    data, shift = noisy(4, 24, dtype=torch.float64) + 5, torch.tensor([[0, 0], [3, -2], [-30, 0], [1, 1]])
    for work in (
        lambda x: normalise_background(x, 9),
        lambda x: shift_whole_pixels(x, shift),
        lambda x: resample(x, 16),
    ):
        on_gpu = work(data.cuda())
        assert on_gpu.is_cuda
        assert (on_gpu.cpu() - work(data)).abs().max() < 1e-10


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("relion_preprocess") is None, reason="relion_preprocess is not installed")
def test_normalising_and_rescaling_agree_with_relion(tmp_path):
    y, x = np.mgrid[:48, :48]
    data = 4 * noisy(5, 48, dtype=torch.float32) + torch.from_numpy(10 + 0.2 * x - 0.1 * y).float()
    with mrcfile.new(tmp_path / "s.mrcs") as file:
        file.set_data(data.numpy())
        file.set_image_stack()
    for options in ("--operate_out normalised.mrcs --norm --bg_radius 18", "--operate_out rescaled.mrcs --scale 32"):
        command = f"relion_preprocess --operate_on s.mrcs {options}"
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    normalised, rescaled = (torch.from_numpy(mrcfile.read(tmp_path / f"{name}.mrcs")) for name in ("normalised", "rescaled"))
    assert (normalise_background(data, 18) - normalised).abs().max() < 1e-5
    # On the last row and column of frequencies the two keep different members of a Friedel pair: compare inside.
    inside = half_plane_pixels(32, 15)
    difference = inside.gather(centred_rfft2(resample(data, 32) - rescaled))
    assert difference.abs().max() < 1e-5
