"""Runs the kernel tests of the Triton versions in Triton's CPU interpreter: it must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_triton_kernels_in_the_interpreter() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: tests/test_kernels.py runs the Triton kernels on it")
    pytest.importorskip("triton", reason="Triton is not installed")
    names = ("test_kernels.py", "test_kernels_descend.py", "test_nufft_kernels.py", "test_stride.py")
    test_files = [str(Path(__file__).with_name(name)) for name in names]
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-k", "triton or half_precision"]
    command = [sys.executable, "-m", "pytest", *options, *test_files]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
