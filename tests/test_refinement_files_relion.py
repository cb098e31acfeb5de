"""RELION itself goes on from the files of a refinement."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from refinement_states import small_config, small_directions, small_state
from verglas.core.rotations import angular_distance
from verglas.io.mrc import Stack, read_map
from verglas.io.star import read_star
from verglas.maximization.halves import Solution
from verglas.particles.table import ParticleTable
from verglas.refinement.files import FinalMaps, write_final, write_iteration
from verglas.refinement.files_data import ENTROPY_LABEL
from verglas.refinement.state import State

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="RELION is not installed"),
]
N, BOX, PIXEL = 48, 32, 5.0
# When RELION 3.1.3 continues, it takes the current grid for the original one, and draws the perturbation anew.
RENEWED = ("Original", "PerturbInstance")
# RELION's own file name; a mean that RELION takes over the voxels of a cube which cuts the ball, verglas by volume.
OTHERWISE = {"rlnReferenceImage", "rlnOverallFourierCompleteness"}


def run(command: str) -> str:
    """Output of a program that succeeds."""
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


MPI = "mpirun --allow-run-as-root --oversubscribe -n 3"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Strong particles with known poses, and their true map."""
    folder = tmp_path_factory.mktemp("relion") / "sim"
    run(f"{sys.executable} -m verglas simulate --n {N} --box {BOX} --pixel {PIXEL} --snr 0.5 --out {folder} --seed 1")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()


def true_state(folder: Path, halves: int = 2) -> tuple[State, ParticleTable]:
    """Poses and map at the truth, noise as in the images; scale groups met in the order b, a by verglas."""
    table = ParticleTable.read(folder / "truth.star")
    table = table.with_columns(rlnMicrographName=["ba"[row // 2 % 2] + ".mrc" for row in range(N)], myOwn="kept")
    state = small_state(table, halves)
    state.poses.rotation_B33, state.poses.origin_B2 = table.rotations(), table.origins()
    state.poses.norm_B = torch.ones(N, dtype=torch.float64)
    state.schedule.changes_angles, state.schedule.changes_offsets = 20.0, 5.0
    noise_GS = noise_of(torch.from_numpy(Stack.open(folder / "particles.mrcs").read(slice(None))))[None]
    for half in state.halves:
        half.map_ZYX = torch.tensor(read_map(folder / "truth.mrc").data_ZYX)
        half.sigma2_noise_GS, half.norm_average = noise_GS, 1.0
        half.scale_M = torch.tensor([0.9, 1.1], dtype=torch.float64)
    return state, table


def noise_of(images_BYX: torch.Tensor) -> torch.Tensor:
    """Power per component in each shell, transforms divided by the number of pixels, float64 [S]."""
    power_YX = (torch.fft.fft2(images_BYX.double()) / BOX**2).abs().square().mean(0) / 2
    k = torch.fft.fftfreq(BOX, 1 / BOX)
    shell_YX = (torch.hypot(k[:, None], k) + 0.5).long()
    sums_S = torch.bincount(shell_YX.flatten(), power_YX.flatten())
    return (sums_S / torch.bincount(shell_YX.flatten()))[: BOX // 2 + 1]


def assert_particles_kept(path: str, state: State, table: ParticleTable, largest_median: float) -> None:
    """The file of RELION: same particles and halves, own columns, poses about as they were."""
    theirs = ParticleTable.read(path)
    row = {name: i for i, name in enumerate(theirs.frame["rlnImageName"].str.partition("@")[0])}
    theirs = theirs.select(np.array([row[name] for name in table.frame["rlnImageName"].str.partition("@")[0]]))
    assert theirs.frame["rlnRandomSubset"].tolist() == state.poses.half_B.tolist()
    assert (theirs.frame["myOwn"] == "kept").all()
    np.testing.assert_allclose(theirs.frame[ENTROPY_LABEL].astype(float), state.poses.entropy_B, rtol=1e-5)
    turned = angular_distance(theirs.rotations(), state.poses.rotation_B33)
    assert float(turned.median()) < largest_median, turned


def assert_same_numbers(ours: str, theirs: str, blocks: list[str]) -> None:
    """RELION writes what it read before it begins: every number of these blocks, to 3 digits (0.001234)."""
    a, b = read_star(ours), read_star(theirs)
    for name in blocks:
        listed = {label for label in set(a[name].values) & set(b[name].values) if not label.endswith(RENEWED)}
        columns = (set(a[name].frame.columns) & set(b[name].frame.columns)) - OTHERWISE
        assert listed or columns, name
        for label in listed:
            value = a[name].values[label]
            expected = value if isinstance(value, str) else pytest.approx(value, rel=6e-4)
            assert b[name].values[label] == expected, label
        for label in columns:
            ours_B, theirs_B = a[name].frame[label], b[name].frame[label]
            if ours_B.dtype.kind in "if":
                np.testing.assert_allclose(theirs_B, ours_B, rtol=6e-4, atol=1e-30, err_msg=label)
            else:
                assert theirs_B.tolist() == ours_B.tolist(), label


def test_relion_continues_an_iteration_of_halves(here, simulated):
    state, table = true_state(simulated)
    config = small_config(diameter=130.0, max_iterations=10)
    write_iteration(Path("out"), state, table, config, small_directions(), "verglas refine")
    run(f"{MPI} relion_refine_mpi --continue out/run_it003_optimiser.star --o out/ct --auto_iter_max 4 --j 1")
    groups = ["model_groups", "model_group_1", "model_group_2"]
    for half in (1, 2):
        blocks = ["model_general", "model_classes", "model_class_1", *groups, "model_pdf_orient_class_1"]
        assert_same_numbers(f"out/run_it003_half{half}_model.star", f"out/ct_it003_half{half}_model.star", blocks)
    assert_same_numbers("out/run_it003_sampling.star", "out/ct_it003_sampling.star", ["sampling_general"])
    assert read_star("out/ct_it004_optimiser.star")["optimiser_general"].values["rlnCurrentIteration"] == 4
    assert_particles_kept("out/ct_it003_data.star", state, table, 1e-3)
    assert_particles_kept("out/ct_it004_data.star", state, table, 20.0)


def test_relion_continues_an_iteration_of_one_model(here, simulated):
    state, table = true_state(simulated, halves=1)
    write_iteration(Path("out"), state, table, small_config(diameter=130.0), small_directions(), "verglas refine")
    run("relion_refine --continue out/run_it003_optimiser.star --o out/ct --iter 4 --j 1")
    assert_particles_kept("out/ct_it004_data.star", state, table, 20.0)


def test_relion_starts_from_the_final_particles(here, simulated):
    """One iteration of local searches keeps the poses; relion_star_handler selects by our columns."""
    state, table = true_state(simulated)
    state.solved = True
    one = state.halves[0]
    joined = Solution(one.map_ZYX, one.tau2_S, one.sigma2_S, one.ssnr_S, one.coverage_S)
    final = FinalMaps(joined, [half.map_ZYX for half in state.halves])
    write_final(Path("out"), state, table, small_config(diameter=130.0), final, small_directions(), "verglas refine")
    options = (
        "--particle_diameter 130 --ini_high 15 --ctf --zero_mask --flatten_solvent --oversampling 1 --healpix_order 3 "
        "--auto_local_healpix_order 3 --offset_range 3 --offset_step 2 --sym C1 --norm --scale --auto_iter_max 1"
    )
    command = f"{MPI} relion_refine_mpi --i out/run_data.star --ref out/run_class001.mrc --o out/fresh {options}"
    run(f"{command} --auto_refine --split_random_halves --random_seed 3 --j 1")
    assert_particles_kept("out/fresh_it000_data.star", state, table, 1e-3)
    assert_particles_kept("out/fresh_it001_data.star", state, table, 20.0)
    run("relion_star_handler --i out/run_data.star --o out/some.star --select rlnMaxValueProbDistribution --minval 0.5")
    chosen = ParticleTable.read("out/some.star").frame["rlnImageName"].tolist()
    expected = table.frame["rlnImageName"][state.poses.pmax_B.numpy() >= 0.5]
    assert [name[:6] for name in chosen] == [name[:6] for name in expected]
