"""The point group of maps that are turned, shifted and noisy; poses that go along; the hand of maps and poses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from verglas.cli.main import main
from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import angular_distance, random_rotations
from verglas.core.sphere import even_directions
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import Map, read_map, write_map
from verglas.io.star import StarBlock, write_star
from verglas.particles.frames import mirrored_poses, turned_poses
from verglas.particles.table import ParticleTable
from verglas.postprocess import mapops
from verglas.postprocess.find_symmetry import aligned, find_symmetry
from verglas.postprocess.self_correlation import axis_scores, onto_z, prepare
from verglas.projection.volume import FourierVolume
from verglas.simulation.maps import truth_map
from verglas.simulation.model import AtomModel

BOX, PIXEL = 40, 5.0


def particle(group: str, seed: int = 0, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(map of random points repeated by a group, at any pose; that pose A [3, 3]; its centre (x, y, z) in Å)."""
    random = torch.Generator().manual_seed(seed)
    operations = symmetry_matrices(group)
    n = max(240 // len(operations), 12)
    unit = torch.randn(n, 3, generator=random, dtype=torch.float64)
    unit = unit / unit.norm(dim=1, keepdim=True) * (25 + 35 * torch.rand(n, 1, generator=random, dtype=torch.float64))
    pose = random_rotations(1, random)[0]
    centre = 20 * torch.rand(3, generator=random, dtype=torch.float64) - 10
    xyz = (operations @ unit.T).mT.reshape(-1, 3) @ pose.T + centre
    model = AtomModel(group, xyz, torch.ones(len(xyz), dtype=torch.float64), [])
    map_ZYX = truth_map(model, BOX, PIXEL, 800.0).double()
    map_ZYX += noise * map_ZYX.std() * torch.randn(map_ZYX.shape, generator=random, dtype=torch.float64)
    map_ZYX[..., 0] = 0  # x = -N/2 has no partner to be mirrored to
    return map_ZYX, pose, centre


def axes_error(found: torch.Tensor, pose: torch.Tensor, group: str) -> float:
    """How far, in degrees, the operations of a group in the found frame are from the standard ones."""
    operations, frame = symmetry_matrices(group), found @ pose
    return max(float(angular_distance((frame @ one @ frame.T).expand_as(operations), operations).min()) for one in operations)


@pytest.mark.parametrize("group, noise", [("C2", 1.0), ("C7", 1.0), ("D2", 0.0), ("D3", 1.0), ("T", 1.0), ("O", 0.0)])
def test_finds_the_group_its_axes_and_centre(group, noise):
    map_ZYX, pose, centre = particle(group, noise=noise)
    found = find_symmetry(map_ZYX, PIXEL)
    assert found.best.name == group and found.best.weakest > 0.8
    assert axes_error(found.best.rotation_33, pose, group) < 2
    off = pose.T @ (found.best.centre_3 - centre)
    assert (off[:2] if group[0] == "C" else off).norm() < 1  # along the axis of Cn nothing fixes the centre
    assert found.agreement_S[3:10].mean() > 0.5 > found.control_S[3:10].abs().mean()


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_claims_nothing_for_a_map_without_symmetry(noise):
    assert find_symmetry(particle("C1", noise=noise)[0], PIXEL).best.name == "C1"
    assert find_symmetry(torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(0)).double(), PIXEL).best.name == "C1"


def test_icosahedron_is_found_among_its_subgroups():
    map_ZYX, pose, _ = particle("I", noise=1.0)
    found = find_symmetry(map_ZYX, PIXEL, groups=["C2", "C3", "C5", "D5", "T", "O", "I"]).best
    assert found.name == "I" and found.weakest > 0.8 and axes_error(found.rotation_33, pose, "I2") < 2


def test_axis_score_is_the_mean_correlation_of_turned_copies():
    small = prepare(particle("C3")[0], PIXEL, 15.0)
    direction = even_directions(50, hemisphere=True)[[7]]
    score = float(axis_scores(small, direction, 3)[0, 1])
    # The same by turning the map, less what any turn leaves as it is: the mean over 24 turns.
    upright = mapops.rotate(small.map_ZYX.double(), onto_z(direction)[0], order=1)
    turn = [mapops.rotate(upright, symmetry_matrices("C24")[k], order=1) for k in range(24)]
    left = [one - torch.stack(turn).mean(0) for one in turn]
    mean = sum(float((left[0] * left[k]).sum()) for k in (8, 16)) / 2 / float(left[0].square().sum())
    assert score == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize("name, group", [("1oel_C7", "C7"), ("5a1a_D2", "D2"), ("6z6u_O", "O"), ("6wg6_C1", "C1")])
def test_real_models(shared: Path, name, group):
    model = np.load(shared / "data" / "models" / f"{name}.npz")
    xyz, weight = (torch.from_numpy(model[key]).double() for key in ("xyz", "w"))
    if group == "C1":  # the complex is a dimer, C2 to half an Å; one half of it, a ring of six unlike chains, has no symmetry
        xyz, weight = xyz[: len(xyz) // 2], weight[: len(xyz) // 2]
        xyz = xyz - xyz.mean(0)
    random = torch.Generator().manual_seed(1)
    xyz = xyz @ random_rotations(1, random)[0].T + torch.tensor([8.0, -5.0, 3.0])
    map_ZYX = truth_map(AtomModel(name, xyz, weight, []), 48, PIXEL, 1200.0).double()
    map_ZYX += 1.5 * map_ZYX.std() * torch.randn(map_ZYX.shape, generator=random, dtype=torch.float64)
    assert find_symmetry(map_ZYX, PIXEL).best.name == group


def table_of(pose_B33: torch.Tensor, origin_B2: torch.Tensor, folder: Path) -> Path:
    """A STAR file with poses; its images are never read."""
    from verglas.core.rotations import euler_from_matrix

    frame = pd.DataFrame(euler_from_matrix(pose_B33).numpy(), columns=["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"])
    frame = frame.assign(rlnOriginXAngst=origin_B2[:, 0].numpy(), rlnOriginYAngst=origin_B2[:, 1].numpy(), rlnOpticsGroup=1,
                         rlnImageName=[f"{i:06d}@a.mrcs" for i in range(1, len(frame) + 1)], rlnAngleTiltPrior=90.0)  # fmt: skip
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["a"], "rlnImagePixelSize": [PIXEL],
                           "rlnImageSize": [BOX], "rlnImageDimensionality": [2]})  # fmt: skip
    blocks = [StarBlock.table("optics", optics), StarBlock.table("particles", frame)]
    write_star(folder / "in.star", {block.name: block for block in blocks})
    return folder / "in.star"


def predicted(map_ZYX: torch.Tensor, table: ParticleTable) -> torch.Tensor:
    """Transforms of the images that a map and poses stand for, [B, 2, K]."""
    pixels = half_plane_pixels(BOX, 9)  # within the volume: rounding decides about samples on its edge
    slices = FourierVolume.from_map(map_ZYX, 10, dtype=torch.float64).slices(table.rotations(), pixels)
    phase = 2 * torch.pi * table.origins() @ pixels.frequency_K2(PIXEL, torch.float64).T
    shifted = torch.view_as_complex(slices.mT.contiguous()) * torch.exp(1j * phase)
    return torch.view_as_real(shifted)


def same_images(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


def test_poses_follow_a_map_that_is_turned_or_mirrored(tmp_path):
    map_ZYX, rotation, centre = particle("C3", seed=4)
    random = torch.Generator().manual_seed(2)
    table = ParticleTable.read(table_of(random_rotations(6, random), 5 * torch.randn(6, 2, generator=random).double(), tmp_path))
    before = predicted(map_ZYX, table)
    turned_ZYX = mapops.rotate(map_ZYX, rotation, -(rotation @ centre) / PIXEL)
    turned = turned_poses(table, rotation, centre)
    assert same_images(before, predicted(turned_ZYX, turned)) < 0.03 and "rlnAngleTiltPrior" not in turned.frame
    assert same_images(before, predicted(turned_ZYX, table)) > 0.5
    assert same_images(before, predicted(mapops.flip_hand(map_ZYX), mirrored_poses(table))) < 1e-6
    again = mirrored_poses(mirrored_poses(table))
    assert angular_distance(again.rotations(), table.rotations()).max() < 1e-5


def test_commands_write_maps_and_poses_that_fit(tmp_path):
    map_ZYX, _, _ = particle("D2", seed=3)
    write_map(tmp_path / "in.mrc", Map(map_ZYX.float().numpy(), PIXEL))
    random = torch.Generator().manual_seed(2)
    star = table_of(random_rotations(5, random), torch.zeros(5, 2, dtype=torch.float64), tmp_path)
    words = ["--particles", star, "--out"]
    upright, flipped = tmp_path / "upright", tmp_path / "flipped"
    assert main([str(a) for a in ("align-symmetry", "--map", tmp_path / "in.mrc", *words, upright)]) == 0
    assert json.loads((upright / "result.json").read_text())["figures"]["symmetry"]["value"] == "D2"
    assert main([str(a) for a in ("flip", "--maps", tmp_path / "in.mrc", *words, flipped)]) == 0
    before = predicted(map_ZYX, ParticleTable.read(star))
    for folder, name, close in ((upright, "aligned.mrc", 0.05), (upright, "symmetrised.mrc", 0.05), (flipped, "in.mrc", 1e-5)):
        moved = torch.tensor(read_map(folder / name).data_ZYX).double()
        assert same_images(before, predicted(moved, ParticleTable.read(folder / "in.star"))) < close
    assert {path.name for path in upright.iterdir()} >= {"candidates.csv", "report.html"}


def test_a_given_group_is_laid_on_the_map(tmp_path):
    map_ZYX, _, _ = particle("D3", seed=5)
    write_map(tmp_path / "in.mrc", Map(map_ZYX.float().numpy(), PIXEL))
    words = ["align-symmetry", "--map", str(tmp_path / "in.mrc"), "--sym", "C3", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    one = torch.tensor(read_map(tmp_path / "out" / "aligned.mrc").data_ZYX).double()
    even = mapops.symmetrise(one, symmetry_matrices("C3"))
    assert float((one - even).norm() / one.norm()) < 0.1
    assert aligned(map_ZYX, PIXEL, find_symmetry(map_ZYX, PIXEL, groups=["C3"]).best).shape == one.shape


@pytest.mark.parametrize(
    "words, said",
    [
        (["flip", "--out", "o"], "--maps"),
        (["flip", "--maps", "a/x.mrc", "b/x.mrc", "--out", "o"], "two maps of this name"),
        (["flip", "--maps", "x.txt", "--out", "o"], "the ending"),
        (["align-symmetry", "--map", "in.mrc", "--sym", "C1", "--out", "o"], "--sym"),
        (["align-symmetry", "--map", "in.mrc", "--sym", "C13", "--out", "o"], "12-fold"),
        (["align-symmetry", "--map", "in.mrc", "--resolution", "0", "--out", "o"], "--resolution"),
        (["align-symmetry", "--map", "flat.mrc", "--out", "o"], "one value"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write_map(tmp_path / "in.mrc", Map(particle("C1")[0].float().numpy(), PIXEL))
    write_map(tmp_path / "flat.mrc", Map(np.zeros((8, 8, 8), np.float32), PIXEL))
    assert main(words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()
