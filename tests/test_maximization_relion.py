"""The maximization against relion_refine: one iteration with fixed poses, whose sums can be made again from its own files.

With --skip_align an iteration is nothing but backprojection, tau^2 and the solution, so spectra agree digit by digit. Maps
agree where there is signal: RELION leaves the voxels at the very radius of the sums without a prior, verglas leaves them out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.core.fourier import half_plane_pixels
from verglas.core.shells import fsc
from verglas.io.mrc import Stack, read_map
from verglas.maximization import reference as ref
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.halves import Solution, solve_halves, solve_single
from verglas.maximization.reconstruct import Geometry, GroupSlices
from verglas.particles.table import ParticleTable
from verglas.testing.for_relion import as_one_stack

N, BOX, PIXEL, RADIUS = 300, 32, 4.5, 15
COMMAND = (
    "--i all.star --ref set/truth.mrc --iter 1 --skip_align --ctf --ini_high 30 --particle_diameter 120 --sym C2 "
    "--skip_gridding --perturb 0 --random_seed 1 --pad 2 --zero_mask"
)
LABELS = {
    "rlnSsnrMap": "ssnr_S",
    "rlnReferenceSigma2": "sigma2_S",
    "rlnReferenceTau2": "tau2_S",
    "rlnFourierCompleteness": "coverage_S",
}

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated particles without offsets, in two half-sets, as RELION 3.1 reads them."""
    out = tmp_path_factory.mktemp("relion")
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--snr", 0.2, "--seed", 1, "--device", "cpu"]
    assert main([str(word) for word in [*words, "--out", out / "set"]]) == 0
    table = ParticleTable.read(out / "set/truth.star")
    as_one_stack(table, out, rlnOriginXAngst=0.0, rlnOriginYAngst=0.0, rlnRandomSubset=np.arange(N) % 2 + 1)
    return out


def relion(folder: Path, *words: str) -> None:
    """Run a RELION program in `folder`; skip if it is not there."""
    for program in (words[0], "relion_refine_mpi"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    subprocess.run([*words, *COMMAND.split()], cwd=folder, check=True, capture_output=True, env={**os.environ, **allowed})


def column(path: Path, block: str, label: str) -> torch.Tensor:
    """A column of numbers of one block of a model.star."""
    lines = path.read_text().split(f"\ndata_{block}\n")[1].split("\ndata_")[0].splitlines()
    names = [line.split()[0][1:] for line in lines if line.startswith("_rln")]
    rows = [line.split() for line in lines if line.strip() and not line.startswith(("_", "#", "loop_"))]
    return torch.tensor([float(row[names.index(label)]) for row in rows], dtype=torch.float64)


def noise(model: Path) -> torch.Tensor:
    """Noise per micrograph [3, S]."""
    return torch.stack([column(model, f"model_group_{i}", "rlnSigma2Noise") for i in (1, 2, 3)])


def sums(folder: Path, model: Path, chosen: np.ndarray) -> Accumulator:
    """What the iteration adds up: CTF X / sigma^2 and CTF^2 / sigma^2 at the given poses, noise from iteration 0."""
    table = ParticleTable.read(folder / "all.star")
    ctf = table.ctf()
    assert ctf is not None
    slicer = GroupSlices(table.groups[0], Geometry(BOX, PIXEL, RADIUS), True, "cpu")
    images = torch.from_numpy(Stack.open(folder / "all.mrcs").read(slice(0, N)))[chosen]
    data, weight = slicer(images, torch.zeros(len(images), 2, dtype=torch.float64), ctf[torch.from_numpy(chosen)])
    inverse = 1 / noise(model)[torch.from_numpy(chosen // (N // 3))][:, half_plane_pixels(BOX, RADIUS).shell_K]
    total = Accumulator(BOX, RADIUS, 2.0, dtype=torch.float64)
    poses = table.rotations()[torch.from_numpy(chosen)]
    total.add(data.double() * inverse[:, None], weight.double() * inverse, poses, slicer.coordinates_K3.double())
    return total


def assert_same(found: Solution, model: Path, volume: Path, signal: int) -> None:
    """Spectra to the last shell but one (RELION's rounding decides about pixels at the radius), the map to `signal`."""
    for label, name in LABELS.items():
        theirs, ours = column(model, "model_class_1", label)[:RADIUS], getattr(found, name)[:RADIUS]
        assert torch.allclose(ours, theirs, rtol=5e-3 if name != "coverage_S" else 0, atol=1e-6), name
        assert torch.allclose(ours[: signal + 1], theirs[: signal + 1], rtol=3e-4, atol=1e-6), name
    map_ZYX = torch.from_numpy(read_map(volume).data_ZYX.copy()).double()
    curve = fsc(found.map_ZYX.double(), map_ZYX)
    print(f"FSC of the maps to shell {signal}: at least {float(curve[1 : signal + 1].min()):.6f}")
    assert float(curve[1 : signal + 1].min()) > 0.999


def test_one_set_with_the_prior_of_its_reference(folder: Path) -> None:
    (folder / "one").mkdir()
    relion(folder, "relion_refine", "--o", "one/run", "--tau2_fudge", "2", "--K", "1")
    start, model = folder / "one/run_it000_model.star", folder / "one/run_it001_model.star"
    map_ZYX, notices = ref.initial_reference(read_map(folder / "set/truth.mrc"), BOX, PIXEL, 30.0)
    theirs = torch.from_numpy(read_map(folder / "one/run_it000_class001.mrc").data_ZYX.copy())
    assert notices == [] and torch.allclose(map_ZYX, theirs, atol=1e-5 * float(theirs.abs().max()))
    tau2_S, ssnr_S = ref.initial_ssnr(map_ZYX, noise(start), N, 2.0)
    assert torch.allclose(tau2_S[:6], column(start, "model_class_1", "rlnReferenceTau2")[:6], rtol=1e-4)
    assert torch.allclose(ssnr_S[:6], column(start, "model_class_1", "rlnSsnrMap")[:6], rtol=3e-4)
    found = solve_single(sums(folder, start, np.arange(N)), "C2", ref.reference_spectrum(map_ZYX, 2.0, RADIUS), 2.0)
    assert_same(found, model, folder / "one/run_it001_class001.mrc", 8)


def test_two_halves_with_the_prior_of_their_fsc(folder: Path) -> None:
    (folder / "two").mkdir()
    mpi = ("mpirun", "--oversubscribe", "-n", "3", "relion_refine_mpi")
    relion(folder, *mpi, "--o", "two/run", "--split_random_halves", "--tau2_fudge", "1", "--low_resol_join_halves", "40")
    members = [np.flatnonzero(np.arange(N) % 2 == half) for half in (0, 1)]
    first, second = (sums(folder, folder / f"two/run_it000_half{i}_model.star", chosen) for i, chosen in enumerate(members, 1))
    solutions, fsc_S = solve_halves((first, second), "C2", int(np.ceil(BOX * PIXEL / 40)))
    theirs = column(folder / "two/run_it001_half1_model.star", "model_class_1", "rlnGoldStandardFsc")
    print(f"largest difference of the FSC below shell {RADIUS}: {float((fsc_S - theirs)[:RADIUS].abs().max()):.6f}")
    assert torch.allclose(fsc_S[:RADIUS], theirs[:RADIUS], atol=5e-5) and 0.05 < float(theirs[7]) < 0.95
    for i, solution in enumerate(solutions, 1):
        root = folder / f"two/run_it001_half{i}"
        assert_same(solution, Path(f"{root}_model.star"), Path(f"{root}_class001.mrc"), 7)
