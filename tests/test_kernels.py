"""One test over all versions of `project` and `backproject`: reference in float64, odd sizes, adjoint, gradient, edges."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import RowTable, dense_half, packed_sphere
from verglas.kernels import implementation_of
from verglas.kernels.backproject import Apart, backproject
from verglas.kernels.project import project
from verglas.testing import assert_adjoint

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What fresh memory holds in tests: float16 NaN in both halves of a word.
NAN = {torch.int16: 0x7FFF, torch.int32: 0x7E007E00, torch.float32: float("nan"), torch.float16: float("nan")}
DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda"}


def versions() -> list[pytest.param]:
    """All versions this machine can run; the Triton one in its interpreter (TRITON_INTERPRET=1) or on a GPU."""
    runnable = INTERPRETED or torch.cuda.is_available()
    skip = pytest.mark.skipif(not runnable, reason="Triton needs a GPU or TRITON_INTERPRET=1 (tests/test_triton_interpreter.py)")
    return [pytest.param("reference"), pytest.param("cpu"), pytest.param("triton", marks=skip)]


class Case:
    """Random inputs in float64 on the CPU: a volume, poses, pixels, slices and weights."""

    def __init__(self, box: int, n_slices: int, padding: float = 2.0, table: Callable[[float], RowTable] = packed_sphere,
                 radius: int | None = None) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(box * 1000 + n_slices)
        self.rows = table(padding * (radius or box // 2))
        self.pixels = half_plane_pixels(box, radius)
        self.coordinates = self.pixels.coordinates_K3(torch.float64)
        self.values = torch.randn(self.rows.count, 2, generator=generator, dtype=torch.float64)
        self.sampling = padding * random_rotations(n_slices, generator).transpose(1, 2)
        self.data = torch.randn(n_slices, 2, self.pixels.count, generator=generator, dtype=torch.float64)
        self.weight = torch.rand(n_slices, self.pixels.count, generator=generator, dtype=torch.float64)

    def project(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        device = DEVICES[name]
        arguments = (t.to(device, dtype) for t in (self.values, self.sampling, self.coordinates))
        values, sampling, coordinates = arguments
        return implementation_of("project", name)(values, self.rows.to(device), sampling, coordinates).cpu()

    def backproject(self, name: str, dtype: torch.dtype, weighted: bool = True) -> torch.Tensor:
        device = DEVICES[name]
        accumulator = torch.zeros(self.rows.count, 4, dtype=dtype, device=device)
        weight = self.weight.to(device, dtype) if weighted else None
        data, sampling, coordinates = (t.to(device, dtype) for t in (self.data, self.sampling, self.coordinates))
        implementation_of("backproject", name)(accumulator, self.rows.to(device), data, weight, sampling, coordinates)
        return accumulator.cpu()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", versions())
@pytest.mark.parametrize("box, n_slices", [(2, 1), (6, 5), (14, 3)])
def test_project_matches_reference(name: str, box: int, n_slices: int) -> None:
    case = Case(box, n_slices)
    assert relative(case.project(name, torch.float32), case.project("reference", torch.float64)) < 2e-6


@pytest.mark.parametrize("name", versions())
@pytest.mark.parametrize("box, n_slices", [(2, 1), (6, 5), (14, 3)])
def test_backproject_matches_reference(name: str, box: int, n_slices: int) -> None:
    case = Case(box, n_slices)
    assert relative(case.backproject(name, torch.float32), case.backproject("reference", torch.float64)) < 2e-6
    alone = case.backproject(name, torch.float32, weighted=False)
    assert relative(alone[:, :2], case.backproject("reference", torch.float64)[:, :2]) < 2e-6
    assert (alone[:, 2] == 0).all()


@pytest.mark.parametrize("name", [version for version in versions() if version.values != ("cpu",)])
def test_backproject_of_data_and_weights_apart(name: str) -> None:
    case, device = Case(6, 5), DEVICES[name]
    expected = case.backproject("reference", torch.float64)
    inputs = [t.to(device, torch.float32) for t in (case.data, case.weight, case.sampling, case.coordinates)]
    for wanted in ((True, True), (True, False), (False, True)):
        data_V2, weight_V = torch.zeros(case.rows.count, 2, device=device), torch.zeros(case.rows.count, device=device)
        sums = Apart(data_V2 if wanted[0] else None, weight_V if wanted[1] else None)
        given = inputs[0] if wanted[0] else None, *inputs[1:]
        implementation_of("backproject", name)(sums, case.rows.to(device), *given)
        for found, there, columns in zip((data_V2.cpu(), weight_V.cpu()[:, None]), wanted, ([0, 1], [2]), strict=True):
            assert relative(found, expected[:, columns]) < 2e-6 if there else bool((found == 0).all())


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("padding", [1.0, 1.5, 2.0])
def test_they_are_adjoint_in_float64(name: str, padding: float) -> None:
    case = Case(12, 7, padding)

    def adjoint(data: torch.Tensor) -> torch.Tensor:
        case.data = data
        return case.backproject(name, torch.float64, weighted=False)[:, :2]

    assert_adjoint(lambda v: case.project(name, torch.float64), adjoint, case.values, case.data, relative=1e-14)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_gradient_of_project_is_its_derivative(name: str) -> None:
    case = Case(6, 3)
    values = case.values.clone().requires_grad_()
    slices = project(values, case.rows, case.sampling, case.coordinates, name)
    (slices * case.data).sum().backward()
    assert values.grad is not None
    direction = torch.randn_like(case.values)
    moved = project(case.values + direction, case.rows, case.sampling, case.coordinates, "reference")
    unmoved = project(case.values, case.rows, case.sampling, case.coordinates, "reference")
    expected = ((moved - unmoved) * case.data).sum()  # linear: a finite step is exact
    assert torch.isclose((values.grad * direction).sum(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", versions())
def test_packed_rows_and_a_dense_cube_give_the_same_slices(name: str) -> None:
    packed, dense = Case(10, 4), Case(10, 4, table=dense_half)
    dense.sampling = packed.sampling
    dense.values.fill_(torch.nan)  # whatever the sphere does not hold must never be read with weight
    place = dense.rows.start_ZY.long()
    x, y, z = packed.rows.coordinates_V3().long().unbind(1)
    offset = dense.rows.half
    dense.values[place[z + offset, y + offset] + x] = packed.values
    expected = packed.project("reference", torch.float64)
    assert relative(dense.project(name, torch.float32), expected) < 2e-6


@pytest.mark.parametrize("name", versions())
def test_every_output_is_written_and_samples_outside_are_zero(name: str) -> None:
    case = Case(10, 3, radius=3)
    full = half_plane_pixels(10)
    case.coordinates = full.coordinates_K3(torch.float64)
    outside = full.x_K.double() ** 2 + full.y_K.double() ** 2 > 9.5
    slices = case.project(name, torch.float32)
    assert (slices[:, :, outside] == 0).all()
    assert (slices[:, :, ~outside] != 0).all()


@pytest.mark.parametrize("name", versions())
def test_identity_reads_the_stored_voxels(name: str) -> None:
    case = Case(8, 1)
    case.sampling = 2 * torch.eye(3, dtype=torch.float64)[None]
    slices = case.project(name, torch.float32)[0]
    rows, half = case.rows, case.rows.half
    for k in range(case.pixels.count):
        address = int(rows.start_ZY[half, 2 * int(case.pixels.y_K[k]) + half]) + 2 * int(case.pixels.x_K[k])
        assert torch.allclose(slices[:, k].double(), case.values[address], atol=1e-6)


def test_cpu_backprojection_is_bitwise_the_same_for_any_number_of_threads() -> None:
    import numba

    case, before = Case(14, 40), numba.get_num_threads()
    results = []
    try:
        for threads in (1, before):
            numba.set_num_threads(threads)
            results.append(case.backproject("cpu", torch.float32))
    finally:
        numba.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_cpu_backprojection_with_many_slabs_misses_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    from verglas.kernels.backproject import cpu

    case = Case(14, 40)
    case.sampling[:] = case.sampling[0]  # preferred view: nearly all cuts between slabs coincide
    monkeypatch.setattr(cpu.numba, "get_num_threads", lambda: 37)
    assert relative(case.backproject("cpu", torch.float32), case.backproject("reference", torch.float64)) < 2e-6


needs_triton = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")


@needs_triton
@pytest.mark.parametrize("corners", [4, 8])
@pytest.mark.parametrize("box, n_slices, radius", [(2, 1, None), (12, 9, None), (10, 3, 3)])
def test_cells_in_half_precision_give_the_same_slices(
    box: int, n_slices: int, radius: int | None, corners: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from verglas.kernels.project.cells import make_cells, project_cells

    case, device = Case(box, n_slices, radius=radius), DEVICES["triton"]
    case.coordinates = half_plane_pixels(box).coordinates_K3(torch.float64)
    case.sampling[0] = 2 * torch.eye(3)  # positions on voxels
    case.values = (case.values * 1000).half().double()
    expected = case.project("reference", torch.float64)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype, device=device).fill_(NAN[dtype]))
    cells = make_cells(case.values.half().to(device), case.rows.to(device), 0.5, corners)
    factor = torch.linspace(-1, 2, len(case.coordinates))
    for dtype, error in ((torch.float32, 2e-6), (torch.float16, 4e-4)):
        out = torch.full_like(expected, torch.nan, dtype=dtype, device=device)
        assert project_cells(cells, case.sampling.to(device), case.coordinates.to(device), factor, out) is out
        assert relative(out.cpu(), 0.5 * factor * expected) < error
    assert project_cells(cells, case.sampling.to(device), case.coordinates.to(device), 1e6 * factor, out).isfinite().all()
    with pytest.raises(TypeError, match="contiguous"):
        project_cells(cells, case.sampling.to(device), case.coordinates.to(device), factor, out.double())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("corners", [4, 8])
def test_a_sample_from_cells_is_two_loads_of_16_bytes(corners: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from verglas.kernels.project.cells import PATCHES, PIXELS, WARPS
    from verglas.kernels.project.cells import _project_cells_kernel as kernel

    types = {"words": "*i32", "plane": "*i32", "order": "*i64", "out": "*fp16"}
    types |= {"limit2": "fp32", "n_patches": "i32", "n_pixels": "i32", "half": "i32"}
    constants = {"CORNERS": corners, "PATCHES": PATCHES, "PIXELS": PIXELS}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned)
    ptx = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS}).asm["ptx"]
    assert ptx.count("ld.global.v4") == 2 * PATCHES * PIXELS // (32 * WARPS)


@needs_triton
def test_a_volume_with_cells_gives_slices_in_both_precisions() -> None:
    from verglas.projection.volume import FourierVolume

    generator = torch.Generator().manual_seed(3)
    volume = torch.randn(12, 12, 12, generator=generator)
    poses = random_rotations(9, generator)
    device = DEVICES["triton"]
    pixels = half_plane_pixels(12)
    factor = torch.rand(pixels.count, generator=generator)
    exact = FourierVolume.from_map(volume, dtype=torch.float64)
    halves = FourierVolume.from_map(volume, device=device, dtype=torch.float16)
    assert relative(halves.slices(poses, pixels.to(device)).cpu(), exact.slices(poses, pixels)) < 2e-6  # not from cells
    rounded = torch.empty(9, 2, pixels.count, dtype=torch.float16)
    expected = exact.slices(poses, pixels, factor, rounded)
    assert expected is rounded
    assert relative(halves.slices(poses, pixels.to(device), factor, rounded.to(device)).cpu(), expected.double()) < 5e-4


def test_backproject_adds_to_what_is_there() -> None:
    case = Case(6, 2)
    accumulator = torch.ones(case.rows.count, 4, dtype=torch.float64)
    backproject(accumulator, case.rows, case.data, case.weight, case.sampling, case.coordinates)
    expected = case.backproject("reference", torch.float64) + 1
    assert torch.allclose(accumulator, expected, rtol=1e-12)
