"""Commands of several processes beside those of one: reconstruct, commands that nobody shares, wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from test_ranks_meeting import free_port
from verglas.cli.main import main
from verglas.io.mrc import Stack, StackWriter, read_map
from verglas.particles.table import ParticleTable

SEVERAL = Path(__file__).with_name("several_commands.py")
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """81 particles: the ranks' shares differ."""
    out = tmp_path_factory.mktemp("set") / "set"
    words = ["simulate", "--n", "81", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--out", str(out)]) == 0
    return out


def together(*commands: list[object], ranks: int = 2, **more: str) -> Done:
    """The commands one after another in as many processes; more: of the environment."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(SEVERAL)]
    words = json.dumps([[str(word) for word in command] for command in commands])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"} | more
    return subprocess.run([*start, words], capture_output=True, text=True, check=False, env=environment, timeout=300)


def reconstruct(particles: Path, out: Path, *words: object) -> list[object]:
    return ["reconstruct", "--particles", particles, "--out", out, "--device", "cpu", *words]


def figures(out: Path) -> dict[str, float]:
    return {name: one["value"] for name, one in json.loads((out / "result.json").read_text())["figures"].items()}


def test_two_processes_reconstruct_what_one_does(simulated: Path, tmp_path: Path) -> None:
    def words(out: Path) -> list[list[object]]:
        halves = ["--half1", out / "map" / "half1.mrc", "--half2", out / "map" / "half2.mrc", "--out", out / "sharp"]
        return [reconstruct(simulated / "truth.star", out / "map", "--half-maps", "--sym", "C2"),
                ["postprocess", *halves, "--device", "cpu"]]  # fmt: skip

    for command in words(tmp_path / "one"):
        assert main([str(word) for word in command]) == 0
    done = together(*words(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "2 processes share the work" in done.stderr
    for said in ("reconstruct: done", "Backprojecting: 81 particles", "postprocess: done"):
        assert done.stderr.count(said) == 1
    for name in ("map/map.mrc", "map/half1.mrc", "map/half2.mrc", "map/map_wiener.mrc", "sharp/map.mrc"):
        one, two = (read_map(tmp_path / folder / name).data_ZYX for folder in ("one", "two"))
        assert np.abs(one - two).max() < 1e-4 * one.std()
    curves = [pd.read_csv(tmp_path / folder / "map" / "fsc.csv").fillna(0) for folder in ("one", "two")]
    assert np.allclose(*curves, rtol=1e-4, atol=1e-5)
    assert figures(tmp_path / "one" / "map") == pytest.approx(figures(tmp_path / "two" / "map"))


def started_by_srun(port: int, rank: int, *words: object) -> subprocess.Popen[str]:
    """The first or the second of two tasks, as srun starts them: nobody ends one when the other one has ended."""
    step = {"NUM_TASKS": "2", "NODELIST": "localhost", "TASKS_PER_NODE": "2"}
    environment = {f"SLURM_STEP_{name}": value for name, value in step.items()} | {"SLURM_PROCID": str(rank)}
    environment |= {"SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "7", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "verglas", *map(str, words)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def test_unusable_images_of_any_share_are_told_once(simulated: Path, tmp_path: Path) -> None:
    """The second half of the file is read by the second process."""
    table = ParticleTable.read(simulated / "truth.star")
    image_BYX = Stack.open(simulated / "particles.mrcs").read(slice(0, len(table))).copy()
    image_BYX[70, 3, 3] = np.nan
    with StackWriter(tmp_path / "particles.mrcs", len(table), image_BYX.shape[1:], 6.0) as writer:
        writer.append(image_BYX)
    (tmp_path / "truth.star").write_bytes((simulated / "truth.star").read_bytes())
    port, words = free_port(), reconstruct(tmp_path / "truth.star", tmp_path / "refused")
    tasks = [started_by_srun(port, rank, *words) for rank in (0, 1)]
    said = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2] and said[1] == ""
    assert said[0].count("expected an image with finite") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    done = together(reconstruct(tmp_path / "truth.star", tmp_path / "left", "--skip-bad"))
    assert done.returncode == 0, done.stderr[-6000:]
    assert figures(tmp_path / "left")["particles"] == 80 and figures(tmp_path / "left")["images_left_out"] == 1


def test_two_processes_with_layers_of_volumes_refine_what_one_does(simulated: Path, tmp_path: Path) -> None:
    def words(out: Path) -> list[object]:
        given = ["--particles", simulated / "particles.star", "--reference", simulated / "start.mrc", "--diameter", 150]
        settings = ["--initial-resolution", 40, "--healpix-order", 1, "--max-iterations", 2, "--device", "cpu", "--threads", 1]
        return ["refine", *given, *settings, "--out", out]

    assert main([str(word) for word in words(tmp_path / "one")]) == 0
    done = together(words(tmp_path / "two"), VERGLAS_SHARE_VOLUMES="1")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "a layer of references and sums" in done.stderr and done.stderr.count("refine: done") == 1
    for name in ("run_class001.mrc", "run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc"):
        one, two = (read_map(next((tmp_path / folder).rglob(name))).data_ZYX for folder in ("one", "two"))
        assert np.abs(one - two).max() < 1e-4 * one.std()
    poses = [ParticleTable.read(next((tmp_path / folder).rglob("run_data.star"))).rotations() for folder in ("one", "two")]
    assert float((poses[0] - poses[1]).abs().max()) < 1e-5


REFINE_TWICE = """
import sys, verglas
particles, start = sys.argv[1:]
for seed in (1, 2):
    one = verglas.refine(particles, start, diameter=150, initial_resolution=40, healpix_order=1, max_iterations=1, seed=seed,
                         device="cpu", threads=1)
    found = one.run()
    row = seed, one.ranks.rank, one.ranks.size, found.resolution, found.map.data_ZYX.std(), len(found.particles)
    sys.stdout.write(" ".join(map(str, row)) + chr(10))  # in one piece: the other process writes to the same pipe
"""


def test_every_process_of_a_script_gets_the_result_of_all(simulated: Path) -> None:
    """verglas.refine, twice in the same processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [sys.executable, "-c", REFINE_TWICE, str(simulated / "particles.star"), str(simulated / "start.mrc")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    alone, both = (subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
                   for words in (command, [*start, *command]))  # fmt: skip
    assert alone.returncode == 0 == both.returncode, both.stderr[-6000:]
    rows, rows_of_both = (sorted([*map(float, line.split())] for line in done.stdout.splitlines()) for done in (alone, both))
    assert [row[:3] for row in rows_of_both] == [[1, 0, 2], [1, 1, 2], [2, 0, 2], [2, 1, 2]]
    for found, expected in zip(rows_of_both, [rows[0], rows[0], rows[1], rows[1]], strict=True):
        assert found[3:] == pytest.approx(expected[3:], rel=0.01)  # one particle of 81 may be on an edge between two samples
    assert both.stderr == ""
