"""One iteration beside relion_refine, by the benchmark that a user would run on other data; its promised rows must hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verglas.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PROMISED = {
    "noise spectra after",
    "rlnNormCorrection",
    "best pose (fine",
    "rlnMaxValueProbDistribution",
    "rlnNrOfSignificantSamples",
    "rlnLogLikeliContribution",
    "FSC of the maps",
}

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("relion_refine") is None, reason="needs relion_refine"),
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the benchmarks of the checkout"),
]


def first_iteration(*words: object) -> dict[str, bool]:
    """Run the benchmark; its promised rows and whether they passed. It has to say the same with its exit code."""
    command = [sys.executable, "-m", "benchmarks.first_iteration_vs_relion", *(str(word) for word in words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout, done.stderr[-6000:])
    verdicts = {line: "  pass" in line for line in done.stdout.splitlines() if "  pass" in line or "  FAIL" in line}
    assert done.returncode == (0 if verdicts and all(verdicts.values()) else 1)
    return verdicts


def assert_passed(verdicts: dict[str, bool], promised: set[str]) -> None:
    for name in promised:
        assert any(line.startswith(name) for line in verdicts), f"no row {name}"
    assert all(verdicts.values()), [line for line, passed in verdicts.items() if not passed]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 D2 particles of 40 px with poses, in two optics groups with beam tilt, backgrounds normalised as of real ones."""
    folder = tmp_path_factory.mktemp("first")
    words = ["--n", 120, "--box", 40, "--pixel", 4, "--sym", "D2", "--snr", 0.1, "--seed", 5, "--device", "cpu", "--voltage", 300,
             200, "--beam-tilt", 1, 0.5, "--beam-tilt-sigma", 0.5, "--per-micrograph", 30]  # fmt: skip
    assert main(["simulate", *(str(word) for word in words), "--out", str(folder / "set")]) == 0
    stack = ["stack", "--particles", str(folder / "set/truth.star"), "--normalise", "140", "--out", str(folder / "normalised")]
    assert main(stack) == 0
    return folder


def words_of(folder: Path) -> list[object]:
    return ["--particles", folder / "normalised/particles.star", "--reference", folder / "set/truth.mrc", "--symmetry", "D2",
            "--diameter", 130, "--initial-resolution", 30, "--healpix-order", 1]  # fmt: skip


def test_global_search(simulated: Path) -> None:
    assert_passed(first_iteration(*words_of(simulated)), PROMISED)


def test_old_offsets_and_a_noise_spectrum_and_scale_for_each_micrograph(simulated: Path) -> None:
    assert_passed(first_iteration(*words_of(simulated), "--keep-poses", "--scales"), PROMISED)


def test_local_search(simulated: Path) -> None:
    """Around poses that are known, the in-plane part of the prior by RELION's rule; without symmetry."""
    words = words_of(simulated)
    words[words.index("D2")], words[words.index(1)], words[words.index(30)] = "C1", 3, 20
    assert_passed(first_iteration(*words, "--local", 7.5, "--limit", 60), PROMISED)


def test_scored_by_correlation(simulated: Path) -> None:
    """With RELION's counting of coefficients; noise, norm and likelihoods are not updated."""
    assert_passed(first_iteration(*words_of(simulated), "--correlate"), {"noise spectra after", "best pose (fine"})


@pytest.mark.slow
def test_real_particles(shared: Path) -> None:
    particles = shared / "data/betagal_tutorial/particles_1391_with_poses.star"
    words = ["--particles", particles, "--symmetry", "D2", "--diameter", 200, "--initial-resolution", 40, "--limit", 200]
    assert_passed(first_iteration(*words), PROMISED)
