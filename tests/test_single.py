"""One iteration of all particles together, here of images of two geometries: the second group has finer pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from verglas.cli.main import main
from verglas.core.shells import fsc
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig
from verglas.refinement.single import OneIteration, one_iteration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 D2 particles: 24 px of 6.67 Å and 32 px of 5 Å, noise of deviation 1 in both."""
    out = tmp_path_factory.mktemp("single") / "set"
    words = ["simulate", "--n", "80", "--box", "24", "32", "--pixel", "6.6666667", "5", "--sym", "D2", "--snr", "0.1", "--seed",
             "2", "--per-micrograph", "20", "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def done(folder: Path) -> OneIteration:
    config = RefineConfig(diameter=130.0, symmetry="D2", initial_resolution=40.0, healpix_order=1, absolute_greyscale=True)
    return one_iteration(ParticleTable.read(folder / "truth.star"), read_map(folder / "truth.mrc"), config)


def test_norm_counts_an_image_s_own_shells(folder: Path, done: OneIteration) -> None:
    """The noise of both groups has deviation 1, whatever the model's Nyquist frequency leaves out of the finer images."""
    group_B = torch.from_numpy(ParticleTable.read(folder / "truth.star").group_index_B)
    means = [float(done.poses.norm_B[group_B == group].mean()) for group in (0, 1)]
    assert means[1] / means[0] == pytest.approx(1.0, abs=0.05)  # 0.75 without the shells beyond
    assert 0.7 < means[0] < 0.9  # pi / 4 of the coefficients lie within the disc, and the mask leaves out some noise


def test_the_map_is_that_of_the_particles(folder: Path, done: OneIteration) -> None:
    """Alike at the resolutions that the search saw, on the grey scale of the reference; poses and sums of all particles."""
    truth = torch.from_numpy(read_map(folder / "truth.mrc").data_ZYX.copy())
    found = done.solve().map_ZYX
    curve_S = fsc(found, truth)
    print(curve_S)
    assert float(curve_S[1:4].min()) > 0.9
    assert 0.5 < float((found * truth).sum() / truth.square().sum()) < 1.5
    assert done.expectation.sums.particles == len(done.poses.norm_B) == 80
    assert done.model.average_pmax > 0.01 and done.plan.grid.healpix_order == 1
