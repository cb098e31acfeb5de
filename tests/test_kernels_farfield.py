"""farfield.cu on the CPU, thread by thread (block_on_cpu.h), against the definition in float64; on a GPU, the kernels themselves."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from verglas.kernels import farfield as package
from verglas.kernels.farfield import Counted, Lit, along, cuda, farfield
from verglas.ptychography.noise import noise_named

KERNELS = {  # arguments of each: p pointer, i int, f float
    "rows_forward": "ppppiii", "rows_step": "pppppppiiii", "columns_slope": "pppppppiffi",
    "columns_along": "ppppppppppiiffi", "rows_back": "ppppppiiiii",
}  # fmt: skip
TYPES = {"p": ("void *", ctypes.c_void_p), "i": ("int", ctypes.c_int), "f": ("float", ctypes.c_float)}
LENGTHS = torch.tensor([0.0, -0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64)  # more than one launch takes


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
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", *(f"-D{define}" for define in defines)]
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


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the kernels run."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "kernel", functools.partial(on_cpu, tmp_path_factory.mktemp("farfield")))
        yield "cpu"


def case(
    shape: tuple[int, int], modes: int = 1, own: bool = False, noise: str = "amplitude", dtype: torch.dtype = torch.int16,
    positions: int = 3,
) -> tuple[Lit, Lit, Counted]:  # fmt: skip
    """Random fields (complex128), a step, and counts that fit the fields but for a part; some pixels bad and some empty."""
    draw = torch.Generator().manual_seed(sum(shape) + modes)

    def field(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.complex128)

    corner = torch.stack([torch.randint(0, high, (positions,), generator=draw) for high in (10, 6)], 1)
    corner[-1] = torch.tensor([9, 5])
    light = (positions if own else 1, modes, *shape)
    size = (shape[0] + 9, shape[1] + 5)
    lit, step = Lit(field(*size), 3 * field(*light), corner), Lit(0.1 * field(*size), 0.2 * field(*light), corner)
    wave = torch.fft.fft2(3 * field(positions + 1, modes, *shape), norm="ortho")
    counts = torch.poisson(wave.abs().square().sum(1), generator=draw)
    weight = (torch.rand(shape, generator=draw) > 0.1).double()
    stored = counts.to(dtype)
    stored[:, weight == 0] = torch.nan if dtype.is_floating_point else -1
    stored[:, 3, 4] = 0
    rows = torch.randperm(positions + 1, generator=draw)[:positions]
    scale = 0.8 + 0.4 * torch.rand(positions + 1, generator=draw, dtype=torch.float64)
    background = torch.rand(shape, generator=draw, dtype=torch.float64)
    return lit, step, Counted(stored, scale, rows, weight, background, noise_named(noise, 0.375))  # type: ignore[arg-type]


def single(lit: Lit, device: str) -> Lit:
    return Lit(lit.object_YX.to(device, torch.complex64), lit.light_BMYX.to(device, torch.complex64), lit.corner_B2.to(device))


def single_counts(counted: Counted, device: str) -> Counted:
    real = [one.to(device, torch.float32) for one in (counted.scale_N, counted.weight_YX, counted.background_YX)]
    return Counted(counted.counts_NYX.to(device), real[0], counted.rows_B.to(device), real[1], real[2], counted.noise)


CASES = [
    ((32, 64), {}), ((64, 32), {"modes": 3, "noise": "poisson", "dtype": torch.float32}), ((32, 32), {"own": True, "modes": 2}),
    ((32, 32), {"positions": 35, "dtype": torch.float16}), ((32, 128), {"positions": 1, "dtype": torch.int32}),
    ((256, 32), {"positions": 1}), ((32, 512), {"positions": 1}), ((32, 1024), {"positions": 1}),
]  # fmt: skip


@pytest.mark.parametrize("shape, options", CASES, ids=str)
def test_misfit_and_gradient(device: str, shape: tuple[int, int], options: dict[str, object]) -> None:
    lit, _, counted = case(shape, **options)  # type: ignore[arg-type]
    into = torch.zeros_like(lit.object_YX)
    sums, of_light = farfield(lit, counted, into, True, reference=True)
    found_into = torch.ones_like(lit.object_YX, dtype=torch.complex64, device=device)
    args = single(lit, device), single_counts(counted, device)
    found, found_light = farfield(*args, found_into, True)
    assert of_light is not None and found_light is not None and found_light.shape == lit.light_BMYX.shape
    assert (found.cpu() - sums).abs().max() < 1e-5 * sums.abs().max()
    assert (found_into.cpu() - 1 - into).norm() < 3e-6 * into.norm()
    assert (found_light.cpu() - of_light).norm() < 3e-6 * of_light.norm()
    again, none = farfield(*args, None, False)
    assert none is None and torch.equal(again, found)


@pytest.mark.parametrize("shape, options", CASES[:4], ids=str)
@pytest.mark.parametrize("fitted", [True, False])
def test_misfit_along_a_step(device: str, shape: tuple[int, int], options: dict[str, object], fitted: bool) -> None:
    lit, step, counted = case(shape, **options)  # type: ignore[arg-type]
    if not fitted:
        step = Lit(step.object_YX, step.light_BMYX[:0], step.corner_B2)
    expected = along(lit, step, counted, LENGTHS, reference=True)
    found = along(single(lit, device), single(step, device), single_counts(counted, device), LENGTHS.to(device))
    assert ((found.cpu() - expected).abs().max(0).values < 1e-5 * expected.abs().max(0).values).all()
    sums, _ = farfield(lit, counted, None, False, reference=True)
    assert expected[0, 0] == pytest.approx(float(sums[0]), rel=1e-12)


def test_definition_is_autograd() -> None:
    lit, step, counted = case((12, 10), modes=2, dtype=torch.float32)
    leaves = [one.clone().requires_grad_() for one in (lit.object_YX, lit.light_BMYX)]
    sums, _ = farfield(Lit(leaves[0], leaves[1], lit.corner_B2), counted, None, False, reference=True)
    sums[0].backward()
    into = torch.zeros_like(lit.object_YX)
    _, of_light = farfield(lit, counted, into, True, reference=True)
    for found, leaf in ((into, leaves[0]), (of_light, leaves[1])):
        assert leaf.grad is not None and found is not None
        assert (found - leaf.grad).abs().max() < 1e-9 * leaf.grad.abs().max()
    h = 1e-5
    low, _, high = along(lit, step, counted, torch.tensor([0.5 - h, 0.5, 0.5 + h], dtype=torch.float64), reference=True)
    middle = along(lit, step, counted, torch.tensor([0.5], dtype=torch.float64), reference=True)[0]
    assert middle[1] == pytest.approx(float((high - low)[0] / (2 * h)), rel=1e-5)
    assert middle[2] == pytest.approx(float((high - low)[1] / (2 * h)), rel=1e-5)


def test_what_the_kernels_cannot_take() -> None:
    assert package.why_not(torch.device("cpu"), torch.float32, (64, 64)) == "device cpu"
    assert "float64" in str(package.why_not(torch.device("cuda"), torch.float64, (64, 64)))
    assert "100 x 64 px" in str(package.why_not(torch.device("cuda"), torch.float32, (100, 64)))
    lit, _, counted = case((32, 32))
    with pytest.raises(TypeError, match="complex128"):
        farfield(lit, counted, None, False)
