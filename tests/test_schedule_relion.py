"""The schedule beside RELION's: a whole auto-refinement of a tiny set is replayed from its files, decision by decision."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from verglas.core.rotations import matrix_from_euler
from verglas.io.star import read_star
from verglas.io.star_block import StarBlock
from verglas.refinement import schedule as rules
from verglas.refinement.config import RefineConfig
from verglas.refinement.state import HalfModel, Poses, State

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="needs relion_refine_mpi"),
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun"),
]
CONFIG = RefineConfig(diameter=170.0, symmetry="O", healpix_order=1, offset_range=3.0, offset_step=2.0, join_resolution=40.0)
BOX, PIXEL, PARTICLES = 32, 6.0, 150


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files of every iteration of RELION's refinement of 150 octahedral particles of 32 px (20 s and more)."""
    folder = tmp_path_factory.mktemp("auto") / "set"
    simulation = ["--n", str(PARTICLES), "--box", str(BOX), "--pixel", str(PIXEL), "--sym", "O", "--snr", "0.3", "--seed", "3"]
    subprocess.run(
        [sys.executable, "-m", "verglas", "simulate", *simulation, "--out", str(folder)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (folder / "r").mkdir()
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", "relion_refine_mpi", "--o", "r/run",
               "--i", "particles.star", "--ref", "start.mrc", "--particle_diameter", "170", "--sym", "O", "--healpix_order", "1",
               "--offset_range", "3", "--offset_step", "2", "--oversampling", "1", "--auto_local_healpix_order", "4",
               "--ini_high", "60", "--low_resol_join_halves", "40", "--pad", "1", "--random_seed", "1", "--j", "1",
               "--auto_refine", "--split_random_halves", "--firstiter_cc", "--ctf", "--flatten_solvent", "--zero_mask",
               "--norm", "--scale", "--dont_check_norm"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "r"


class Iteration:
    """What RELION wrote of one iteration."""

    def __init__(self, folder: Path, number: int) -> None:
        stem = f"{folder}/run_it{number:03d}_"
        self.model = read_star(f"{stem}half1_model.star")
        self.general = self.model["model_general"].values
        self.optimiser = read_star(f"{stem}optimiser.star")["optimiser_general"].values
        self.sampling = read_star(f"{stem}sampling.star")["sampling_general"].values
        self.data = read_star(f"{stem}data.star")["particles"].frame

    def poses(self, names: pd.Series) -> Poses:
        """Poses in the order of these image names."""
        rows = self.data.set_index("rlnImageName").loc[names]
        angles = torch.tensor(rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float))
        origins = torch.tensor(rows[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy(float))
        zeros = torch.zeros(len(rows), dtype=torch.float64)
        return Poses(matrix_from_euler(*angles.T), origins, zeros, zeros, zeros, zeros.long(), zeros, zeros.long(),
                     zeros.long(), zeros.long(), zeros, zeros, zeros)  # fmt: skip

    def number(self, block: dict[str, object], label: str) -> float:
        return float(str(block[label]))


def start_state(first: Iteration, names: pd.Series) -> State:
    empty = torch.zeros(0)
    half = HalfModel(empty, empty, empty, 10.0, 1.0, empty, empty, empty, empty, empty)
    schedule = rules.initial_schedule(CONFIG, PIXEL)
    state = State(0, [half], first.poses(names), schedule, BOX, PIXEL, 60.0, BOX, torch.zeros(BOX // 2 + 1))
    return replace(state, current_resolution=state.resolution_of(state.shell_of(60.0)))


def after_iteration(state: State, now: Iteration, names: pd.Series) -> State:
    """The state once the expectation and maximization that RELION did are taken from its files."""
    model: StarBlock = now.model["model_class_1"]
    poses = now.poses(names)
    half = replace(state.halves[0], average_pmax=now.number(now.general, "rlnAveragePmax"))
    measured = replace(
        state,
        iteration=state.iteration + 1,
        halves=[half],
        poses=poses,
        schedule=rules.monitor_changes(state.poses, poses, state, CONFIG),
        current_size=int(now.number(now.general, "rlnCurrentImageSize")),
        fsc_S=torch.tensor(model.frame["rlnGoldStandardFsc"].to_numpy(float)),
    )
    return rules.update_resolution(measured, now.number(now.general, "rlnCurrentResolution"))


def test_every_decision_of_a_whole_refinement(refined: Path) -> None:
    last = max(int(path.name[6:9]) for path in refined.glob("run_it*_half1_model.star"))
    names = Iteration(refined, 1).data["rlnImageName"]
    state = start_state(Iteration(refined, 0), names)
    orders = set()
    for number in range(1, last + 1):
        now = Iteration(refined, number)
        assert not rules.is_converged(state.schedule, CONFIG)
        assert rules.image_size(state, CONFIG) == now.number(now.general, "rlnCurrentImageSize"), number
        state.schedule.accuracy_angles = now.number(now.optimiser, "rlnOverallAccuracyRotations")
        state.schedule.accuracy_offsets = now.number(now.optimiser, "rlnOverallAccuracyTranslationsAngst")
        state = replace(state, schedule=rules.update_sampling(state, CONFIG))
        orders.add(state.schedule.healpix_order)
        assert state.schedule.healpix_order == now.number(now.sampling, "rlnHealpixOrder"), number
        assert state.schedule.offset_step == pytest.approx(now.number(now.sampling, "rlnOffsetStep"), rel=1e-5), number
        assert state.schedule.offset_range == pytest.approx(now.number(now.sampling, "rlnOffsetRange"), rel=1e-4), number
        assert state.schedule.local_sigma == pytest.approx(now.number(now.general, "rlnSigmaPriorRotAngle"), abs=1e-5), number
        state = after_iteration(state, now, names)
        schedule = state.schedule
        assert schedule.changes_angles == pytest.approx(now.number(now.optimiser, "rlnChangesOptimalOrientations"), rel=1e-4)
        assert schedule.changes_offsets == pytest.approx(now.number(now.optimiser, "rlnChangesOptimalOffsets"), rel=1e-4)
        changing = now.number(now.optimiser, "rlnNumberOfIterWithoutChangingAssignments")
        assert schedule.iterations_without_changes == changing, number
        assert schedule.iterations_without_gain == now.number(now.optimiser, "rlnNumberOfIterWithoutResolutionGain"), number
        assert schedule.size_increment == now.number(now.optimiser, "rlnIncrementImageSize"), number
        assert schedule.high_fsc_at_limit == bool(now.number(now.optimiser, "rlnHasHighFscAtResolLimit")), number
    assert rules.is_converged(state.schedule, CONFIG)  # RELION's next iteration was its last
    assert len(orders) >= 3
