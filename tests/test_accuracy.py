"""Expected accuracy: against a loop over particles and errors, against closed forms, and against RELION itself."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from blobs import Blobs
from verglas.core.fourier import PixelList, half_plane_pixels
from verglas.core.rotations import euler_from_matrix, matrix_from_euler
from verglas.expectation.accuracy import (
    ANGLE_STEPS,
    OFFSET_STEPS,
    THRESHOLD,
    angle_errors,
    error_table,
    expected_accuracy,
    offset_errors,
)  # fmt: skip
from verglas.io.mrc import read_map
from verglas.io.star import read_star
from verglas.optics.ctf import ctf_BK
from verglas.particles.loader import ImageLoader
from verglas.particles.table import ParticleTable
from verglas.projection.volume import FourierVolume

BOX = 32


def volume() -> FourierVolume:
    return FourierVolume.from_map(Blobs.random(12, 9.0, 2.0).map(BOX, 1.0), dtype=torch.float64)


def poses(n: int, seed: int = 3) -> torch.Tensor:
    random = np.random.default_rng(seed)
    angles = np.stack(
        [random.uniform(-180, 180, n), np.degrees(np.arccos(random.uniform(-1, 1, n))), random.uniform(-180, 180, n)]
    )
    return matrix_from_euler(*torch.from_numpy(angles))


def weights(n: int, pixels: PixelList, level: float) -> torch.Tensor:
    """Made-up C^2 / sigma^2 that differ from particle to particle, 0 at the origin."""
    ripple_BK = 0.5 + 0.5 * torch.cos(pixels.shell_K * (0.3 + 0.1 * torch.arange(n)[:, None]))
    return level * ripple_BK.double() * (pixels.shell_K > 0)


def first_error_by_loop(table: list[float], total) -> float:
    """The first error of a table whose sum crosses; the last entry is not tried."""
    return next((error for error in table[:-1] if total(error) > THRESHOLD), table[-1])


@pytest.mark.parametrize("level", [1.0, 30.0, 1e3, 1e5])
def test_equals_a_loop_over_particles_and_errors(level):
    n, pixels, reference = 6, half_plane_pixels(BOX), volume()
    rotation_B33, weight_BK = poses(n), weights(n, pixels, level)
    angle_axis, offset_axis = torch.arange(n) % 3, torch.arange(n) % 2
    found = angle_errors(lambda a: reference.slices(a, pixels), rotation_B33, weight_BK, angle_axis)
    slices_B2K = reference.slices(rotation_B33, pixels)
    shifted = offset_errors(slices_B2K, weight_BK, pixels, offset_axis)
    for i in range(n):
        one = torch.complex(*slices_B2K[i])

        def sum_of(other: torch.Tensor, i: int = i, one: torch.Tensor = one) -> float:
            return float((weight_BK[i] * (one - other).abs() ** 2).sum() / 2)

        def turned(error: float, i: int = i) -> torch.Tensor:
            angles = euler_from_matrix(rotation_B33[i : i + 1])
            angles[0, i % 3] += error
            return torch.complex(*reference.slices(matrix_from_euler(*angles.T), pixels)[0])

        def moved(error: float, i: int = i, one: torch.Tensor = one) -> torch.Tensor:
            phase = 2 * math.pi * error * (pixels.x_K, pixels.y_K)[i % 2].double() / BOX
            return one * torch.polar(torch.ones_like(phase), phase)

        assert float(found[i]) == first_error_by_loop(error_table(ANGLE_STEPS), lambda e: sum_of(turned(e)))
        assert float(shifted[i]) == first_error_by_loop(error_table(OFFSET_STEPS), lambda e: sum_of(moved(e)))


def test_tables_grow_as_told_and_end_beyond_the_bound():
    angles, offsets = error_table(ANGLE_STEPS), error_table(OFFSET_STEPS)
    assert angles[:6] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.3, 0.4]) and 30 < angles[-1] < 36 and angles[-2] <= 30
    assert offsets[:3] == pytest.approx([0.1, 0.2, 0.3]) and 10 < offsets[-1] < 11.5 and offsets[-2] <= 10


def test_an_image_without_information_tells_nothing():
    pixels = half_plane_pixels(BOX)
    found = expected_accuracy(lambda a: volume().slices(a, pixels), poses(4), torch.zeros(4, pixels.count), pixels)
    assert found.angle == pytest.approx(error_table(ANGLE_STEPS)[-1]) and found.offset == pytest.approx(10.1)


def test_psi_of_a_round_particle_cannot_be_told_and_its_offset_can():
    """A single Gaussian in the centre: every projection is the same; for its offset the sum is known in closed form."""
    ball = FourierVolume.from_map(Blobs(torch.zeros(1, 3).double(), torch.ones(1).double(), 2.0).map(BOX, 1.0))
    pixels = half_plane_pixels(BOX)
    power_K = ball.slices(torch.eye(3)[None], pixels)[0].double().square().sum(0)
    weight_BK = weights(3, pixels, 1.0)
    # Scaled so that particle i crosses between 0.5 and 0.6 px along x.
    at_055 = (weight_BK * power_K * (1 - torch.cos(2 * math.pi * 0.55 * pixels.x_K / BOX))).sum(1)
    weight_BK *= THRESHOLD / at_055[:, None]
    offset_B = offset_errors(ball.slices(poses(3), pixels), weight_BK, pixels, torch.zeros(3, dtype=torch.long))
    assert offset_B.tolist() == pytest.approx([0.6] * 3)
    angle_B = angle_errors(lambda a: ball.slices(a, pixels), poses(3), weight_BK, torch.tensor([0, 1, 2]))
    assert (angle_B > 30).all()


def test_more_signal_is_never_less_accurate_and_seeds_repeat():
    n, pixels, reference = 120, half_plane_pixels(BOX, 10), volume()
    rotation_B33 = poses(n)

    def at(level: float, seed: int = 1):
        return expected_accuracy(lambda a: reference.slices(a, pixels), rotation_B33, weights(n, pixels, level), pixels, seed)

    weak, strong = at(100.0), at(400.0)
    assert len(weak.angle_B) == 100  # no more are looked at
    assert (strong.angle_B <= weak.angle_B).all() and (strong.offset_B <= weak.offset_B).all()
    # The sum grows with the square of small errors: four times the weight, half the error (tables are coarse: 20 %).
    assert strong.angle / weak.angle == pytest.approx(0.5, rel=0.2)
    assert torch.equal(at(100.0).angle_B, weak.angle_B) and not torch.equal(at(100.0, 2).angle_B, weak.angle_B)


@pytest.mark.interop
def test_real_particles_as_in_relion(shared: Path, tmp_path: Path):
    """One iteration of relion_refine estimates both accuracies at the poses of its input, before anything else."""
    if shutil.which("relion_refine") is None:
        pytest.skip("relion_refine is not installed")
    folder = shared / "data" / "betagal_tutorial"
    table = ParticleTable.read(folder / "particles_1391_with_poses.star", folder=folder).select(slice(0, 100))
    loader = ImageLoader(table)
    image_BYX = torch.cat([batch.image_BYX for batch in loader])
    rows = np.concatenate([batch.index_B for batch in loader])
    with mrcfile.new(tmp_path / "p.mrcs") as file:
        file.set_data(image_BYX.numpy()[np.argsort(rows)])
        file.set_image_stack()
    table = table.with_columns(rlnImageName=[f"{i + 1:06d}@p.mrcs" for i in range(100)], rlnGroupName="all")
    table = replace(table, folder=tmp_path, optics_frame=table.optics_frame.drop(columns="rlnMtfFileName"))
    table.write(tmp_path / "p.star")
    reference = shared / "data" / "betagal_relion_refine" / "run_class001.mrc"
    command = (
        f"relion_refine --o ./run --i p.star --ref {reference} --iter 1 --perturb 0 --ini_high 15 --ctf --zero_mask --pad 2 "
        "--particle_diameter 200 --sym D2 --healpix_order 0 --offset_range 1 --offset_step 2 --flatten_solvent --random_seed 1"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    before, after = (read_star(tmp_path / f"run_it00{i}_model.star") for i in (0, 1))
    theirs = after["model_classes"].frame[["rlnAccuracyRotations", "rlnAccuracyTranslationsAngst"]].to_numpy(float)[0]
    size = int(after["model_general"].values["rlnCurrentImageSize"])
    sigma2_S = torch.from_numpy(before["model_group_1"].frame["rlnSigma2Noise"].to_numpy(float).copy())
    pixels = half_plane_pixels(64, size // 2)
    map_ZYX = torch.tensor(read_map(tmp_path / "run_it000_class001.mrc").data_ZYX)
    ours = FourierVolume.from_map(map_ZYX, size // 2)
    contrast_BK = ctf_BK(pixels.frequency_K2(3.54, torch.float64), table.ctf(), table.groups[0])
    weight_BK = contrast_BK**2 / sigma2_S[pixels.shell_K] * (pixels.shell_K > 0)
    found = [expected_accuracy(lambda a: ours.slices(a, pixels), table.rotations(), weight_BK, pixels, s) for s in range(20)]
    means = np.array([(one.angle, one.offset * 3.54) for one in found])
    # The same particles, map and noise, other random axes: the spread over seeds is what may differ.
    assert (np.abs(theirs - means.mean(0)) < 4 * means.std(0)).all(), (theirs, means.mean(0), means.std(0))
    assert (means.std(0) < 0.05 * means.mean(0)).all()
