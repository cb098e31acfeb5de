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
from verglas.io.mrc import read_map
from verglas.io.star import read_star
from verglas.particles.table import ParticleTable
from verglas.refinement.files import write_iteration
from verglas.refinement.files_data import ENTROPY_LABEL
from verglas.refinement.state import State

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="RELION is not installed"),
]
N, BOX, PIXEL = 48, 32, 5.0


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
    table = table.with_columns(rlnMicrographName=["ba"[row % 2] + ".mrc" for row in range(N)], myOwn="kept")
    state = small_state(table, halves)
    state.poses.rotation_B33, state.poses.origin_B2 = table.rotations(), table.origins()
    state.poses.norm_B = torch.ones(N, dtype=torch.float64)
    state.schedule.changes_angles, state.schedule.changes_offsets = 20.0, 5.0
    locations = table.image_locations()
    images = np.stack([read_stack(path) for path in locations.paths])[0]
    noise_GS = noise_of(torch.from_numpy(images))[None]
    for half in state.halves:
        half.map_ZYX = torch.from_numpy(read_map(folder / "truth.mrc").data_ZYX)
        half.sigma2_noise_GS, half.norm_average = noise_GS, 1.0
        half.scale_M = torch.tensor([0.9, 1.1], dtype=torch.float64)
    return state, table


def read_stack(path: Path) -> np.ndarray:
    from verglas.io.mrc import Stack

    return Stack.open(path).read(slice(None))


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


def test_relion_continues_an_iteration_of_halves(here, simulated):
    state, table = true_state(simulated)
    config = small_config(diameter=130.0, max_iterations=10)
    write_iteration(Path("out"), state, table, config, small_directions(), "verglas refine")
    run(f"{MPI} relion_refine_mpi --continue out/run_it003_optimiser.star --o out/ct --auto_iter_max 4 --j 1")
    values = read_star("out/ct_it004_optimiser.star")["optimiser_general"].values
    assert values["rlnCurrentIteration"] == 4 and values["rlnAdaptiveOversampleOrder"] == 1
    assert_particles_kept("out/ct_it004_data.star", state, table, 20.0)
    groups = read_star("out/ct_it004_half1_model.star")["model_groups"].frame
    assert groups["rlnGroupName"].tolist() == ["a.mrc", "b.mrc"]
    assert groups["rlnGroupScaleCorrection"].iloc[0] > groups["rlnGroupScaleCorrection"].iloc[1], "scales went to their groups"


def test_relion_continues_an_iteration_of_one_model(here, simulated):
    state, table = true_state(simulated, halves=1)
    write_iteration(Path("out"), state, table, small_config(diameter=130.0), small_directions(), "verglas refine")
    Path("out/run_it003_optimiser.star").write_text(
        Path("out/run_it003_optimiser.star").read_text().replace("_rlnDoAutoRefine ", "_rlnDoAutoRefine 0 #")
    )
    run("relion_refine --continue out/run_it003_optimiser.star --o out/ct --iter 4 --j 1")
    assert_particles_kept("out/ct_it004_data.star", state, table, 20.0)
