"""One test over all versions of `patches` and `overlay`: against indexing, adjoint to each other, every number written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verglas.kernels import implementation_of
from verglas.kernels.overlay import overlay
from verglas.kernels.patches import patches
from verglas.testing import assert_adjoint

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda"}
CASES = [(1, 1, 1, (1, 1)), (7, 1, 1, (16, 12)), (5, 2, 3, (33, 41))]


def versions() -> list[pytest.param]:
    runnable = INTERPRETED or torch.cuda.is_available()
    skip = pytest.mark.skipif(not runnable, reason="Triton needs a GPU or TRITON_INTERPRET=1 (test_in_the_interpreter)")
    return [pytest.param("reference"), pytest.param("cpu"), pytest.param("triton", marks=skip)]


def inputs(batch: int, modes: int, slices: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Object, corners (the outermost ones among them) and windows, complex128."""
    generator = torch.Generator().manual_seed(batch)
    height, width = shape[0] + 9, shape[1] + 5
    image = torch.randn(modes, slices, height, width, generator=generator, dtype=torch.complex128)
    corner = torch.stack([torch.randint(0, high, (batch,), generator=generator) for high in (10, 6)], 1)
    corner[-1] = torch.tensor([9, 5])
    window = torch.randn(batch, modes, slices, *shape, generator=generator, dtype=torch.complex128)
    return image, corner, window


@pytest.mark.parametrize("name", versions())
@pytest.mark.parametrize("case", CASES)
def test_all_versions_agree(name: str, case: tuple[int, int, int, tuple[int, int]]) -> None:
    image, corner, window = (t.to(DEVICES[name]) for t in inputs(*case))
    image, window = image.to(torch.complex64), window.to(torch.complex64)
    cut = implementation_of("patches", name)(image, corner, case[3])
    for b, (y, x) in enumerate(corner.tolist()):
        assert torch.equal(cut[b], image[:, :, y : y + case[3][0], x : x + case[3][1]])
    expected = image.cdouble()
    for b, (y, x) in enumerate(corner.tolist()):
        expected[:, :, y : y + case[3][0], x : x + case[3][1]] += window[b]
    summed = implementation_of("overlay", name)(window, corner, image.clone())
    assert (summed - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_adjoint(name: str) -> None:
    image, corner, window = inputs(5, 2, 3, (33, 41))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(patches(torch.view_as_complex(x), corner, (33, 41), name))

    def adjoint(y: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(overlay(torch.view_as_complex(y), corner, torch.zeros_like(image), name))

    assert_adjoint(forward, adjoint, torch.view_as_real(image), torch.view_as_real(window))


def test_in_the_interpreter() -> None:
    if torch.cuda.is_available() or INTERPRETED:
        pytest.skip("the Triton kernels run in test_all_versions_agree")
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-k", "triton", str(Path(__file__))]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "3 passed" in done.stdout, done.stdout[-500:]
