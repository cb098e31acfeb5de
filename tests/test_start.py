"""What a command imports before it works, and in which order: on a GPU seconds of every run (benchmarks.timeline shows them)."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.core.imports import importing
from verglas.io.mrc import StackWriter

# What no run of `reconstruct` needs: gemmi reads odd tables, the rest is of other commands, of terminals or of compilers.
NEVER = {
    "gemmi", "h5py", "mrcfile", "starfile", "healpy", "finufft", "rich", "triton", "sympy", "torch._dynamo", "torch._inductor"
}  # fmt: skip
# What only the work itself may need (on a GPU it does not), never what goes before.
LATE = {"numba", "scipy", "matplotlib", "jinja2", "PIL", "verglas.expectation", "verglas.report.page"}
HEAVY = {"torch", "numpy", "pandas", "pyarrow"}

STAR = """
data_optics

loop_
_rlnOpticsGroup #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnImagePixelSize #5
_rlnImageSize #6
_rlnImageDimensionality #7
1 300 2.7 0.1 1.0 16 2

data_particles

loop_
_rlnImageName #1
_rlnAngleRot #2
_rlnAngleTilt #3
_rlnAnglePsi #4
_rlnDefocusU #5
_rlnDefocusV #6
_rlnDefocusAngle #7
_rlnOpticsGroup #8
"""


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of noise, 16 px, with poses."""
    folder, rng = tmp_path_factory.mktemp("particles"), np.random.default_rng(0)
    with StackWriter(folder / "some.mrcs", 30, (16, 16), 1.0, "float32") as stack:
        stack.append(rng.normal(size=(30, 16, 16)).astype(np.float32))
    angles = enumerate(rng.uniform(0, 180, (30, 3)), 1)
    rows = [f"{i}@some.mrcs {rot:.2f} {tilt:.2f} {psi:.2f} 9000 8800 30 1" for i, (rot, tilt, psi) in angles]
    (folder / "some.star").write_text(STAR + "\n".join(rows) + "\n")
    return folder / "some.star"


def loaded(code: str) -> set[str]:
    """The modules that a new process has after this code."""
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def reconstruct(particles: Path, out: Path, before: str = "") -> str:
    words = ["reconstruct", "--particles", str(particles), "--out", str(out), "--device", "cpu"]
    return f"from verglas.cli.main import main\n{before}\nassert main({words!r}) == 0"


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["reconstruct", "--help"], ["refine", "--bad"]])
def test_nothing_heavy_is_loaded_before_there_is_work(words: list[str]) -> None:
    assert not loaded(f"from verglas.cli.main import main; main({words!r})") & (HEAVY | LATE)


def test_a_whole_run_loads_no_module_of_others(particles: Path, tmp_path: Path) -> None:
    found = loaded(reconstruct(particles, tmp_path / "out"))
    assert found & HEAVY == HEAVY and not found & NEVER
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_goes_before_the_work_loads_neither_compilers_nor_drawing(particles: Path, tmp_path: Path) -> None:
    stop = """
import sys, verglas.cli.reconstruct as command
def announce(*rest):
    print(*sys.modules)
    sys.stdout.flush()
    import os; os._exit(0)
command.announce = announce
"""
    done = subprocess.run(
        [sys.executable, "-c", reconstruct(particles, tmp_path / "out", stop)], capture_output=True, text=True, check=True
    )
    found = set(done.stdout.split())
    assert "torch" in found and not found & (LATE | NEVER)


def test_drawing_begins_before_pytorch_is_imported_where_a_gpu_is_likely(particles: Path, tmp_path: Path) -> None:
    watched = """
import sys, verglas.cli.reconstruct_report as report, verglas.cli.painters as painters
report.gpu_likely = lambda choice: True
began, drawn = [], []
class Painters(painters.Painters):
    def __init__(self, count):
        began.append("torch" in sys.modules or "numpy" in sys.modules)
        super().__init__(count)
    def draw(self, named):
        drawn.append([name for name, _ in named])
        return super().draw(named)
painters.Painters = Painters
"""
    told = "\nassert began == [False], began\nassert drawn[0] == ['views'] and len(drawn) == 2, drawn"
    found = loaded(reconstruct(particles, tmp_path / "out", watched) + told)
    assert "matplotlib" not in found
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "Viewing directions" in page


@pytest.mark.parametrize("words", [
    "refine --particles no.star --reference no.mrc --diameter 9 --out o", "abinitio --particles no.star --diameter 9 --out o",
    "solve --particles no.star --diameter 9 --out o", "ptycho reconstruct --scan no.h5 --out o",
    "reconstruct --particles no.star --out o", "postprocess --half1 a.mrc --half2 b.mrc --out o",
    "simulate --model no.pdb --n 9 --box 32 --pixel 3 --out o", "stack --particles no.star --out o",
])  # fmt: skip
def test_the_gpu_is_woken_before_pytorch_is_imported(words: str, tmp_path: Path) -> None:
    code = """
import sys, verglas.cli.common as common
from verglas.cli.main import main
woken = []
common.wake_gpu = lambda choice: woken.append("torch" in sys.modules)
assert main(sys.argv[1:]) == 2
assert woken == [False], woken
"""
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", ["reconstruct --out o", "refine --reference no.mrc --diameter 9 --out o"])
def test_large_packages_are_imported_while_the_collector_of_garbage_rests(words: str, tmp_path: Path) -> None:
    code = """
import gc, sys
from verglas.cli.main import main
seen = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "pandas"):
            seen[name] = gc.isenabled()
sys.meta_path.insert(0, Watch())
assert main(sys.argv[1:]) == 2
assert seen == {"torch": False, "pandas": False}, seen
assert gc.isenabled() and gc.get_freeze_count() > 10000
"""
    command = [sys.executable, "-c", code, *words.split(), "--particles", "no.star"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_collector_of_a_program_that_has_imported_pytorch_is_left_alone() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_triton_is_loaded_ahead_only_where_a_call_has_too_few_samples_for_bricks(monkeypatch: pytest.MonkeyPatch) -> None:
    from verglas.maximization import ahead
    from verglas.maximization.reconstruct import Geometry

    begun: list[int] = []
    monkeypatch.setattr(ahead, "_begin", lambda *work: begun.append(len(work)))
    for fewest in (400, 200, 20, 0):  # of 3.9e3 samples each: a million is the least
        ahead.of_adding(Geometry(100, 1.0, 50), torch.device("cpu"), fewest)
    assert [works - begun[0] for works in begun] == [0, 1, 1, 1]


def test_first_steps_on_a_gpu_run_and_import_no_table() -> None:
    code = "import torch; from verglas.maximization.ahead import first_steps; first_steps(torch.device('cpu'))"
    assert not loaded(code) & {"pandas", "numba", "scipy", "triton"}  # its thread hides errors: here they would be seen


def test_moments_of_planes_are_those_of_the_host() -> None:
    from verglas.cli.reconstruct_files import moments_on_device
    from verglas.io.mrc import moments_of

    map_ZYX = 3 + torch.randn(5, 40, 30, generator=torch.Generator().manual_seed(0))
    assert moments_on_device(map_ZYX) == pytest.approx(moments_of(map_ZYX.numpy()), rel=1e-12)


def test_a_log_file_gets_plain_lines_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from verglas.io import progress

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert progress.console() is None
    long = "[bold]not markup[/bold], and a line of more than the 80 columns that rich takes where there is no terminal"
    progress.say(long)
    progress.say_facts("title", {"one": "1", "empty": ""})
    assert capsys.readouterr().err.splitlines() == [long, "title", "  one: 1"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert progress.console() is not None
