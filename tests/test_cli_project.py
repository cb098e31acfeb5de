"""verglas project: against the slice of a Gaussian, and against relion_project on real maps and random poses.

Letters at the end of a name are its axes: B particles, Y X image, Z Y X volume.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro

from verglas.cli.project import Project
from verglas.core.rotations import euler_from_matrix, matrix_from_euler, random_rotations
from verglas.errors import InputError, VerglasError
from verglas.io.mrc import Map, Stack, read_map, write_map
from verglas.io.star import StarBlock, write_star
from verglas.particles.table import ParticleTable


def project(out: Path, *words: object) -> Path:
    """Run the command as the command line does, on the CPU."""
    arguments = ["--out", str(out), "--device", "cpu", *map(str, words)]
    tyro.cli(Project, args=arguments, config=(tyro.conf.OmitArgPrefixes,)).run()
    return out


def particle_file(path: Path, n: int, box: int, pixel_size: float, shift: float = 0.0, **optics: object) -> Path:
    """A STAR file with random poses, origins of `shift` Å along each axis, and astigmatic defoci; nothing else."""
    generator = np.random.default_rng(4)
    angles_B3 = euler_from_matrix(random_rotations(n, torch.Generator().manual_seed(7))).numpy()
    origin_B2 = generator.normal(0, 1, (n, 2)) * shift
    defocus_B = generator.uniform(8000, 25000, n)
    particles = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@absent.mrcs" for i in range(n)], "rlnOpticsGroup": 1,
        "rlnAngleRot": angles_B3[:, 0], "rlnAngleTilt": angles_B3[:, 1], "rlnAnglePsi": angles_B3[:, 2],
        "rlnOriginXAngst": origin_B2[:, 0], "rlnOriginYAngst": origin_B2[:, 1], "rlnDefocusU": defocus_B + 600,
        "rlnDefocusV": defocus_B - 600, "rlnDefocusAngle": generator.uniform(0, 180, n),
    })  # fmt: skip
    columns = {
        "rlnOpticsGroupName": "one", "rlnOpticsGroup": 1, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7,
        "rlnAmplitudeContrast": 0.1, "rlnImagePixelSize": pixel_size, "rlnImageSize": box, "rlnImageDimensionality": 2,
    }  # fmt: skip
    blocks = {"optics": pd.DataFrame([columns | optics]), "particles": particles}
    write_star(path, {name: StarBlock.table(name, frame) for name, frame in blocks.items()}, version=30001)
    return path


def gaussian_map(path: Path, box: int = 48, pixel_size: float = 2.0) -> Path:
    """A Gaussian of sigma 5 Å at (8, -6, 12) Å."""
    axis = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel_size
    r2_ZYX = (axis[:, None, None] - 12) ** 2 + (axis[None, :, None] + 6) ** 2 + (axis[None, None, :] - 8) ** 2
    write_map(path, Map(torch.exp(-r2_ZYX / 50).float().numpy(), pixel_size))
    return path


def gaussian_images(table: ParticleTable, box: int, pixel_size: float, map_pixel_size: float = 2.0) -> np.ndarray:
    """Its projections: a Gaussian at A c - origin, of height sqrt(2 pi) sigma / voxel."""
    place_B3 = table.rotations() @ torch.tensor([8.0, -6.0, 12.0], dtype=torch.float64)
    axis = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel_size
    centre_B2 = place_B3[:, :2] - table.origins()
    r2_BYX = (axis[None, None, :] - centre_B2[:, 0, None, None]) ** 2 + (axis[None, :, None] - centre_B2[:, 1, None, None]) ** 2
    return (np.sqrt(2 * np.pi) * 5 / map_pixel_size * torch.exp(-r2_BYX / 50)).numpy()


def images(folder: Path, name: str = "projections.mrcs") -> np.ndarray:
    stack = Stack.open(folder / name)
    return stack.read(slice(0, stack.n))


def correlation_B(a_BYX: np.ndarray, b_BYX: np.ndarray) -> np.ndarray:
    a, b = (image_BYX.reshape(len(image_BYX), -1).astype(np.float64) for image_BYX in (a_BYX, b_BYX))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize(("box", "pixel_size"), [(48, 2.0), (64, 1.5), (40, 3.0), (32, 3.0)])
def test_projections_of_a_gaussian(tmp_path, box, pixel_size):
    """Place, sign of the origin and grey values, on the map's own grid and on finer, wider and narrower ones."""
    star = particle_file(tmp_path / "poses.star", 12, box, pixel_size, shift=4.0)
    out = project(tmp_path / "out", "--map", gaussian_map(tmp_path / "map.mrc"), "--particles", star)
    table = ParticleTable.read(out / "projections.star")
    expected_BYX = gaussian_images(table, box, pixel_size)
    # Trilinear interpolation of a blob 16 Å off the centre of a map of 96 Å costs about one per cent.
    assert np.abs(images(out) - expected_BYX).max() < 0.02 * expected_BYX.max()


def test_the_star_names_the_new_images(tmp_path):
    star = particle_file(tmp_path / "poses.star", 5, 48, 2.0)
    words = ("--map", gaussian_map(tmp_path / "map.mrc"), "--particles", star, "--box", 32, "--pixel", 3, "--float16")
    out = project(tmp_path / "out", *words)
    table = ParticleTable.read(out / "projections.star")
    assert list(table.frame["rlnImageName"]) == [f"{i:06d}@projections.mrcs" for i in range(1, 6)]
    assert (table.groups[0].box, table.groups[0].pixel_size) == (32, 3.0)
    assert table.image_locations() is not None and table.folder == out
    assert Stack.open(out / "projections.mrcs").mode == 12
    assert (out / "report.html").is_file()


def test_magnification_samples_the_map_elsewhere(tmp_path):
    """A magnification matrix of 1.1 on frequencies samples the map at 1.1 s: the image is 1.1 times larger."""
    star = particle_file(tmp_path / "poses.star", 6, 48, 2.0, rlnMagMat00=1.1, rlnMagMat01=0.0, rlnMagMat10=0.0, rlnMagMat11=1.1)
    out = project(tmp_path / "out", "--map", gaussian_map(tmp_path / "map.mrc"), "--particles", star)
    table = ParticleTable.read(out / "projections.star")
    expected_BYX = gaussian_images(table, 48, 2.0 / 1.1)  # the same image on pixels that cover less
    assert float(correlation_B(images(out), expected_BYX).min()) > 0.999


def test_white_noise_is_added(tmp_path):
    star = particle_file(tmp_path / "poses.star", 40, 48, 2.0)
    words = ("--map", gaussian_map(tmp_path / "map.mrc"), "--particles", star)
    clean_BYX = images(project(tmp_path / "clean", *words))
    noisy_BYX = images(project(tmp_path / "noisy", *words, "--white-noise", 3.0))
    assert (noisy_BYX - clean_BYX).std() == pytest.approx(3.0, rel=0.01)


def test_bad_input_leaves_nothing_behind(tmp_path):
    map_path = gaussian_map(tmp_path / "map.mrc")
    star = particle_file(tmp_path / "poses.star", 3, 48, 2.0)
    table = ParticleTable.read(star)
    replace(table, frame=table.frame[["rlnImageName", "rlnOpticsGroup"]]).write(tmp_path / "no_poses.star")
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, said in (
        (("--map", map_path, "--particles", tmp_path / "no_poses.star"), "rlnAngleRot"),
        (("--map", tmp_path / "absent.mrc", "--particles", star), "absent.mrc"),
        (("--map", map_path, "--particles", star, "--box", 33), "33 px"),
        (("--map", map_path, "--particles", star, "--pixel", -1), "--pixel"),
        (("--map", map_path, "--particles", star, "--white-noise", -1), "--white-noise"),
    ):
        with pytest.raises((InputError, VerglasError), match=said):
            project(tmp_path / "out", *words)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.interop
@pytest.mark.parametrize(
    ("name", "shift"),
    [("relion_tests_ref_model_betagal_10017.mrc", 0.0), ("EMD-1997_GroEL.map", 6.0), ("5a1a_64px_3.54A.mrc", 9.0)],
)
def test_images_of_relion_project(shared, tmp_path, name, shift):
    """200 random poses with astigmatic CTFs (and shifts): every image correlates with RELION's to 0.9999 at least."""
    if shutil.which("relion_project") is None:
        pytest.skip("relion_project is not installed")
    source = read_map(shared / "data" / "maps" / name)
    write_map(tmp_path / "map.mrc", source)
    star = particle_file(tmp_path / "poses.star", 200, source.box, source.pixel_size, shift)
    words = ["--i", "map.mrc", "--o", "theirs", "--ang", "poses.star", "--ctf", "--angpix", f"{source.pixel_size:.6f}"]
    subprocess.run(["relion_project", *words], cwd=tmp_path, check=True, capture_output=True)
    ours_BYX = images(project(tmp_path / "ours", "--map", tmp_path / "map.mrc", "--particles", star, "--ctf"))
    theirs_BYX = images(tmp_path, "theirs.mrcs")
    assert ours_BYX.shape == theirs_BYX.shape == (200, source.box, source.box)
    correlations_B = correlation_B(ours_BYX, theirs_BYX)
    print(f"{name}: lowest correlation {correlations_B.min():.7f}, mean {correlations_B.mean():.7f}")
    assert correlations_B.min() >= 0.9999
    assert np.linalg.norm(ours_BYX) == pytest.approx(np.linalg.norm(theirs_BYX), rel=1e-3)


def test_matrices_of_the_test_file(tmp_path):
    """The angles written are those of the rotations drawn."""
    table = ParticleTable.read(particle_file(tmp_path / "poses.star", 5, 48, 2.0))
    expected_B33 = random_rotations(5, torch.Generator().manual_seed(7))
    assert torch.allclose(table.rotations(), matrix_from_euler(*euler_from_matrix(expected_B33).unbind(1)), atol=1e-9)
