"""Runs the kernel tests of the Triton versions in Triton's CPU interpreter: it must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Files, and which of their tests are of Triton.
SETS = {
    "images": (("test_kernels.py", "test_kernels_descend.py", "test_stride.py"), "triton or half_precision"),
    "points": (("test_nufft_kernels.py",), "tiles or all_axes"),
    "points by warps": (("test_nufft_warps.py",), "not memory_of_a_tile"),
}


@pytest.mark.parametrize("name", SETS)
def test_triton_kernels_in_the_interpreter(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: these tests run the Triton kernels on it")
    pytest.importorskip("triton", reason="Triton is not installed")
    files, chosen = SETS[name]
    paths = [str(Path(__file__).with_name(file)) for file in files]
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-p", "no:cacheprovider", "-k", chosen, *paths]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "SKIPPED" not in done.stdout, done.stdout[-500:]
    for file in files:
        assert f"{file}::" in done.stdout, f"no test of {file} was chosen"
