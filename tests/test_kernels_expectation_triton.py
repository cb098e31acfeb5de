"""The Triton kernels of the expectation against float64 references, on a GPU or in Triton's interpreter.

Operands are rounded first and the reference works on the rounded values, so what remains is the error of single-precision sums.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import Tensor

from verglas.kernels.admit import Parents, admit
from verglas.kernels.blocks import Blocks, Wanted, owner
from verglas.kernels.collect import collect
from verglas.kernels.collect.reference import collect_reference
from verglas.kernels.compare import compare
from verglas.kernels.compare.reference import compare_reference
from verglas.kernels.shift import shift
from verglas.kernels.shift.reference import shift_reference
from verglas.kernels.spectra import spectra
from verglas.kernels.spectra.reference import spectra_reference
from verglas.kernels.tasks import Tile, list_tasks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runnable = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="Triton needs a GPU or TRITON_INTERPRET=1 (last test)"
)
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "single"])

# Of a product of two float32 numbers on tensor cores, relative: each is split into a TF32 number, off by at most 2^-11, and the
# rest, of which the cores take 11 bits (2^-21 is lost); the product of the rests (2^-22) is left out.
PRODUCT_ERROR = 2 * 2.0**-21 + 2.0**-22
IMAGES = 7  # shifted images of each particle
ROWS = 90  # of the slice table
LISTS = {
    # slices and shifts of each particle: empty ones, single ones, more than one block
    "ragged": [(0, 3), (5, 4), (1, 1), (17, 2), (3, 0), (40, 7), (0, 0), (2, 5)],
    "one": [(1, 1)],
    "nothing": [(0, 0), (0, 4), (3, 0)],
}


def make_blocks(sizes: list[tuple[int, int]], images: int = IMAGES, rows: int = ROWS) -> Blocks:
    """Random lists of these lengths; the first particle with slices starts at row 0, every particle's last is the last row."""
    slices = [torch.randperm(rows)[:n].sort().values for n, _ in sizes]
    shifts = [torch.randperm(images)[:m].sort().values for _, m in sizes]
    for one in slices:
        one[-1:] = rows - 1
    ptr = [torch.tensor([0] + [len(one) for one in lists]).cumsum(0) for lists in (slices, shifts)]
    blocks = Blocks.build(ptr[0], torch.cat(slices), ptr[1], torch.cat(shifts))
    return blocks.to(DEVICE)


def random_inputs(blocks: Blocks, coefficients: int, dtype: torch.dtype, images: int = IMAGES) -> tuple[Tensor, Tensor, Tensor]:
    """(shifted images, weights, slices); the images that no list names are NaN, so that touching them shows."""
    shifted = torch.full((blocks.particles, images, 2, coefficients), float("nan"))
    for i in range(blocks.particles):
        used = blocks.lists(i)[1].cpu()
        shifted[i, used] = torch.randn(len(used), 2, coefficients)
    weight = torch.rand(blocks.particles, coefficients)
    slices = torch.full((ROWS, 2, coefficients), float("nan"))
    used = blocks.slice_N.long().cpu()
    slices[used] = torch.randn(len(used), 2, coefficients)
    return shifted.to(DEVICE, dtype), weight.to(DEVICE), slices.to(DEVICE, dtype)


def random_posterior(blocks: Blocks) -> Tensor:
    """Weights over many orders of magnitude, most of them 0, whole slices and shifts of them too."""
    _, a, t = blocks.sample_indices()
    p = torch.rand(blocks.samples, device=DEVICE) * 10.0 ** (-7 * torch.rand(blocks.samples, device=DEVICE))
    slice_used = torch.rand(len(blocks.slice_N), device=DEVICE) < 0.5
    shift_used = torch.rand(len(blocks.shift_M), device=DEVICE) < 0.7
    return p * slice_used[a] * shift_used[t] * (torch.rand(blocks.samples, device=DEVICE) < 0.7)


def off(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max()) if actual.numel() else 0.0


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*size: int, **options: object) -> Tensor:
        made = empty(*size, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@runnable
@HALF_AND_SINGLE
@pytest.mark.parametrize("coefficients", [1, 33, 48])
@pytest.mark.parametrize("name", LISTS)
def test_compare(name: str, coefficients: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    blocks = make_blocks(LISTS[name])
    shifted, weight, slices = random_inputs(blocks, coefficients, dtype)
    poison(monkeypatch)
    score = compare(shifted, weight, slices, blocks, implementation="triton")
    assert score.dtype == torch.float32
    exact = shifted.double(), weight.double(), slices.double()
    terms = compare_reference(exact[0].abs(), -exact[1], exact[2].abs(), blocks)  # the sum of their moduli: terms may cancel
    error = (score.double() - compare_reference(*exact, blocks)).abs()
    allowed = 3e-7 * terms
    if dtype == torch.float32:  # where there are many, errors of products cancel
        squares = compare_reference(exact[0].square(), 0 * exact[1], exact[2].square(), blocks)
        allowed = torch.maximum(allowed, PRODUCT_ERROR * squares.sqrt())
    assert bool((error <= allowed).all())


@runnable
def test_compare_with_more_shifts_and_slices_than_a_program_holds() -> None:
    torch.manual_seed(2)
    blocks = make_blocks([(5, 131), (80, 20), (33, 40)], images=140)
    shifted, weight, slices = random_inputs(blocks, 5, torch.float16, images=140)
    score = compare(shifted, weight, slices, blocks, implementation="triton")
    assert off(score, compare_reference(shifted.double(), weight.double(), slices.double(), blocks)) < 2e-6


def family(sizes: list[tuple[int, int]], each: tuple[int, int]) -> tuple[Parents, Blocks]:
    """(parents with priors, of which about one pair in ten is kept; their children)."""
    parents = make_blocks(sizes)
    kept = torch.where(torch.rand(parents.samples) < 0.1, torch.randn(parents.samples), -torch.inf)
    slice_N = parents.slice_N[:, None] * each[0] + torch.arange(each[0], device=DEVICE)
    shift_M = parents.shift_M[:, None] * each[1] + torch.arange(each[1], device=DEVICE)
    ptr = parents.slice_ptr_B1 * each[0], parents.shift_ptr_B1 * each[1]
    children = Blocks.build(ptr[0], slice_N.flatten() % ROWS, ptr[1], shift_M.flatten())
    priors = torch.randn(len(parents.slice_N), device=DEVICE), torch.randn(len(parents.shift_M), device=DEVICE)
    return Parents(parents, kept.to(DEVICE), *priors), children


@runnable
@pytest.mark.parametrize("each", [(8, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("name", LISTS)
def test_admit(name: str, each: tuple[int, int]) -> None:
    torch.manual_seed(9)
    parents, blocks = family(LISTS[name], each)
    expected = torch.randn(blocks.samples, device=DEVICE, dtype=torch.float64)
    score = expected.float()
    admit(expected, blocks, parents, *each, "reference")
    score[torch.isneginf(expected)] = float("nan")  # what stands there does not matter
    admit(score, blocks, parents, *each, "triton")
    torch.testing.assert_close(score.double(), expected, rtol=1e-6, atol=1e-6)


@runnable
def test_admit_needs_single_precision() -> None:
    parents, blocks = family(LISTS["one"], (8, 4))
    with pytest.raises(TypeError, match="float64"):
        admit(torch.zeros(blocks.samples, dtype=torch.float64, device=DEVICE), blocks, parents, 8, 4, "triton")


@runnable
@pytest.mark.parametrize("each", [(8, 4), (1, 1)])
def test_compare_gives_what_is_wanted_and_leaves_out_blocks_that_nobody_asks_for(
    each: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(10)
    parents, blocks = family([(5, 4), (9, 7), (0, 3), (1, 1), (4, 5)], each)
    shifted, weight, slices = random_inputs(blocks, 17, torch.float16, images=IMAGES * each[1])
    expected = compare_reference(shifted.double(), weight.double(), slices.double(), blocks)
    admitted = torch.zeros_like(expected)
    admit(admitted, blocks, parents, *each, "reference")
    poison(monkeypatch)
    score = compare(shifted, weight, slices, blocks, Wanted(parents.blocks, parents.kept_N, *each), "triton")
    asked = ~torch.isneginf(admitted)
    assert off(score[asked], expected[asked]) < 2e-6
    assert bool(score.isnan().any()), "no block was left out"


@runnable
def test_every_block_is_listed_once() -> None:
    """Particles without slices or shifts are in no list."""
    blocks = make_blocks([(0, 3), (5, 4), (40, 7), (17, 2), (3, 0), (0, 0), (16, 5), (33, 7)])
    tasks = list_tasks(blocks, blocks.samples, Tile(16, 2, 32, 4, 2))
    count = int(tasks.count[0])
    assert count <= tasks.bound
    listed = sorted(zip(tasks.particle_J[:count].tolist(), tasks.block_J[:count].tolist()))
    shapes = [blocks.shape(i) for i in range(blocks.particles)]
    assert listed == [(i, j) for i, (n, m) in enumerate(shapes) for j in range(-(-n // 16) * -(-m // 2))]


@runnable
@HALF_AND_SINGLE
@pytest.mark.parametrize("coefficients", [1, 33, 80])
@pytest.mark.parametrize("name", LISTS)
def test_collect_adds_to_what_is_there(name: str, coefficients: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    blocks = make_blocks(LISTS[name])
    shifted, weight, _ = random_inputs(blocks, coefficients, dtype)
    p = random_posterior(blocks)
    data, total = torch.randn(ROWS, 2, coefficients, device=DEVICE), torch.rand(ROWS, coefficients, device=DEVICE)
    expected_data, expected_total = data.double(), total.double()
    collect_reference(p.double(), shifted.double(), weight.double(), blocks, expected_data, expected_total)
    collect(p, shifted, weight, blocks, data, total, "triton")
    assert off(data, expected_data) < 1e-6
    assert off(total, expected_total) < 1e-6


@runnable
def test_collect_keeps_the_precision_of_a_slice_whose_weights_are_all_small() -> None:
    torch.manual_seed(4)
    blocks = make_blocks([(3, 7)])
    shifted, weight, _ = random_inputs(blocks, 20, torch.float16)
    p = torch.rand(21, device=DEVICE) * torch.tensor([1.0, 1e-12, 1e-37], device=DEVICE).repeat_interleave(7)
    data, total = torch.zeros(ROWS, 2, 20, device=DEVICE), torch.zeros(ROWS, 20, device=DEVICE)
    expected, expected_total = data.double(), total.double()
    collect_reference(p.double(), shifted.double(), weight.double(), blocks, expected, expected_total)
    collect(p, shifted, weight, blocks, data, total, "triton")
    rows = blocks.slice_N.long()
    assert off(data[rows[0]], expected[rows[0]]) < 1e-6
    assert off(data[rows[1]], expected[rows[1]]) < 1e-6
    assert data.isfinite().all()


@runnable
def test_collect_needs_single_precision_tables() -> None:
    blocks = make_blocks([(1, 1)])
    shifted, weight, _ = random_inputs(blocks, 16, torch.float16)
    data, total = torch.zeros(ROWS, 2, 16, device=DEVICE), torch.zeros(ROWS, 16, device=DEVICE)
    with pytest.raises(TypeError, match="float32 tables"):
        collect(torch.ones(1, device=DEVICE), shifted, weight, blocks, data.double(), total, "triton")


@runnable
@HALF_AND_SINGLE
@pytest.mark.parametrize("coefficients", [1, 33, 80])
@pytest.mark.parametrize("name", LISTS)
def test_spectra(name: str, coefficients: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    blocks = make_blocks(LISTS[name])
    shifted, weight, slices = random_inputs(blocks, coefficients, dtype)
    p, shell = random_posterior(blocks), torch.randint(0, 6, (coefficients,), device=DEVICE)
    actual = spectra(p, shifted, weight, slices, blocks, shell, 4, "triton")
    expected = spectra_reference(p.double(), shifted.double(), weight.double(), slices.double(), blocks, shell, 4)
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).abs().max()) <= 2e-6 * float(other.abs().max())


@runnable
def test_spectra_with_more_shifts_than_a_program_holds() -> None:
    torch.manual_seed(6)
    blocks = make_blocks([(4, 150), (35, 20)], images=150)
    shifted, weight, slices = random_inputs(blocks, 5, torch.float16, images=150)
    p, shell = torch.rand(blocks.samples, device=DEVICE), torch.arange(5, device=DEVICE)
    actual = spectra(p, shifted, weight, slices, blocks, shell, 5, "triton")
    expected = spectra_reference(p.double(), shifted.double(), weight.double(), slices.double(), blocks, shell, 5)
    assert off(actual[0], expected[0]) < 2e-6 and off(actual[1], expected[1]) < 2e-6


@runnable
def test_slices_without_weight_are_never_touched() -> None:
    """Slices whose weights are all 0 are not read or written: NaN in them does not matter."""
    torch.manual_seed(7)
    blocks = make_blocks([(6, 5)])
    shifted, weight, slices = random_inputs(blocks, 20, torch.float16)
    p = torch.rand(6, 5, device=DEVICE)
    p[2] = 0
    rows, _, _ = blocks.lists(0)
    clean = slices.clone()
    slices[rows[2]] = float("nan")
    shell = torch.zeros(20, dtype=torch.long, device=DEVICE)
    actual = spectra(p.flatten(), shifted, weight, slices, blocks, shell, 1, "triton")
    expected = spectra(p.flatten(), shifted, weight, clean, blocks, shell, 1, "triton")
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    data, total = torch.zeros(ROWS, 2, 20, device=DEVICE), torch.zeros(ROWS, 20, device=DEVICE)
    collect(p.flatten(), shifted, weight, blocks, data, total, "triton")
    assert bool((data[rows[2]] == 0).all()) and bool((total[rows[2]] == 0).all())


@runnable
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32], ids=["half", "single"])
@pytest.mark.parametrize("images, shifts, coefficients", [(1, 1, 1), (5, 35, 33), (9, 2, 515), (0, 3, 8), (3, 0, 8)])
def test_shift(images: int, shifts: int, coefficients: int, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    image = torch.randn(images, 2, coefficients, device=DEVICE)
    shift_T2 = 40 * torch.randn(shifts, 2, device=DEVICE)
    x, y = (torch.randint(-32, 33, (coefficients,), dtype=torch.int32, device=DEVICE) for _ in "xy")
    poison(monkeypatch)
    actual = shift(image, shift_T2, x, y, 64, out_dtype, "triton")
    assert actual.dtype == out_dtype and actual.shape == (images, shifts, 2, coefficients)
    expected = shift_reference(image.double(), shift_T2.double(), x, y, 64, torch.float64)
    error = (actual.double() - expected).abs()
    assert bool((error <= (2.0**-11 if out_dtype == torch.float16 else 0) * expected.abs() + 1e-6).all())


@runnable
@HALF_AND_SINGLE
@pytest.mark.parametrize("name", LISTS)
def test_images_of_the_lists_alone(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(12)
    blocks, coefficients = make_blocks(LISTS[name]), 48
    _, weight, slices = random_inputs(blocks, coefficients, dtype)
    image = torch.randn(blocks.particles, 2, coefficients, device=DEVICE)
    shift_T2 = 9 * torch.randn(IMAGES, 2, device=DEVICE)
    x, y = (torch.randint(-32, 33, (coefficients,), dtype=torch.int32, device=DEVICE) for _ in "xy")
    poison(monkeypatch)
    every = shift(image, shift_T2, x, y, 64, dtype, "triton")
    listed = shift(image, shift_T2, x, y, 64, dtype, "triton", lists=blocks)
    assert torch.equal(listed, every[owner(blocks.shift_ptr_B1), blocks.shift_M.long()])
    assert torch.equal(*(compare(images, weight, slices, blocks, implementation="triton") for images in (listed, every)))
    p, shell = random_posterior(blocks), torch.arange(coefficients, device=DEVICE) // 10
    found = [spectra(p, images, weight, slices, blocks, shell, 5, "triton") for images in (listed, every)]
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))
    tables = [torch.zeros(ROWS, 3, coefficients, device=DEVICE) for _ in range(2)]
    for images, table in zip((listed, every), tables, strict=True):
        data, total = table[:, :2].contiguous(), table[:, 2].contiguous()
        collect(p, images, weight, blocks, data, total, "triton")
        table[:, :2], table[:, 2] = data, total
    torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-7)  # sums in any order


POINTERS = {"one": "fp32", "task_count": "*i32", "count": "*i32"}
POINTERS |= dict.fromkeys(["n_images", "n_rows", "n_shifts", "n_coefficients", "length", "patches"], "i32")
POINTERS |= dict.fromkeys(["slices_each", "shifts_each", "tile_slices", "tile_shifts"], "i32")
POINTERS |= dict.fromkeys(["task_particle", "task_block", "slice_list", "shift_list", "particle_out", "block_out"], "*i32")
POINTERS |= dict.fromkeys(["image_of", "shift_of"], "*i32")
POINTERS |= dict.fromkeys(["slice_ptr", "shift_ptr", "value_ptr", "parent_ptr", "kept_ptr"], "*i64")
POINTERS |= dict.fromkeys(["images", "slices"], "*fp16")
BLOCKS = {"SLICES": 64, "SHIFTS": 64, "COEFFICIENTS": 64, "HALF": True, "STEP": 32, "PRECISION": "ieee", "IMAGES": 4}
BLOCKS |= {"WANTED": True, "ROWS": 8}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["compare", "collect", "spectra", "shift", "shift_listed", "admit", "tasks"])
def test_compiles_for_a_gpu_that_need_not_be_there(name: str) -> None:
    """The interpreter accepts what the compiler does not. Half-precision operands, rows of a multiple of 16 numbers, sm_90."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = "tasks" if name == "tasks" else f"{name.removesuffix('_listed')}.triton"
    kernel_name = "_list_kernel" if name == "tasks" else f"_{name}_kernel"
    kernel = getattr(import_module(f"verglas.kernels.{module}"), kernel_name)
    constants = {(at,): BLOCKS[one] for at, one in enumerate(kernel.arg_names) if one in BLOCKS}
    signature = {one: "constexpr" if one in BLOCKS else POINTERS.get(one, "*fp32") for one in kernel.arg_names}
    sizes = ("length", "n_coefficients")
    aligned = [at for at, one in enumerate(kernel.arg_names) if signature[one].startswith("*") or one in sizes]
    source = ASTSource(kernel, signature, constants, {(at,): [["tt.divisibility", 16]] for at in aligned})
    made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3}).asm
    assert len(made["cubin"]) > 1000
    products = [line for line in made["ttgir"].splitlines() if "warp_group_dot " in line]
    if name in ("compare", "collect", "spectra"):
        assert products and "cp.async" in made["ptx"]
    if name == "compare":  # the left operand must be in registers: see the comment in the kernel
        assert all(" : tensor<" in line for line in products), products


def test_in_the_interpreter() -> None:
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("the kernels run in this process")
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--deselect", f"{__file__}::test_in_the_interpreter"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout, done.stdout[-500:]
