"""The Ewald sphere: images computed on it, reconstructed with either hand and without; by RELION, too."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verglas.cli.main import main
from verglas.core.fourier import half_plane_pixels
from verglas.core.masks import soft_sphere
from verglas.core.shells import fsc
from verglas.io.mrc import Map, StackWriter, read_map, write_map
from verglas.maximization.ewald import EwaldSlices, sphere_correlation, sphere_height
from verglas.maximization.reconstruct import Geometry, GroupSlices
from verglas.nufft import nufft2
from verglas.optics.ctf import GroupCtf
from verglas.particles.table import ParticleTable

N, BOX, PIXEL, VOLTAGE = 200, 32, 0.6, 2.0


def truth() -> torch.Tensor:
    """Noise in a sphere: no hand is like the other."""
    noise = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return noise * soft_sphere(BOX, 0.3 * BOX, 2)


def images_on_the_sphere(table: ParticleTable, map_ZYX: torch.Tensor) -> torch.Tensor:
    """P V(-h) + Q V(h) of each particle, [B, Y, X], without noise: the formula, by exact transforms."""
    group, pixels = table.groups[0], half_plane_pixels(BOX)
    frequency_K2 = pixels.frequency_K2(PIXEL, torch.float64)
    k_K3 = pixels.coordinates_K3(torch.float64)
    gamma_BK = -GroupCtf.build(frequency_K2, group).phase_BK(table.ctf())
    height_K = sphere_height(frequency_K2.square().sum(1), group.wavelength_angstrom) * BOX * PIXEL
    p_BK = 0.5j * torch.polar(torch.ones_like(gamma_BK), gamma_BK)
    total_BK = torch.zeros_like(p_BK)
    for factor_BK, side in ((p_BK, -1), (p_BK.conj(), 1)):
        on_sheet_K3 = torch.cat([k_K3[:, :2], side * height_K[:, None]], 1)
        point_M3 = torch.einsum("rji,kj->rki", table.rotations(), on_sheet_K3).reshape(-1, 3) * (2 * math.pi / BOX)
        total_BK += factor_BK * nufft2(point_M3, map_ZYX, -1, 1e-6, implementation="reference").view(len(table), -1) / BOX**2
    fourier_BYX = torch.zeros(len(table), BOX, BOX // 2 + 1, dtype=torch.complex128)
    y, x = pixels.y_K.long(), pixels.x_K.long()
    fourier_BYX[:, y % BOX, x] = total_BK * (1 - 2 * ((x + y) % 2))
    on_axis = (x == 0) & (y != 0) & (y.abs() < BOX // 2)
    fourier_BYX[:, -y[on_axis] % BOX, 0] = (total_BK * (1 - 2 * ((x + y) % 2)))[:, on_axis].conj()
    return torch.fft.irfft2(fourier_BYX, s=(BOX, BOX), norm="forward").float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Particles of a microscope of 2 kV, whose sphere is strongly curved."""
    out = tmp_path_factory.mktemp("ewald")
    write_map(out / "truth.mrc", Map(truth().float().numpy(), PIXEL))
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--voltage", VOLTAGE, "--cs", 0, "--defocus", 100, 600]
    assert main([str(word) for word in [*words, "--model", out / "truth.mrc", "--device", "cpu", "--out", out / "set"]]) == 0
    table = ParticleTable.read(out / "set/truth.star")
    names = [f"{i + 1:06d}@all.mrcs" for i in range(N)]
    table = replace(table, frame=table.frame.assign(rlnImageName=names, rlnOriginXAngst=0.0, rlnOriginYAngst=0.0), folder=out)
    with StackWriter(out / "all.mrcs", N, (BOX, BOX), PIXEL) as stack:
        stack.append(images_on_the_sphere(table, truth()).numpy())
    table.write(out / "all.star")
    return out


def agreement(path: Path) -> float:
    """Mean FSC with the truth."""
    found, mask = torch.from_numpy(read_map(path).data_ZYX.copy()), soft_sphere(BOX, 0.35 * BOX, 2)
    return float(fsc(found * mask, truth().float() * mask)[1 : BOX // 2 - 1].mean())


def test_the_right_hand_is_better(folder: Path) -> None:
    found = {}
    for solver in ("gridding", "cg"):
        for ewald in ("off", "on", "reversed"):
            out = folder / f"{solver}_{ewald}"
            words = ["--particles", folder / "all.star", "--out", out, "--ewald", ewald, "--solver", solver]
            options = ["--mask-diameter", "12", "--no-half-maps", "--device", "cpu"]
            assert main(["reconstruct", *map(str, words), *options]) == 0
            found[solver, ewald] = agreement(out / "map.mrc")
        assert found[solver, "on"] > found[solver, "off"] + 0.03 > found[solver, "reversed"] + 0.1, found
    print(found)


@pytest.mark.interop
def test_the_hand_is_that_of_relion(folder: Path) -> None:
    if shutil.which("relion_reconstruct") is None:
        pytest.skip("relion_reconstruct is not installed")
    found = {}
    for name, words in {"on": [], "reversed": ["--reverse_curvature"]}.items():
        command = ["relion_reconstruct", "--i", "all.star", "--o", "theirs.mrc", "--ctf", "--skip_gridding", "--ewald"]
        subprocess.run([*command, "--mask_diameter", "14", *words], cwd=folder, check=True, capture_output=True)
        found[name] = agreement(folder / "theirs.mrc")
    print(found)
    assert found["on"] > found["reversed"] + 0.1


def test_without_curvature_both_sheets_are_the_plane(folder: Path) -> None:
    table = ParticleTable.read(folder / "all.star")
    group, geometry = replace(table.groups[0], voltage_kv=VOLTAGE), Geometry(BOX, PIXEL, BOX // 2)
    image_BYX = torch.randn(3, BOX, BOX, generator=torch.Generator().manual_seed(3))
    plane, flat = GroupSlices(group, geometry, True, "cpu"), EwaldSlices(group, geometry, True, "cpu", diameter=0.0)
    origin_B2 = table.origins()[:3]
    data_B2K, weight_BK = plane(image_BYX, origin_B2, table.ctf()[:3])
    (data1, weight1, k1), (data2, weight2, k2) = flat.parts(image_BYX, origin_B2, table.ctf()[:3])
    torch.testing.assert_close(data1 + data2, data_B2K, rtol=0, atol=1e-4 * float(data_B2K.abs().max()))
    torch.testing.assert_close(weight1 + weight2, weight_BK, rtol=0, atol=1e-4)
    assert torch.equal(k1[:, :2], k2[:, :2]) and torch.equal(k1[:, 2], -k2[:, 2]) and float(k1[:, 2].abs().max()) > 1


def test_height_and_correlation_by_hand() -> None:
    # 10 kV: 0.122 Å; at 1/3 Å the sphere is 0.0068 1/Å from the plane: half of L k² = 0.01356, and 0.04 % more.
    assert float(sphere_height(torch.tensor(1 / 9), 0.122)) == pytest.approx(0.006781, abs=2e-6)
    x = torch.tensor([0.0, 0.0499, 0.0501, 1.0, math.pi], dtype=torch.float64)
    wanted = torch.tensor([1.0, 1 - 0.0499**2 / 10, 1 - 0.0501**2 / 10, 3 * (math.sin(1) - math.cos(1)), 3 / math.pi**2])
    torch.testing.assert_close(sphere_correlation(x), wanted.double(), rtol=0, atol=1e-6)


def test_ewald_needs_ctfs(folder: Path) -> None:
    words = ["reconstruct", "--particles", str(folder / "all.star"), "--ewald", "on", "--no-ctf", "--out", str(folder / "no")]
    assert main(words) == 2
