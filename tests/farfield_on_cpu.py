"""farfield.cu compiled for this processor, thread by thread (block_on_cpu.h), in place of a GPU's kernels. For tests."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from verglas.kernels.farfield import cuda

KERNELS = {  # arguments of each: p pointer, i int, f float
    "rows_forward": "ppppii", "rows_step": "pppppppii", "columns_slope": "pppppppiffi",
    "columns_along": "ppppppppppiiffi", "rows_back": "pppppppppiiii", "rows_products": "pppppppii",
    "columns_light": "pppi", "columns_light_back": "pppiii",
}  # fmt: skip
TYPES = {"p": ("void *", ctypes.c_void_p), "i": ("int", ctypes.c_int), "f": ("float", ctypes.c_float)}


def host(name: str, kinds: str) -> str:
    """A launch of a kernel, callable from Python."""
    arguments = ", ".join(f"{TYPES[kind][0]} a{i}" for i, kind in enumerate(kinds))
    given = ", ".join(f"Any{{a{i}}}" if kind == "p" else f"a{i}" for i, kind in enumerate(kinds))
    body = f"run_grid({{gx, gy, 1}}, threads, [=] {{ {name}({given}); }});"
    return f'extern "C" void run_{name}(int gx, int gy, int threads, {arguments}) {{ {body} }}\n'


@functools.lru_cache
def compiled(folder: Path, defines: tuple[str, ...]) -> ctypes.CDLL:
    """farfield.cu for this processor."""
    own = folder / str(abs(hash(defines)))
    own.mkdir()
    header = Path(__file__).with_name("block_on_cpu.h")
    any_pointer = "struct Any { void *p; template <class T> operator T *() const { return (T *)p; } };\n"
    hosts = "".join(host(name, kinds) for name, kinds in KERNELS.items())
    (own / "host.cpp").write_text(f'#include "{header}"\n#include "{cuda.SOURCE}"\n{any_pointer}{hosts}')
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    options += [f"-D{define}" for define in defines]
    subprocess.run(["g++", *options, "host.cpp", "-o", "host.so"], cwd=own, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(own / "host.so"))


def on_cpu(folder: Path, name: str, device: torch.device, defines: tuple[str, ...]) -> Callable[..., None]:
    """What stands in for `cuda.kernel`."""
    run = getattr(compiled(folder, defines), f"run_{name}")

    def launch(grid: tuple[int, int], threads: int, *arguments: Tensor | float | None) -> None:
        kinds = [TYPES[kind][1] for kind in KERNELS[name]]
        values = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
        run(*grid, threads, *(kind(value) for kind, value in zip(kinds, values, strict=True)))

    return launch


def device_of_kernels(folder: Path) -> Iterator[str]:
    """Where the kernels run: "cuda" where there is a GPU, else "cpu", on which farfield.cu then stands in for them."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "kernel", functools.partial(on_cpu, folder))
        yield "cpu"
