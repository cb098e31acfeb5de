"""bricks.cu on the CPU, lane by lane (warp_on_cpu.h), against the float64 reference; on a GPU, the kernels themselves."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere
from verglas.kernels.backproject import Apart, backproject, bricks, choose_backproject
from verglas.kernels.backproject.reference import backproject_reference
from verglas.kernels.nvrtc import NvrtcError
from verglas.kernels.project import project

BRICK = (8, 8, 8)
HOST = """
#include "{header}"
#include "{source}"
extern "C" void run(float *accumulator, float *weights, Position *start, int4 *items, float *sampling, float4 *slices, int *table,
                    float *data, float *weight, float ax, float ay, float bx, float by, int n_items, int chunks,
                    int n_slices, int n_pixels, int reach, int half, float limit2) {{
    blockDim = {{1, 1}};
    threadIdx = {{0, 0}};
    for (blockIdx = {{0, 0}}; blockIdx.x < n_slices; ++blockIdx.x)
        slice_geometry(sampling, slices, ax, ay, bx, by, n_slices);
    gridDim = {{n_items, chunks}};
    for (int y = 0; y < chunks; ++y)
        for (int x = 0; x < n_items; ++x) {{
            blockIdx = {{x, y}};
            run_warp([=] {{
                backproject_bricks(accumulator, weights, start, items, slices, table, data, weight,
                                   n_slices, n_pixels, reach, half, limit2);
            }});
        }}
}}
"""


class Case:
    """Random slices in float32: every `padding` voxels, poses random unless given, weights unless left out."""

    def __init__(self, box: int, n_slices: int, padding: float = 2.0, radius: int | None = None, weighted: bool = True) -> None:
        generator = torch.Generator().manual_seed(box * 1000 + n_slices)
        self.rows = packed_sphere(padding * (radius or box // 2))
        self.coordinates = half_plane_pixels(box).coordinates_K3()
        self.sampling = (padding * random_rotations(n_slices, generator).transpose(1, 2)).float()
        self.data = torch.randn(n_slices, 2, len(self.coordinates), generator=generator)
        self.weight = torch.rand(n_slices, len(self.coordinates), generator=generator) if weighted else None

    def expected(self, columns: torch.Tensor | slice = slice(None), dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Sums of the given coordinates by the reference."""
        sums = torch.zeros(self.rows.count, 4, dtype=dtype)
        weight = None if self.weight is None else self.weight[:, columns].to(dtype)
        coordinates = self.coordinates[columns].to(dtype)
        backproject_reference(sums, self.rows, self.data[:, :, columns].to(dtype), weight, self.sampling.to(dtype), coordinates)
        return sums


@pytest.fixture(scope="module")
def warp(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """bricks.cu compiled for this processor."""
    return compiled(tmp_path_factory.mktemp("warp"))


def compiled(folder: Path, *more: str) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    header = Path(__file__).with_name("warp_on_cpu.h")
    (folder / "host.cpp").write_text(HOST.format(header=header, source=bricks.SOURCE))
    defines = [f"-DBRICK_{axis}={size}" for axis, size in zip("XYZ", BRICK)]
    options = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-shared", "-fPIC", *defines, *more]
    subprocess.run(["g++", *options, "host.cpp", "-o", "host.so"], cwd=folder, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(folder / "host.so"))


def on_cpu(
    warp: ctypes.CDLL, case: Case, chunks: int = 1, apart: Apart | None = None
) -> tuple[torch.Tensor, bricks.Lattice]:
    """Sums of the kernel's source, and the lattice it used. apart: where they go if not side by side."""
    lattice = bricks.lattice_of(case.coordinates)
    assert lattice is not None
    n_slices, n_pixels = len(case.sampling), len(case.coordinates)
    items = bricks._items(case.rows.radius, case.rows.half, BRICK, torch.device("cpu"))
    sums, slices = torch.zeros(case.rows.count, 4), torch.full((3 * n_slices, 4), torch.nan)
    into = (sums, None) if apart is None else (apart.data_V2, apart.weight_V)
    data = case.data if apart is None or apart.data_V2 is not None else None
    tensors = (*into, case.rows.start_ZY, items, case.sampling.contiguous(), slices, lattice.table, data, case.weight)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    sizes = (len(items), chunks, n_slices, n_pixels, lattice.reach, case.rows.half)
    warp.run(*pointers, *map(ctypes.c_float, lattice.basis), *map(ctypes.c_int, sizes), ctypes.c_float(case.rows.limit2))
    return sums, lattice


def test_tables_of_64_bits(tmp_path: Path) -> None:
    case = Case(6, 5)
    case.rows = replace(case.rows, start_ZY=case.rows.start_ZY.long())
    assert relative(on_cpu(compiled(tmp_path, "-DWIDE=1"), case)[0], case.expected()) < 2e-6


def test_data_and_weights_apart(tmp_path: Path) -> None:
    case = Case(6, 5)
    apart = compiled(tmp_path, "-DAPART=1")
    expected = case.expected()
    data_V2, weight_V, alone_V = torch.zeros(case.rows.count, 2), torch.zeros(case.rows.count), torch.zeros(case.rows.count)
    on_cpu(apart, case, 2, Apart(data_V2, weight_V))
    assert relative(data_V2, expected[:, :2]) < 2e-6 and relative(weight_V, expected[:, 2]) < 2e-6
    on_cpu(apart, case, 1, Apart(None, alone_V))
    assert relative(alone_V, expected[:, 2]) < 2e-6
    on_cpu(apart, case, 1, Apart(data_V2.zero_(), None))
    assert relative(data_V2, expected[:, :2]) < 2e-6


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "box, n_slices, padding", [(2, 1, 2.0), (6, 5, 2.0), (14, 9, 2.0), (14, 3, 1.0), (10, 4, 1.5), (8, 3, 3.0)]
)
def test_every_sample_is_added_once(warp: ctypes.CDLL, box: int, n_slices: int, padding: float) -> None:
    case = Case(box, n_slices, padding)
    assert relative(on_cpu(warp, case, chunks=2)[0], case.expected()) < 2e-6


def test_samples_beyond_the_radius_and_weights_left_out(warp: ctypes.CDLL) -> None:
    case = Case(12, 4, radius=4, weighted=False)
    sums, _ = on_cpu(warp, case)
    assert relative(sums, case.expected()) < 2e-6
    assert (sums[:, 2] == 0).all()


def test_poses_along_the_axes_and_oblique_lattices(warp: ctypes.CDLL) -> None:
    """Planes between bricks, samples at x = 0 and -0, steps of zero along an axis; magnification that shears the lattice."""
    case = Case(12, 8, radius=4)
    axes = torch.eye(3)
    turns = torch.stack([axes, axes[[1, 2, 0]], axes[[2, 0, 1]], -axes[[1, 0, 2]]])
    case.sampling[:4] = 2 * turns
    shear = torch.tensor([[1.05, 0.08, 0], [-0.03, 0.94, 0], [0, 0, 1]])
    case.sampling[4:] = case.sampling[4:] @ shear
    assert relative(on_cpu(warp, case)[0], case.expected()) < 2e-6


def test_repeated_pixels_are_left_to_the_caller(warp: ctypes.CDLL) -> None:
    case = Case(6, 5)
    twice = torch.cat([torch.arange(len(case.coordinates)), torch.tensor([0, 3])])
    case.coordinates, case.data = case.coordinates[twice].clone(), case.data[:, :, twice].contiguous()
    case.coordinates[-1] *= -1  # minus a stored point is the same lattice point
    assert case.weight is not None
    case.weight = case.weight[:, twice].contiguous()
    sums, lattice = on_cpu(warp, case)
    assert lattice.extra.tolist() == [len(twice) - 2, len(twice) - 1]
    assert relative(sums, case.expected(slice(0, len(twice) - 2))) < 2e-6


def test_frequencies_of_another_pixel_size_and_magnified_ones(warp: ctypes.CDLL) -> None:
    case = Case(12, 5, radius=5)
    matrix = torch.tensor([[0.83, 0.04, 0], [-0.01, 0.8, 0], [0, 0, 1]])
    case.coordinates = case.coordinates @ matrix.T
    assert relative(on_cpu(warp, case)[0], case.expected()) < 2e-6


def test_what_is_a_lattice() -> None:
    coordinates = half_plane_pixels(64).coordinates_K3()
    lattice = bricks.lattice_of(coordinates)
    assert lattice is not None and lattice.reach == 32 and sorted(map(abs, lattice.basis)) == [0, 0, 1, 1]
    assert len(lattice.extra) == 0 and int((lattice.table != 0).sum()) == 2 * len(coordinates) - 1
    assert bricks.lattice_of(coordinates * 1.37) is not None
    assert bricks.lattice_of(coordinates + torch.tensor([0.0, 0, 1])) is None
    assert bricks.lattice_of(coordinates[:1].clone()) is None
    curved = coordinates.clone()
    curved[:, 0] += 1e-4 * curved[:, 1] ** 2
    assert bricks.lattice_of(curved) is None


def test_without_nvrtc_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> None:
        raise NvrtcError("libnvrtc.so.99 was not found")

    monkeypatch.setattr(bricks, "kernels", missing)
    device = torch.device("cuda", 97)  # choices are kept by device
    with pytest.warns(UserWarning, match="Triton atomics.*because libnvrtc.so.99 was not found"):
        choice = choose_backproject(device, torch.float32)
    assert choice.name == "triton" and "libnvrtc.so.99" in choice.reason
    assert choose_backproject(device, torch.float64).name == "reference"
    assert choose_backproject("cpu", torch.float32).name == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("box, n_slices, padding", [(6, 5, 2.0), (14, 3, 1.0), (64, 300, 2.0), (100, 40, 1.5)])
def test_on_the_gpu(box: int, n_slices: int, padding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bricks, "FEWEST", 0)
    monkeypatch.setattr(bricks, "FEWEST_PER_VOXEL", 0)
    monkeypatch.setattr(bricks, "SLICES_PER_BLOCK", 128)
    case = Case(box, n_slices, padding)
    case.coordinates = case.coordinates[torch.cat([torch.arange(len(case.coordinates)), torch.tensor([0, 3])])]
    case.data, case.weight = torch.randn(n_slices, 2, len(case.coordinates)), torch.rand(n_slices, len(case.coordinates))
    sums = torch.zeros(case.rows.count, 4, device="cuda")
    inputs = [t.cuda() for t in (case.data, case.weight, case.sampling, case.coordinates)]
    bricks.backproject_bricks(sums, case.rows.to("cuda"), *inputs)
    rounding = relative(case.expected(dtype=torch.float32), case.expected())  # of positions: it grows with the radius
    assert relative(sums.cpu(), case.expected()) < max(1e-6, 1.5 * rounding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_adjoint_of_project_on_the_gpu() -> None:
    """<project(V), d> = <V, D>, by the kernels that "auto" takes."""
    case = Case(64, 1200)
    values = torch.randn(case.rows.count, 2, device="cuda")
    sampling, coordinates, data = case.sampling.cuda(), case.coordinates.cuda(), case.data.cuda()
    assert choose_backproject(values.device, torch.float32).name == "bricks"
    assert len(sampling) * len(coordinates) > bricks.FEWEST
    rows, sums = case.rows.to("cuda"), torch.zeros(case.rows.count, 4, device="cuda")
    backproject(sums, rows, data, None, sampling, coordinates)
    slices = project(values, rows, sampling, coordinates)
    left, right = (slices.double() * data).sum(), (values.double() * sums[:, :2]).sum()
    assert abs(left - right) < 1e-6 * slices.double().norm() * data.double().norm()


def test_bricks_of_a_layer_hold_its_cells_and_none_wholly_inside() -> None:
    device, half, inner, outer = torch.device("cpu"), 20, 11.3, 19.0
    whole, layer = (set(map(tuple, bricks._items(outer, half, BRICK, device, None, i)[:, :3].tolist())) for i in (0.0, inner))
    corners = torch.cartesian_prod(*(torch.tensor([0.0, size]) for size in BRICK))
    farthest = {brick: float((torch.tensor(brick) + corners).norm(dim=1).max()) for brick in whole}
    assert layer == {brick for brick in whole if farthest[brick] >= inner - 0.02} != whole
