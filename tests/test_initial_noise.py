"""Initial noise spectra: against a loop over single images, known noise, mixed geometries, and RELION itself."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch

from verglas.errors import InputError
from verglas.expectation.initial_noise import first_rows, initial_noise, positive
from verglas.io.star import read_star
from verglas.optics.group import OpticsGroup
from verglas.particles.loader import ImageBatch, ImageLoader
from verglas.particles.table import ParticleTable


def group(number: int = 1, pixel_size: float = 2.0, box: int = 32) -> OpticsGroup:
    return OpticsGroup(f"g{number}", number, 300.0, 2.7, 0.1, pixel_size, box)


def batch(image_BYX: torch.Tensor, number: int = 1, pixel_size: float = 2.0, first: int = 0) -> ImageBatch:
    rows = np.arange(first, first + len(image_BYX))
    return ImageBatch(rows, image_BYX, group(number, pixel_size, image_BYX.shape[-1]), number - 1)


def white(n: int, box: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, box, box, generator=torch.Generator().manual_seed(seed))


def masked_by_loop(image: np.ndarray, radius: float, edge: float) -> np.ndarray:
    """One image blended pixel by pixel into the mean of its background."""
    box = len(image)
    outside = np.zeros_like(image)
    for y in range(box):
        for x in range(box):
            r = math.hypot(y - box // 2, x - box // 2)
            inside_edge = 0.5 + 0.5 * math.cos(math.pi * (radius + edge - r) / edge)
            outside[y, x] = 0.0 if r < radius else 1.0 if r > radius + edge else inside_edge
    return image * (1 - outside) + outside * (image * outside).sum() / outside.sum()


def radial_by_loop(image: np.ndarray) -> np.ndarray:
    """Mean power by round(r) over every entry of the half transform."""
    box = len(image)
    power = np.abs(np.fft.rfft2(image, norm="forward")) ** 2
    total, count = np.zeros(box // 2 + 1), np.zeros(box // 2 + 1)
    for i in range(box):
        for x in range(box // 2 + 1):
            shell = int(math.hypot(i if i <= box // 2 else i - box, x) + 0.5)
            if shell <= box // 2:
                total[shell] += power[i, x]
                count[shell] += 1
    return total / count


def test_equals_a_loop_over_single_images():
    image_BYX = white(9, 16) + torch.linspace(-1, 2, 16)
    masked = [masked_by_loop(image.double().numpy(), 10 / 2, 3.0) for image in image_BYX]
    expected = np.mean([radial_by_loop(image) for image in masked], 0) / 2 - radial_by_loop(np.mean(masked, 0)) / 2
    found = initial_noise([batch(image_BYX[:4]), batch(image_BYX[4:], first=4)], 1, 16, 2.0, 20.0, 3.0)
    assert (expected > 0).all()
    np.testing.assert_allclose(found.sigma2_noise_GS[0].numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(found.mean_image_YX.numpy(), np.mean(masked, 0), atol=1e-6)


def test_white_noise_has_half_its_variance_per_component():
    """Inside the mask alone is noise: a disc of share s of the area keeps s of the power (the soft edge a bit more)."""
    n, box = 400, 32
    found = initial_noise([batch(white(n, box))], 1, box, 2.0, 2.0 * box, 0.0).sigma2_noise_GS[0]
    kept = math.pi / 4 * (1 - 1 / n)  # the average of n images still holds 1/n of the power
    assert torch.allclose(found[3:], torch.full_like(found[3:], kept / (2 * box * box)), rtol=0.06)
    assert found[3:].mean().item() == pytest.approx(kept / (2 * box * box), rel=0.02)


def test_what_all_images_share_is_not_noise():
    noise_BYX = white(200, 32)
    signal_YX = 5 * torch.cos(2 * math.pi * 6 * torch.arange(32) / 32).expand(32, 32)
    plain = initial_noise([batch(noise_BYX)], 1, 32, 2.0, 40.0).sigma2_noise_GS
    both = initial_noise([batch(noise_BYX + signal_YX)], 1, 32, 2.0, 40.0).sigma2_noise_GS
    assert torch.allclose(plain, both, rtol=0.3)  # with the signal's power left in, shell 6 alone would be 50 times higher
    assert both[0, 6] < 1.1 * plain[0, 6]


def test_groups_of_other_geometry_are_given_by_the_models_shells():
    """A group of half the field: its shell i is the model's shell 2 i; its transforms count a quarter, their power 1/16."""
    small = white(300, 16, seed=1)
    found = initial_noise([batch(white(300, 32), 1), batch(small, 2)], 3, 32, 2.0, 20.0)
    alone = initial_noise([batch(small)], 1, 16, 2.0, 20.0).sigma2_noise_GS[0] / 16
    np.testing.assert_allclose(found.sigma2_noise_GS[1, ::2].numpy(), alone.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.sigma2_noise_GS[1, 1:-1:2].numpy(), ((alone[:-1] + alone[1:]) / 2).numpy(), rtol=1e-12)
    assert (found.sigma2_noise_GS[2] == 0).all()  # no images
    fine = initial_noise([batch(white(300, 64, seed=2), 1, pixel_size=1.0)], 1, 32, 2.0, 20.0)
    assert fine.sigma2_noise_GS.shape == (1, 17) and fine.mean_image_YX.shape == (32, 32)


def test_mean_image_of_mixed_groups_keeps_the_particle_in_the_centre():
    def blob(box: int, pixel_size: float) -> torch.Tensor:
        axis = (torch.arange(box) - box // 2) * pixel_size
        return torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 8.0**2))

    parts = [(32, 2.0), (48, 2.0), (64, 1.0)]
    batches = [batch(blob(box, p)[None] + 1e-3 * white(2, box), i + 1, p) for i, (box, p) in enumerate(parts)]
    found = initial_noise(batches, 3, 32, 2.0, 60.0).mean_image_YX
    assert torch.allclose(found, blob(32, 2.0).double(), atol=5e-3)


def test_values_not_above_zero_take_their_neighbour():
    spectrum = torch.tensor([-1.0, 0.0, 3.0, -2.0, -2.0, 5.0, 0.0], dtype=torch.float64)
    assert positive(spectrum).tolist() == [3, 3, 3, 3, 3, 5, 5]
    with pytest.raises(InputError, match="does not average out"):
        initial_noise([batch(white(1, 16).expand(3, -1, -1))], 1, 16, 2.0, 20.0)


def test_circle_larger_than_the_box_and_no_images_are_refused():
    with pytest.raises(InputError, match="at most 32 Å"):
        initial_noise([batch(white(2, 16))], 1, 16, 2.0, 33.0)
    with pytest.raises(InputError, match="no image"):
        initial_noise([], 1, 16, 2.0, 30.0)


def test_first_rows_of_each_group_by_micrograph(tmp_path):
    frame = pd.DataFrame({"rlnImageName": [f"{i + 1}@s.mrcs" for i in range(7)], "rlnOpticsGroup": [1, 2, 1, 1, 2, 1, 2],
                          "rlnMicrographName": ["b", "b", "a", "b", "c", "a", "a"]})  # fmt: skip
    optics = pd.DataFrame([{"rlnOpticsGroup": i, "rlnImagePixelSize": 1.0, "rlnImageSize": 8} for i in (1, 2)])
    table = ParticleTable(frame, optics, tmp_path, tmp_path / "p.star")
    assert first_rows(table, 3).tolist() == [2, 5, 0, 6, 1, 4]
    assert first_rows(replace(table, frame=frame.drop(columns="rlnMicrographName")), 2).tolist() == [0, 2, 1, 4]


@pytest.mark.interop
def test_real_particles_as_in_relion(shared: Path, tmp_path: Path):
    """relion_refine without an iteration writes its initial noise; it takes every image of the set."""
    if shutil.which("relion_refine") is None:
        pytest.skip("relion_refine is not installed")
    source = shared / "data" / "betagal_tutorial" / "particles_1391_with_poses.star"
    table = ParticleTable.read(source, folder=source.parent)
    data = np.concatenate([b.image_BYX.numpy() for b in ImageLoader(table.select(slice(0, 300)))])
    rows = np.concatenate([b.index_B for b in ImageLoader(table.select(slice(0, 300)))])
    with mrcfile.new(tmp_path / "p.mrcs") as file:
        file.set_data(data[np.argsort(rows)])
        file.set_image_stack()
    few = table.select(slice(0, 300)).with_columns(rlnImageName=[f"{i + 1:06d}@p.mrcs" for i in range(300)], rlnGroupName="all")
    few = replace(few, folder=tmp_path, optics_frame=few.optics_frame.drop(columns="rlnMtfFileName"))
    few.write(tmp_path / "p.star")
    reference = shared / "data" / "maps" / "5a1a_64px_3.54A.mrc"
    command = f"relion_refine --o ./run --i p.star --ref {reference} --iter 0 --ctf --zero_mask --particle_diameter 200"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    theirs = read_star(tmp_path / "run_it000_model.star")["model_group_1"].frame["rlnSigma2Noise"].to_numpy(float)
    ours = initial_noise(ImageLoader(few, first_rows(few)), 1, 64, 3.54, 200.0).sigma2_noise_GS[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
