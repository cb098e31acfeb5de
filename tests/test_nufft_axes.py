"""The two slower axes of a fine grid by axes.cu: on the CPU, thread by thread (block_on_cpu.h), or on a GPU, against torch."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.farfield_on_cpu import TYPES, host

from verglas.nufft import axes
from verglas.nufft.fine import FineGrid

ARGUMENTS = "ppppp" + "iiiiiiiii"
SHAPES = [(5, 8, 7), (11, 6, 20), (16, 17, 40)]


@functools.lru_cache
def compiled(folder: Path, defines: tuple[str, ...], shared: int) -> ctypes.CDLL:
    """axes.cu for this processor."""
    own = folder / str(abs(hash((defines, shared))))
    own.mkdir()
    header = Path(__file__).with_name("block_on_cpu.h")
    start = f"#define ON_CPU\nalignas(16) static float2 shared_lines[{shared // 8}];\n"
    any_pointer = "struct Any { void *p; template <class T> operator T *() const { return (T *)p; } };\n"
    hosts = "".join(host(name, ARGUMENTS) for name in ("to_modes", "to_cells"))
    (own / "host.cpp").write_text(f'#include "{header}"\n{start}#include "{axes.SOURCE}"\n{any_pointer}{hosts}')
    options = ["-std=c++20", "-O1", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", *(f"-D{define}" for define in defines)]
    subprocess.run(["g++", *options, "host.cpp", "-o", "host.so"], cwd=own, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(own / "host.so"))


def on_cpu(folder: Path, name: str, device: torch.device, defines: tuple[str, ...], shared: int) -> Callable[..., None]:
    """What stands in for `axes.kernel`."""
    run = getattr(compiled(folder, defines, shared), f"run_{name}")

    def launch(grid: tuple[int, int], threads: int, *arguments: torch.Tensor | int | None) -> None:
        values = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
        run(*grid, threads, *(TYPES[kind][1](value) for kind, value in zip(ARGUMENTS, values, strict=True)))

    return launch


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the kernels run."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            yield "cuda"
            return
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        patch.setattr(axes, "kernel", functools.partial(on_cpu, tmp_path_factory.mktemp("axes")))
        patch.setattr(axes, "serves", lambda sizes, device, dtype: dtype == torch.float32)
        patch.setattr(axes, "COLUMNS", 4)
        patch.setattr(axes, "THREADS", 16)
        yield "cpu"


def test_grids_that_the_kernels_take() -> None:
    gpu = torch.device("cuda")
    assert axes.serves((640, 640, 640), gpu, torch.float32) and axes.serves((900, 1024, 34), gpu, torch.float32)
    assert axes.serves((2048, 2048, 2048), gpu, torch.float32) and axes.passes(640) == (8, 8, 2, 5)
    for sizes, dtype in (((640, 640), torch.float32), ((640, 640, 640), torch.float64), ((640, 34, 640), torch.float32)):
        assert not axes.serves(sizes, gpu, dtype)
    assert not axes.serves((640, 640, 640), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_both_ways(shape: tuple[int, ...], sign: int, device: str) -> None:
    """Against axis by axis in double precision; two vectors."""
    one = FineGrid.of(shape, 1e-3, 1.25, device, torch.float32)
    other = FineGrid(one.shape, one.sizes, one.window, torch.device("cpu"), torch.float64)
    generator = torch.Generator().manual_seed(1)
    grid = torch.randn(2, *one.sizes, 2, generator=generator, dtype=torch.float64)
    modes = torch.randn(2, *shape, generator=generator, dtype=torch.complex128)
    for found, wanted in (
        (one.modes(grid.to(device, torch.float32), sign), other.modes(grid, sign)),
        (one.grid(modes.to(device, torch.complex64), sign), other.grid(modes, sign)),
    ):
        assert found.shape == wanted.shape and found.is_contiguous()
        assert float((found.cpu() - wanted).abs().max()) < 2e-6 * float(wanted.abs().max())


def test_more_vectors_than_a_launch_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = FineGrid.of(SHAPES[0], 1e-3, 1.25, device, torch.float32)
    modes = torch.randn(5, *SHAPES[0], generator=torch.Generator().manual_seed(1), dtype=torch.complex64).to(device)
    wanted = one.grid(modes, 1)
    monkeypatch.setattr(axes, "MOST_GRID", 2 * max(*one.sizes, *one.shape))
    torch.testing.assert_close(one.grid(modes, 1), wanted)
