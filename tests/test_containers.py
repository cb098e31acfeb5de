"""The recipes of containers: they say the same, and what they copy is all that an installation needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKER, APPTAINER = (ROOT / "containers" / name for name in ("Dockerfile", "verglas.def"))


def test_both_recipes_do_the_same() -> None:
    docker, apptainer = DOCKER.read_text(), APPTAINER.read_text()
    assert re.search("FROM (.*)", docker)[1] == re.search("From: (.*)", apptainer)[1]  # type: ignore[index]
    for command in ("apt-get update .*", "pip install .*"):
        assert re.search(command, docker)[0] == re.search(command, apptainer)[0]  # type: ignore[index]
    copied = {word for line in re.findall("COPY (.*) /verglas", docker) for word in line.split()}
    assert copied == {word for word, _ in re.findall(r"^    (\S+) (/verglas/\S+)$", apptainer, re.MULTILINE)}
    variables = [set(re.findall(r"(\w+DIR)=", text)) for text in (docker, apptainer)]
    assert variables[0] == variables[1] == {"NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"}


def test_what_is_copied_can_be_installed(tmp_path: Path) -> None:
    for line in re.findall("COPY (.*) /verglas", DOCKER.read_text()):
        for word in line.split():
            copy = shutil.copytree if (ROOT / word).is_dir() else shutil.copy
            copy(ROOT / word, tmp_path / word)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "made"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=tmp_path, check=True, timeout=120)
    (wheel,) = (tmp_path / "made").glob("verglas-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"verglas/cli/main.py", "verglas/kernels/backproject/triton.py"} <= set(names)
    assert any(name.endswith("entry_points.txt") for name in names)
