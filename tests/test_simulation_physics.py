"""Simulated signals, noise and maps against formulas, and against an independent program.

Letters at the end of a name are its axes: B particles, N atoms, Y X image, Z Y X volume.
"""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.core.fourier import centred_irfft2, centred_rfft2, centred_rfft3, signed_frequencies
from verglas.core.rotations import matrix_from_euler, random_rotations
from verglas.io.mrc import Stack
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.particles.table import ParticleTable
from verglas.simulation.imaging import HalfPlane, Transfer
from verglas.simulation.maps import damped, dirichlet_matrix, low_pass_bfactor, resampled, truth_map
from verglas.simulation.model import AtomModel, MapModel, read_models
from verglas.simulation.noise import Junk, NoiseModel, WhiteNoise
from verglas.simulation.nufft import atom_map, atom_transforms, spread_transform
from verglas.simulation.signal import AtomSource

CPU = torch.device("cpu")
by_spreading = partial(spread_transform, implementation="reference")


def a_group(box: int = 32, pixel_size: float = 2.0, **changes: object) -> OpticsGroup:
    values = {"name": "g", "number": 1, "voltage_kv": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1}
    return OpticsGroup(**(values | {"pixel_size": pixel_size, "box": box} | changes))


def some_atoms(n: int = 50, spread: float = 12.0) -> AtomModel:
    generator = torch.Generator().manual_seed(5)
    xyz_N3 = (torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.5) * 2 * spread
    return AtomModel("some", xyz_N3, torch.rand(n, generator=generator, dtype=torch.float64) + 0.5)


def ctf_of(n: int, u: float = 15000.0, v: float = 14000.0) -> CtfParameters:
    ones = torch.ones(n, dtype=torch.float64)
    return CtfParameters(u * ones, v * ones, 30 * ones, 0 * ones, 0 * ones, ones)


def direct_sum(xy_N2: torch.Tensor, weight_N: torch.Tensor, box: int, pixel_size: float) -> torch.Tensor:
    """(1/N^2) sum w exp(-2 pi i k . x / L) term by term, Nyquist left out."""
    k_K = signed_frequencies(box).double() / (box * pixel_size)
    along_y = torch.exp(-2j * math.pi * k_K[:, None] * xy_N2[:, 1])
    along_x = torch.exp(-2j * math.pi * k_K[: box // 2 + 1, None] * xy_N2[:, 0])
    fourier = torch.einsum("n,yn,xn->yx", weight_N.to(torch.complex128), along_y, along_x) / box**2
    fourier[box // 2] = 0
    fourier[:, box // 2] = 0
    return fourier


@pytest.mark.parametrize("transform", [atom_transforms, by_spreading])
@pytest.mark.parametrize("box", [16, 30, 64])
def test_atoms_against_the_direct_sum(transform, box):
    atoms = some_atoms()
    xy_BN2 = torch.einsum("bij,nj->bni", random_rotations(3, torch.Generator().manual_seed(1))[:, :2], atoms.xyz_N3)
    actual_BYX = transform(xy_BN2, atoms.weight_N, box, 1.7)
    for row in range(3):
        expected_YX = direct_sum(xy_BN2[row], atoms.weight_N, box, 1.7)
        assert (actual_BYX[row] - expected_YX).norm() < 2e-5 * expected_YX.norm()


def test_atoms_near_the_edge_of_the_fine_grid_wrap_around():
    """Atoms within the kernel's width of the border touch cells on both sides."""
    xy_BN2 = torch.tensor([[[15.9, -15.9], [-16.0, 3.0]]], dtype=torch.float64)
    expected_YX = direct_sum(xy_BN2[0], torch.ones(2), 16, 2.0)
    assert (by_spreading(xy_BN2, torch.ones(2), 16, 2.0)[0] - expected_YX).norm() < 2e-5 * expected_YX.norm()


def test_central_slices_of_the_volume_are_the_images():
    """With A = 1 the image is the sum along z: F2(x, y) = N F3(x, y, 0); with (0, 0, 90) image x looks along object y."""
    atoms, box = some_atoms(), 32
    volume_ZYX = centred_rfft3(atom_map(atoms.xyz_N3, atoms.weight_N, box, 2.0))
    image_YX = atom_transforms(atoms.xyz_N3[None, :, :2], atoms.weight_N, box, 2.0)[0]
    assert (box * volume_ZYX[0] - image_YX).norm() < 1e-4 * image_YX.norm()
    turned = matrix_from_euler(*torch.tensor([[0.0], [0.0], [90.0]], dtype=torch.float64))[0]
    seen_N2 = (atoms.xyz_N3 @ turned.T)[:, :2]
    assert torch.allclose(seen_N2[:, 0], atoms.xyz_N3[:, 1])


def test_one_atom_with_a_bfactor_is_a_gaussian():
    """exp(-B s^2/4) is a Gaussian of variance B / (8 pi^2) in real space, of integral w at the atom's place."""
    group, bfactor = a_group(64, 1.0), 200.0
    model = AtomModel("one", torch.tensor([[3.0, -2.0, 5.0]], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64))
    source = AtomSource([model], HalfPlane.of(group, CPU), bfactor)
    image_YX = centred_irfft2(source(torch.eye(3).double()[None], torch.zeros(1).long()), 64)[0]
    axis = torch.arange(64.0) - 32
    variance = bfactor / (8 * math.pi**2)
    r2_YX = (axis[None, :] - 3) ** 2 + (axis[:, None] + 2) ** 2
    expected_YX = 4 / (2 * math.pi * variance) * torch.exp(-r2_YX / (2 * variance))
    assert (image_YX - expected_YX).abs().max() < 1e-4 * expected_YX.max()


def test_origin_is_the_shift_that_centres():
    """A particle with origin (+6, -4) Å lies at (-6, +4) Å: 3 px to the left, 2 px up at 2 Å."""
    group = a_group(32, 2.0)
    plane = HalfPlane.of(group, CPU)
    model = AtomModel("one", torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    centred_BYX = AtomSource([model], plane, 100.0)(torch.eye(3).double()[None], torch.zeros(1).long())
    moved_BYX = Transfer.of(plane).image(centred_BYX, torch.tensor([[6.0, -4.0]], dtype=torch.float64), None)
    peak = int(centred_irfft2(moved_BYX, 32)[0].argmax())
    assert (peak // 32, peak % 32) == (16 + 2, 16 - 3)


def test_variance_by_parseval():
    plane = HalfPlane.of(a_group(32), CPU)
    image_BYX = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(2)) + 3
    expected_B = image_BYX.double().var((1, 2), unbiased=False).float()
    assert torch.allclose(plane.variance_B(centred_rfft2(image_BYX.clone())), expected_B, rtol=1e-4)


@pytest.mark.parametrize("ice", [0.0, 0.25, 1.0])
def test_noise_has_unit_variance_and_the_spectrum_of_the_formula(ice):
    plane = HalfPlane.of(a_group(32, 3.0), CPU)
    ctf_BYX = Transfer.of(plane).ctf_BYX(ctf_of(1))
    noise = NoiseModel.of(plane, ice, ctf_BYX)
    white_BYX = WhiteNoise(11, CPU)(torch.arange(3000), 32)
    fourier_BYX = noise.transforms(white_BYX, ctf_BYX)
    assert float(plane.variance_B(fourier_BYX).mean()) == pytest.approx(1.0, rel=0.01)
    power_YX = fourier_BYX.abs().square().mean(0) * 32**2
    lorentz_YX = 1 / (1 + plane.s2_YX() * 18.0**2)
    expected_YX = (1 - ice) / ice * lorentz_YX.mean() + lorentz_YX * ctf_BYX[0] ** 2 if ice else torch.ones_like(power_YX)
    inner = (slice(1, 16), slice(1, 16))
    ratio_YX = power_YX[inner] / expected_YX[inner]
    ratio_YX = ratio_YX[expected_YX[inner] > 1e-3 * expected_YX.max()]
    # 3,000 draws of a power scatter by 2 %; the constant in front is known up to how the mean over the plane is taken.
    assert float((ratio_YX / ratio_YX.mean() - 1).std()) < 0.03


def test_junk_is_a_sum_of_gaussians():
    plane = HalfPlane.of(a_group(32, 3.0), CPU)
    junk = Junk.draw(3, 100.0, 60.0, seed=4)
    image_YX = centred_irfft2(junk.transforms(torch.tensor([2]), plane), 32)[0].double()
    axis = (torch.arange(32.0).double() - 16) * 3
    expected_YX = torch.zeros(32, 32).double()
    for (x, y), weight in zip(junk.xy_JM2[2].double(), junk.weight_JM[2].double()):
        r2_YX = (axis[None] - x) ** 2 + (axis[:, None] - y) ** 2
        expected_YX += weight * 9 / (2 * math.pi * junk.sigma_J[2] ** 2) * torch.exp(-r2_YX / (2 * junk.sigma_J[2] ** 2))
    inside = (slice(4, 28), slice(4, 28))  # the sum wraps around at the border
    assert (image_YX - expected_YX)[inside].abs().max() < 0.02 * expected_YX.max()


def test_resampling_a_band_limited_map_is_exact():
    """A wave that both grids hold keeps its values at the new positions."""
    old, new, step = 32, 40, 0.7
    position = torch.arange(old, dtype=torch.float64) - old // 2
    wave = torch.cos(2 * math.pi * 5 * position / old + 0.3)
    new_position = (torch.arange(new, dtype=torch.float64) - new // 2) * step
    assert torch.allclose(dirichlet_matrix(old, new, step) @ wave, torch.cos(2 * math.pi * 5 * new_position / old + 0.3))


def test_truth_map_keeps_the_grey_values_of_projections():
    """On a grid of twice the voxel size half as many voxels lie along z, so each is twice as bright."""
    atoms = some_atoms()
    fine = MapModel("fine", truth_map(atoms, 48, 1.5, 150.0), 1.5)
    coarse_ZYX = truth_map(fine, 24, 3.0, 0.0)
    expected_ZYX = truth_map(atoms, 24, 3.0, 150.0) / 4  # images of atoms sum to w on any grid: 4 times brighter pixels
    assert (coarse_ZYX - expected_ZYX).norm() < 0.02 * expected_ZYX.norm()
    assert resampled(fine, 48, 1.5) is fine.map_ZYX


def test_start_map_has_half_the_amplitude_at_its_resolution():
    map_ZYX = torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(3))
    low_ZYX = damped(map_ZYX, 2.5, low_pass_bfactor(20.0))  # 20 Å is shell 4 of an 80 Å box
    ratio = centred_rfft3(low_ZYX)[0, 0, 4] / centred_rfft3(map_ZYX.clone())[0, 0, 4]
    assert float(ratio.real) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.interop
def test_images_of_the_independent_simulator(shared, tmp_path):
    """Same atoms, poses, offsets and CTFs: correlation of every noise-free image at least 0.9999.

    That program keeps the Nyquist row and column (the mean of both signs), verglas leaves them out; they are left out of
    both here. With them the correlation is 0.9988 and more.
    """
    program, atoms_file = shared / "tools" / "simulate_particles.py", shared / "data" / "models" / "5a1a_D2.npz"
    if not program.is_file():
        pytest.skip("the independent simulator is not here")
    words = [program, atoms_file, tmp_path / "sim", "--box", 64, "--apix", 3.0, "--n", 24, "--snr", 1e10, "--seed", 3]
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    table = ParticleTable.read(tmp_path / "sim" / "truth.star")
    theirs_BYX = torch.from_numpy(Stack.open(tmp_path / "sim" / "particles.mrcs").read(slice(0, 24)))
    plane = HalfPlane.of(table.groups[0], CPU)
    models = read_models((str(atoms_file),), recentre=True, symmetry="C1", seed=0)
    signal_BYX = AtomSource(models, plane, 60.0)(table.rotations(), torch.zeros(24).long())
    transfer = Transfer.of(plane)
    ours_BYX = centred_irfft2(transfer.image(signal_BYX, table.origins(), transfer.ctf_BYX(table.ctf())), 64)
    assert float(correlation_B(ours_BYX, theirs_BYX).min()) >= 0.998
    assert float(correlation_B(without_nyquist(ours_BYX), without_nyquist(theirs_BYX)).min()) >= 0.9999


def without_nyquist(image_BYX: torch.Tensor) -> torch.Tensor:
    box = image_BYX.shape[-1]
    fourier_BYX = centred_rfft2(image_BYX.clone())
    fourier_BYX[:, box // 2] = 0
    fourier_BYX[:, :, box // 2] = 0
    return centred_irfft2(fourier_BYX, box)


def correlation_B(a_BYX: torch.Tensor, b_BYX: torch.Tensor) -> torch.Tensor:
    a, b = (image_BYX.double().flatten(1) for image_BYX in (a_BYX, b_BYX))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_a_structure_file_without_hydrogens_and_water(tmp_path):
    line = "{:<6}{:>5} {:<4} {:>3} A{:>4}    {:8.3f}{:8.3f}{:8.3f}{:6.2f} 10.00          {:>2}\n"
    atoms = [("ATOM", 1, " CA", "ALA", 1, 1, 2, 3, 0.5, "C"), ("ATOM", 2, " HA", "ALA", 1, 1, 1, 1, 1, "H"),
             ("ATOM", 3, " O", "ALA", 1, 4, 5, 6, 1, "O"), ("HETATM", 4, " O", "HOH", 2, 9, 9, 9, 1, "O")]  # fmt: skip
    path = tmp_path / "tiny.pdb"
    path.write_text("".join(line.format(*atom) for atom in atoms) + "END\n")
    model = read_models((str(path),), recentre=False, symmetry="C1", seed=0)[0]
    assert isinstance(model, AtomModel)
    assert model.weight_N.tolist() == [3.0, 8.0]
    assert np.allclose(model.xyz_N3.numpy(), [[1, 2, 3], [4, 5, 6]])


def test_reading_a_real_structure(shared):
    model = read_models((str(shared / "data" / "models" / "5a1a.pdb"),), recentre=True, symmetry="C1", seed=0)[0]
    assert isinstance(model, AtomModel)
    assert len(model.xyz_N3) > 30000
    assert 150 < model.diameter < 220
    assert float(model.centre_3.norm()) < 1e-6


def test_symmetry_copies_atoms(tmp_path: Path):
    np.savez(tmp_path / "one.npz", xyz=np.array([[10.0, 0, 5]]), w=np.array([6.0]))
    model = read_models((str(tmp_path / "one.npz"),), recentre=True, symmetry="C4", seed=0)[0]
    assert isinstance(model, AtomModel)
    expected = {(10, 0, 5), (0, 10, 5), (-10, 0, 5), (0, -10, 5)}
    assert {tuple(round(float(v)) for v in xyz) for xyz in model.xyz_N3} == expected
