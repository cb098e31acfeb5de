"""Several processes, one run: who they are, who works on what, and that two of them find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from verglas.cli import launch
from verglas.cli.launch import gpus_wanted
from verglas.cli.main import main
from verglas.distributed.place import Place, first_host, place_of
from verglas.errors import InputError
from verglas.io.mrc import Stack, read_map
from verglas.particles.table import ParticleTable


def test_places_are_read_from_torchrun_and_srun() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place_of(torchrun) == Place(3, 8, 1, 2)
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[07-09,12]",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "123456"}  # fmt: skip
    place = place_of(srun)
    assert place == Place(2, 4, 0, 2, ("gpu07", 20000 + 123456 % 20000))
    assert place_of(srun | {"MASTER_ADDR": "head", "MASTER_PORT": "5"}) == Place(2, 4, 0, 2, ("head", 5))


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}])
def test_a_process_may_stand_alone(environment: dict[str, str]) -> None:
    assert place_of(environment) is None  # the last one: a batch script, which Slurm gives these, too


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(("environment", "named"), [
    (TORCHRUN | {"RANK": "2"}, "RANK"), (TORCHRUN | {"RANK": "one"}, "RANK"), (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR"), (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
    (SRUN | {"SLURM_LOCALID": ""}, "SLURM_LOCALID"), (SRUN | {"SLURM_PROCID": "7"}, "SLURM_PROCID"),
    (SRUN | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"), (SRUN | {"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS"),
])  # fmt: skip
def test_an_environment_that_makes_no_sense_is_refused(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("verglas.cli.main.LAST_WORDS", 0.0)
    words = ["reconstruct", "--particles", "none.star", "--out", "none", "--device", "cpu"]
    assert main(words) == 2
    assert named in capsys.readouterr().err


def test_first_host_of_a_list() -> None:
    assert [first_host(text) for text in ("n1", "n1,n2", "gpu[3-5]", "a[01,07]-x,b")] == ["n1", "n1", "gpu3", "a01"]


@pytest.mark.parametrize("text", ["none", "1,1", "0,x", "0", "4096", ","])
def test_gpus_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--gpus"):
        gpus_wanted(text)


def test_gpus_are_counted_among_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpus_there", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a,7")
    assert gpus_wanted("0,2") == (2, "4,7") and gpus_wanted("1,0") == (2, "GPU-5a,4") and gpus_wanted("all") == (3, None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_wanted("0,2") == (2, "0,2")
    for name, value in {"STEP_NUM_TASKS": "2", "PROCID": "0", "LOCALID": "0", "STEP_NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(InputError, match="srun"):
        gpus_wanted("2")


WORDS = {
    "refine": ["--reference", "start.mrc", "--initial-resolution", "40", "--healpix-order", "1", "--max-iterations", "2"],
    "classify3d": ["--reference", "start.mrc", "--classes", "2", "--healpix-order", "1", "--iterations", "3"],
    "classify2d": ["--classes", "3", "--iterations", "3", "--psi-step", "30"],
    "abinitio": ["--steps", "20", "--batch", "30"],
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "set"
    words = ["simulate", "--n", "80", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--out", str(out)]) == 0
    return out


def command(name: str, folder: Path, out: Path) -> list[str]:
    words = [str(folder / word) if word.endswith(".mrc") else word for word in WORDS[name]]
    return [name, "--particles", str(folder / "particles.star"), "--diameter", "150", "--device", "cpu", "--threads", "1",
            "--out", str(out), *words]  # fmt: skip


def together(words: list[str], ranks: int = 2, start: Sequence[str] = ("-m", "verglas")) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *start]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *words], capture_output=True, text=True, check=False, env=one_thread, timeout=300)


def result(path: Path) -> np.ndarray:
    if path.suffix == ".mrc":
        return read_map(path).data_ZYX
    stack = Stack.open(path)
    return np.asarray(stack.read(np.arange(stack.n)))


def check_same(folder: Path) -> None:
    """The runs `one` and `two` in a folder ended alike."""
    tables = [ParticleTable.read(sorted((folder / name).glob("run*_data.star"))[-1]) for name in ("one", "two")]
    turned_B = (tables[0].rotations() - tables[1].rotations()).abs().amax((1, 2))
    assert float((turned_B < 1e-4).double().mean()) >= 0.97  # of 80: two may be on an edge between two samples
    one, two = (result(sorted((folder / name).glob("run*_class*.mrc*"))[-1]) for name in ("one", "two"))
    assert np.abs(one - two).max() < 0.02 * one.std()


@pytest.mark.parametrize("name", WORDS)
def test_two_processes_find_what_one_finds(name: str, simulated: Path, tmp_path: Path) -> None:
    assert main(command(name, simulated, tmp_path / "one")) == 0
    done = together(command(name, simulated, tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Warning" not in done.stderr and done.stderr.count(f"{name}: done in") == 1
    check_same(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    sent = [event["communication"] for event in events if event["event"] == "iteration"]
    if name == "refine":  # others take some of the particles at a time
        for one in sent:
            assert sum(work["worked"] for work in one["work"]) == sum(work["owned"] for work in one["work"]) == 80
    assert all(one["ranks"] == 2 and min(one["bytes_of_ranks"]) > 0 and "poses" in one["by_name"] for one in sent)


def test_a_slow_rank_gives_particles_away_and_the_result_stays(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two ranks takes five times as long for every block; images stay in their files, so that all are read anew."""
    words = [*command("refine", simulated, tmp_path / "one"), "--image-memory", "0.0001"]
    assert main(words) == 0
    words[words.index("--out") + 1] = str(tmp_path / "two")
    monkeypatch.setenv("VERGLAS_SLOW_RANK", "1:0.2")
    done = together(["as-rank", *words], start=["-m", "benchmarks.slow_rank"])
    assert done.returncode == 0, done.stderr[-6000:]
    assert "particles went to quicker ones" in (tmp_path / "two" / "run.log").read_text()
    check_same(tmp_path)


def test_only_the_lead_says_what_is_wrong(simulated: Path, tmp_path: Path) -> None:
    words = command("refine", simulated, tmp_path / "out")
    words[words.index("--diameter") + 1] = "-5"
    launch = [sys.executable, "-c", "import sys; from verglas.cli.launch import run; sys.exit(run(lambda: 2, sys.argv[1:], 0))"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --diameter: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
