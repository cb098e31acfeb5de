"""Exact gridding against relion_reconstruct without --skip_gridding: of RELION's own sums, and of whole programs.

Sums differ in the outermost shell: rounding decides in RELION which samples at the very radius count. So maps of the same sums
agree digit by digit, those of the programs where that shell does not reach.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mrcfile
import pytest
import torch

from verglas.cli.main import main
from verglas.core.masks import soft_sphere
from verglas.core.rows import packed_sphere
from verglas.core.shells import fsc
from verglas.io.mrc import read_map
from verglas.maximization.solve import SolvedSums
from verglas.particles.table import ParticleTable
from verglas.testing.for_relion import as_one_stack

N, BOX, PIXEL = 300, 32, 4.5
LIMIT, RADIUS = "10.5", 14  # Å, and the last shell

pytestmark = pytest.mark.interop


def volume(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_map(path).data_ZYX.copy()).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated particles as RELION 3.1 reads them, and the map of either program, plain and exact."""
    if shutil.which("relion_reconstruct") is None:
        pytest.skip("relion_reconstruct is not installed")
    out = tmp_path_factory.mktemp("relion")
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--snr", 0.2, "--seed", 1, "--device", "cpu"]
    assert main([str(word) for word in [*words, "--out", out / "set"]]) == 0
    as_one_stack(ParticleTable.read(out / "set/truth.star"), out)
    for name, words in (("plain", ["--skip_gridding"]), ("exact", [])):
        command = f"relion_reconstruct --i all.star --o {name}.mrc --ctf --maxres {LIMIT} --write_debug_output".split()
        subprocess.run([*command, *words], cwd=out, check=True, capture_output=True)
    for name, words in (("plain", []), ("exact", ["--gridding", "exact"]), ("cg", ["--solver", "cg"])):
        ours = ["--particles", out / "all.star", "--out", out / name, "--max-resolution", LIMIT, *words]
        assert main([str(word) for word in ["reconstruct", *ours, "--no-half-maps", "--device", "cpu"]]) == 0
    return out


def sums_of_relion(folder: Path) -> SolvedSums:
    """What RELION writes before it solves: arrays over -R-1..R+1 along z and y, 0..R+1 along x."""
    files = [folder / f"exact_{name}.mrc" for name in ("weight", "data_real", "data_imag")]
    weight, real, imaginary = (torch.from_numpy(mrcfile.open(path, permissive=True).data.copy()).double() for path in files)
    rows = packed_sphere(2.0 * RADIUS)
    x, y, z = rows.coordinates_V3().long().unbind(1)
    reach = weight.shape[0] // 2
    there = (x <= reach) & (y.abs() <= reach) & (z.abs() <= reach)
    at = tuple(torch.where(there, index, 0) for index in (z + reach, y + reach, x))
    data_V2 = torch.stack([real[at], imaginary[at]], 1) * there[:, None]
    return SolvedSums(data_V2, weight[at] * there, rows, BOX, RADIUS, 2.0, exact=True)


def test_exact_gridding_of_the_same_sums(folder: Path) -> None:
    ours, theirs, plain = sums_of_relion(folder).map().double(), volume(folder / "exact.mrc"), volume(folder / "plain.mrc")
    off, apart = float((ours - theirs).norm() / theirs.norm()), float((plain - theirs).norm() / theirs.norm())
    print(f"difference from RELION's map {off:.5f}, of its plain map from its exact one {apart:.5f}")
    assert off < 0.002 and apart > 0.2


def test_exact_gridding_of_both_programs(folder: Path) -> None:
    curve_S = fsc(volume(folder / "exact/map.mrc"), volume(folder / "exact.mrc"))
    print(curve_S[1 : RADIUS + 1])
    assert float(curve_S[2 : RADIUS - 1].min()) > 0.999 and float(curve_S[RADIUS]) > 0.97


def test_maps_are_nearer_to_the_truth(folder: Path) -> None:
    truth, mask = volume(folder / "set/truth.mrc"), soft_sphere(BOX, 12, 3)
    found = {name: volume(folder / f"{name}/map.mrc") for name in ("plain", "exact", "cg")}
    found |= {f"{name} of RELION": volume(folder / f"{name}.mrc") for name in ("plain", "exact")}
    mean = {name: float(fsc(map_ZYX * mask, truth * mask)[1 : RADIUS + 1].mean()) for name, map_ZYX in found.items()}
    print(mean)
    assert mean["exact"] >= mean["plain"] >= mean["plain of RELION"]
    assert mean["cg"] >= mean["exact"] - 0.001 and mean["exact"] >= mean["exact of RELION"]
