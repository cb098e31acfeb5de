"""`match` against its definition: odd sizes, ragged lists, fresh memory full of NaN; Triton on a GPU or interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere
from verglas.kernels import implementation_of
from verglas.kernels.blocks import Blocks
from verglas.kernels.match import Source, match

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
NAN = {torch.int32: 0x7E007E00, torch.float32: float("nan"), torch.float16: float("nan")}  # float16 NaN in both halves of a word
ROWS, IMAGES = 40, 7
LISTS = {
    "ragged": [(0, 3), (5, 4), (1, 1), (17, 2), (3, 0), (40, 7), (0, 0), (2, 5)],
    "one": [(1, 1)],
    "nothing": [(0, 0), (0, 4), (3, 0)],
}
VERSIONS = [
    "cpu",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU or TRITON_INTERPRET=1")
    ),
]


def lists(sizes: list[tuple[int, int]], images: int = IMAGES) -> Blocks:
    """Random slices in no order and random shifts of each particle."""
    slices = [torch.randperm(ROWS)[:n] for n, _ in sizes]
    shifts = [torch.randperm(images)[:m].sort().values for _, m in sizes]
    ptr = [torch.tensor([0] + [len(one) for one in part]).cumsum(0) for part in (slices, shifts)]
    return Blocks.build(ptr[0], torch.cat(slices), ptr[1], torch.cat(shifts))


def moved(thing: Blocks, device: str) -> Blocks:
    """The same lists on another device."""
    return Blocks.build(*(getattr(thing, name).to(device) for name in ("slice_ptr_B1", "slice_N", "shift_ptr_B1", "shift_M")))


def check(name: str, box: int, blocks: Blocks, monkeypatch: pytest.MonkeyPatch, images: int = IMAGES, padded: int = 0) -> None:
    """Inputs in float16 for Triton, float32 for the CPU; images that no list names are NaN. Scores relative to the largest."""
    rows, pixels = packed_sphere(float(box)), half_plane_pixels(box)
    coordinates = torch.cat([pixels.coordinates_K3()[:, :2], torch.zeros(padded, 2)])
    count = len(coordinates)
    values = torch.randn(rows.count, 2).half()
    factor = torch.rand(count) * coordinates.ne(0).any(1)
    sampling = 2 * random_rotations(ROWS, torch.Generator().manual_seed(1)).transpose(1, 2)
    shifted = torch.full((blocks.particles, images, 2, count), torch.nan)
    for i in range(blocks.particles):
        used = blocks.lists(i)[1]
        shifted[i, used] = torch.randn(len(used), 2, count)
    weight = torch.rand(blocks.particles, count)
    shifted = shifted.half() if name == "triton" else shifted
    device = DEVICE if name == "triton" else "cpu"
    expected = match(Source(values, rows, 0.5, None, coordinates, factor), sampling, shifted, weight.double(), blocks)
    empty = torch.empty
    if name == "triton":
        from verglas.kernels.project.cells import make_cells

        monkeypatch.setattr(
            torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype, device=device).fill_(NAN[dtype])
        )
        cells = make_cells(values.to(device), rows.to(device), 0.5)
    else:
        monkeypatch.setattr(torch, "empty", lambda *size, dtype: empty(*size, dtype=dtype).fill_(NAN.get(dtype, 0)))
        cells = None
    source = Source(values.to(device), rows.to(device), 0.5, cells, coordinates.to(device), factor.to(device))
    on = [thing.to(device) for thing in (sampling, shifted, weight)]
    score = implementation_of("match", name)(source, *on, moved(blocks, device)).cpu()
    monkeypatch.undo()
    assert score.dtype == torch.float32 and score.shape == expected.shape
    if len(score):
        # The rounding of a slice turns on the last bit of its single-precision positions: a float16 bit now and then.
        assert float((score - expected).abs().max() / expected.abs().max()) < (1e-4 if name == "triton" else 1e-5)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("box, padded", [(6, 0), (10, 3)])
def test_match_is_its_definition(name: str, sizes: str, box: int, padded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    check(name, box, lists(LISTS[sizes]), monkeypatch, padded=padded)


@pytest.mark.parametrize("name", VERSIONS)
def test_more_shifts_than_a_program_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    check(name, 4, lists([(5, 131), (33, 140)], 140), monkeypatch, 140)


def test_particles_at_once_do_not_matter_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from verglas.kernels.match import cpu

    torch.manual_seed(3)
    monkeypatch.setattr(cpu, "NUMBERS_AT_ONCE", 500)
    check("cpu", 6, lists(LISTS["ragged"]), monkeypatch)


def test_double_precision_runs_the_reference() -> None:
    rows, pixels = packed_sphere(6.0), half_plane_pixels(6)
    source = Source(
        torch.randn(rows.count, 2).double(), rows, 1.0, None, pixels.coordinates_K3()[:, :2], torch.ones(pixels.count)
    )
    blocks = lists([(2, 2)])
    shifted, weight = torch.randn(1, IMAGES, 2, pixels.count).double(), torch.rand(1, pixels.count).double()
    sampling = 2 * random_rotations(ROWS, torch.Generator().manual_seed(1))
    assert match(source, sampling, shifted, weight, blocks).dtype == torch.float64
    with pytest.raises(TypeError, match="float16"):
        implementation_of("match", "triton")(source, sampling, shifted, weight, blocks)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_positions_are_rounded_in_one_way_wherever_they_are_computed() -> None:
    """The compiler computes them once for each layout; sums left free to contract could then differ in the last bit."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from verglas.kernels.match.triton import TILES
    from verglas.kernels.match.triton import _match_kernel as kernel

    types = dict.fromkeys(["words", "plane", "slice_list", "shift_list", "task_particle", "task_block", "task_count"], "*i32")
    types |= dict.fromkeys(["slice_ptr", "shift_ptr", "value_ptr"], "*i64") | dict.fromkeys(
        ["n_images", "n_pixels", "half"], "i32"
    )
    types |= {"shifted": "*fp16", "limit2": "fp32"}
    for tile, registers in TILES:
        constants = {"CORNERS": 8, "SLICES": tile.slices, "SHIFTS": tile.shifts, "STEP": tile.coefficients}
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        aligned = {
            (at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
        }
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): v for name, v in constants.items()}, aligned)
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": registers}
        made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).asm
        assert made["ttgir"].count("math.fma") >= made["ttgir"].count("math.floor") > 0
        assert "ld.global.v4" in made["ptx"] and "mma.sync" in made["ptx"]


def test_in_the_interpreter() -> None:
    if INTERPRETED or DEVICE == "cuda":
        pytest.skip("the kernels run in this process")
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-k", "triton", "--deselect", f"{__file__}::test_in_the_interpreter"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
