"""axes.cu and shells.cu compiled for this processor, thread by thread (block_on_cpu.h), in place of a GPU's. For tests."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from tests.farfield_on_cpu import TYPES, host
from torch import Tensor

from verglas.maximization import shells
from verglas.projection import axes

KERNELS = {  # arguments of each: p pointer, i int, f float
    "to_y": "ppppppppiiiifiiiii", "to_z": "ppppiii", "to_x": "pppiiif",
    "from_x": "ppppiiiiiiif", "from_z": "ppppiii", "from_y": "ppppppiiii", "sum_outside": "pppiii", "finish": "pppiii",
}  # fmt: skip
OF_SHELLS = {"shell_sums": "pppppp" + "iiiiiff", "fsc_sums": "pppppppppp" + "iiiiiiiiii", "divide_voxels": "pppppiifi",
             "add_prior": "ppppiifi", "averages": "pppppppp" + "iiiiii"}  # fmt: skip
ROOM = {axes: "alignas(16) static float2 shared_lines", shells: "static double shared_sums"}


@functools.lru_cache
def compiled(source: ModuleType, folder: Path, defines: tuple[str, ...], shared: int) -> ctypes.CDLL:
    """axes.cu or shells.cu for this processor."""
    own = folder / str(abs(hash((source.__name__, defines, shared))))
    own.mkdir()
    header = Path(__file__).with_name("block_on_cpu.h")
    numbers = f"#define ON_CPU\n{ROOM[source]}[{shared // 8}];\n"
    any_pointer = "struct Any { void *p; template <class T> operator T *() const { return (T *)p; } };\n"
    filling = any(define.startswith("KIND=") for define in defines)
    there = OF_SHELLS if source is shells else {name: kinds for name, kinds in KERNELS.items() if (name == "to_y") == filling}
    hosts = "".join(host(name, kinds) for name, kinds in there.items())
    (own / "host.cpp").write_text(f'#include "{header}"\n{numbers}#include "{source.SOURCE}"\n{any_pointer}{hosts}')
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    options += [f"-D{define}" for define in defines]
    subprocess.run(["g++", *options, "host.cpp", "-o", "host.so"], cwd=own, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(own / "host.so"))


def on_cpu(
    source: ModuleType, folder: Path, name: str, device: torch.device, defines: tuple[str, ...], shared: int
) -> Callable[..., None]:
    """What stands in for `kernel` of a module."""
    run = getattr(compiled(source, folder, defines, shared), f"run_{name}")

    def launch(grid: tuple[int, int], threads: int, *arguments: Tensor | float | None) -> None:
        kinds = [TYPES[kind][1] for kind in (KERNELS | OF_SHELLS)[name]]
        values = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
        run(*grid, threads, *(kind(value) for kind, value in zip(kinds, values, strict=True)))

    return launch
