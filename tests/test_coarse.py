"""The coarse search and its GPU kernels against their definitions: on a GPU, or in Triton's interpreter (last test).

`significant`, `keep` and `posterior` run here in their Triton versions; the other versions have tests of their own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.coarse import Orientations, Power, coarse, split_columns
from verglas.kernels.keep import keep, posterior
from verglas.kernels.significant import significant

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runnable = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="Triton needs a GPU or TRITON_INTERPRET=1 (last test)"
)
INFINITY, NAN = math.inf, math.nan
WEIGHT_ERROR = 2.0**-21  # of a sum of weights relative to all: exponentials and their sums are made in single precision


def pointers(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes], device=DEVICE).cumsum(0)


def world(
    particles: int, shifts: int, coefficients: int, count: int, strength: float, device: str = DEVICE
) -> tuple[Tensor, Tensor, Tensor, Orientations]:
    """(images, weights, log offsets, orientations); one orientation has no prior."""
    torch.manual_seed(count)
    slices = (strength * torch.randn(count, 2, coefficients)).half().to(device)
    images = torch.randn(particles, shifts, 2 * coefficients).half().to(device)
    weight, log_offset = torch.rand(particles, coefficients, device=device), torch.randn(particles, shifts, device=device)
    prior = torch.randn(count, device=device)
    prior[3] = -INFINITY
    return images, weight, log_offset, Orientations(slices.flatten(1), Power.split(slices.float().square().sum(1)), prior)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN or a large number: what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> Tensor:
        made = empty(*size, **options)  # type: ignore[call-overload]
        return made.fill_(NAN) if made.is_floating_point() else made.fill_(1 << 30)

    monkeypatch.setattr(torch, "empty", poisoned)


def small_programs(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """Several programs, steps and chunks even at the sizes of these tests."""
    names = {"CAPACITY": capacity, "SCANNED": 2, "SCAN_COLUMNS": 128, "FIND_ROWS": 64}
    for name, value in names.items():
        monkeypatch.setattr(f"verglas.kernels.coarse.triton.{name}", value)
    if capacity < 10:
        monkeypatch.setattr("verglas.kernels.keep.triton.USUAL", (1, 2, 1))


def check(
    images: Tensor, weight: Tensor, log_offset: Tensor, orientations: Orientations, fraction: float, name: str = "triton"
) -> None:
    """`coarse` against the definition: the same samples, values to single precision.

    Of thousands of samples the least likely accepted one holds no more than single precision can tell. Threshold and count then
    lie between those of fractions smaller and larger by WEIGHT_ERROR.
    """
    inputs = images, weight, log_offset, orientations
    kept, found = coarse(*inputs, fraction, name)
    right_kept, right = coarse(*inputs, fraction, "reference")
    assert torch.equal(found.best_B, right.best_B)
    for field in ("max_B", "log_sum_B"):
        torch.testing.assert_close(getattr(found, field), getattr(right, field), rtol=1e-6, atol=3e-4, equal_nan=True, msg=field)
    if int(right.count_B.max()) > 1000:
        fewer, more = (coarse(*inputs, fraction + by, "reference")[1] for by in (-WEIGHT_ERROR, WEIGHT_ERROR))
        assert bool(((fewer.count_B <= found.count_B) & (found.count_B <= more.count_B)).all())
        assert bool(((more.threshold_B - 1e-4 <= found.threshold_B) & (found.threshold_B <= fewer.threshold_B + 1e-4)).all())
        assert int((more.count_B - fewer.count_B).max()) < 0.01 * int(right.count_B.max())
        return
    torch.testing.assert_close(found.threshold_B, right.threshold_B, rtol=1e-6, atol=3e-4, equal_nan=True)
    assert torch.equal(found.count_B, right.count_B)
    for field, value in vars(right_kept.blocks).items():
        assert not isinstance(value, Tensor) or torch.equal(getattr(kept.blocks, field), value), field
    assert kept.blocks.samples == right_kept.blocks.samples
    assert torch.equal(kept.slice_at_N, right_kept.slice_at_N) and torch.equal(kept.shift_at_M, right_kept.shift_at_M)
    torch.testing.assert_close(kept.value_N, right_kept.value_N, rtol=1e-6, atol=1e-4)


@runnable
@pytest.mark.parametrize(("fraction", "capacity"), [(0.5, 512), (0.999, 512), (0.999, 7)], ids=["half", "fits", "again"])
@pytest.mark.parametrize("shape", [(3, 11, 24, 150, 1.0), (2, 1, 8, 70, 0.1), (4, 24, 16, 130, 3.0), (1, 3, 8, 5, 0.01)])
def test_coarse(
    shape: tuple[int, int, int, int, float], fraction: float, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharp and flat posteriors; lists that hold all candidates and lists that must be made again."""
    inputs = world(*shape)
    small_programs(monkeypatch, capacity)
    poison(monkeypatch)
    check(*inputs, fraction)


def test_the_compiled_passes_give_the_same() -> None:
    check(*world(3, 11, 24, 150, 1.0, "cpu"), 0.999, "cpu")


@runnable
def test_an_image_without_numbers_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    images, weight, log_offset, orientations = world(4, 5, 8, 90, 1.0)
    small_programs(monkeypatch, 100)
    clean = coarse(images, weight, log_offset, orientations, 0.99, "triton")[1]
    images[1], weight[2, 3] = NAN, NAN
    found = coarse(images, weight, log_offset, orientations, 0.99, "triton")[1]
    assert found.count_B.tolist() == [int(clean.count_B[0]), 0, 0, int(clean.count_B[3])]
    assert bool(found.max_B[1:3].isnan().all())
    # In the interpreter products are numpy's, whose last bits depend on what else is in the product (7e-11 with AVX-512).
    torch.testing.assert_close(found.log_sum_B[[0, 3]], clean.log_sum_B[[0, 3]], rtol=1e-8, atol=0)
    assert found.best_B[1:3].tolist() == [4 * 5 * 90] * 2


@runnable
@pytest.mark.skipif(INTERPRETED, reason="CUDA C++ needs a GPU")
@pytest.mark.parametrize("capacity", [512, 3], ids=["fits", "again"])
@pytest.mark.parametrize("shape", [(3, 21, 264, 700, 1.0), (40, 29, 96, 3001, 0.3), (1, 19, 8, 100, 1.0), (9, 130, 40, 513, 0.5)])
def test_fused_product(
    shape: tuple[int, int, int, int, float], capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that end inside; particles over several tiles, several in one; K that is no multiple of a step."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the fused product runs on compute capability 9")
    monkeypatch.setattr("verglas.kernels.coarse.triton.CAPACITY", capacity)
    monkeypatch.setattr("verglas.kernels.coarse.triton.FUSED_LENGTH", 10**6)
    check(*world(*shape), 0.999)


def test_power_and_strong_columns_keep_single_precision() -> None:
    torch.manual_seed(1)
    power = torch.rand(50, 7) * 10.0 ** torch.arange(-3, 4)
    assert float(((Power.split(power).whole() - power).abs() / power.amax(0)).max()) < 2.0**-22
    images, slices = 3 * torch.randn(2, 3, 5), 1e5 * torch.randn(40, 5)  # beyond the range of half precision
    columns, rows = split_columns(images, slices)
    assert columns.shape == (2, 3, 16) and rows.shape == (40, 16)
    exact = images.double() @ slices.double().T
    assert float((columns.double() @ rows.double().T - exact).abs().max()) < 1e-6 * float(exact.abs().max())


RUNS = {
    "odd": [[], [-INFINITY, -INFINITY], [1.0, NAN, 2.0], [0.0], [3.0, INFINITY, 3.0], [], [2.0, 2.0, 2.0], [-0.0, 0.0, -1e30]],
    "nothing": [],
    "empty": [[], []],
}


@runnable
@pytest.mark.parametrize("name", RUNS)
def test_significant_in_odd_cases(name: str) -> None:
    values = torch.tensor([value for run in RUNS[name] for value in run], device=DEVICE)
    compare_significance(values, pointers([len(run) for run in RUNS[name]]), 0.9)


@runnable
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("fraction", [0.5, 0.999])
def test_significant_on_random_runs(spread: float, fraction: float) -> None:
    torch.manual_seed(5)
    sizes = [5, 2000, 1, 317, 20_000]
    values = (spread * torch.randn(sum(sizes), device=DEVICE) + 300).contiguous()
    values[100:150] = -INFINITY
    compare_significance(values, pointers(sizes), fraction)


def compare_significance(values: Tensor, ptr: Tensor, fraction: float) -> None:
    found, right = (significant(values, ptr, fraction, name) for name in ("triton", "reference"))
    for name in ("max_B", "best_B", "threshold_B", "count_B"):
        torch.testing.assert_close(getattr(found, name), getattr(right, name), rtol=0, atol=0, equal_nan=True, msg=name)
    torch.testing.assert_close(found.log_sum_B, right.log_sum_B, rtol=1e-7, atol=1e-6, equal_nan=True)


def ragged(slices_each: list[int], shifts_each: list[int], seed: int) -> Blocks:
    draw = torch.Generator().manual_seed(seed)
    slices = [torch.randperm(90, generator=draw)[:n].sort().values for n in slices_each]
    shifts = [torch.randperm(90, generator=draw)[:m].sort().values for m in shifts_each]
    lists = torch.cat([*slices, torch.empty(0, dtype=torch.int64)]), torch.cat([*shifts, torch.empty(0, dtype=torch.int64)])
    return Blocks.build(pointers(slices_each), lists[0].to(DEVICE), pointers(shifts_each), lists[1].to(DEVICE))


@runnable
@pytest.mark.parametrize("by_shift", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_keep_and_posterior(seed: int, by_shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged lists (equal ones where samples are stored by shift), empty ones, one particle that keeps nothing."""
    slices_each, shifts_each = [3, 0, 1, 70, 5, 33, 2], [4, 2, 1, 40, 0, 35, 1]
    if by_shift:
        slices_each, shifts_each = [65] * 4, [37] * 4
    blocks = ragged(slices_each, shifts_each, seed)
    torch.manual_seed(seed)
    value = 4 * torch.randn(blocks.samples, device=DEVICE)
    value[torch.rand(blocks.samples, device=DEVICE) < 0.1] = -INFINITY
    threshold = torch.full((blocks.particles,), 6.0, dtype=torch.float64, device=DEVICE)
    threshold[0] = INFINITY
    if seed == 1:  # lists turn out longer than usual
        monkeypatch.setattr("verglas.kernels.keep.triton.USUAL", (2, 1, 1))
    poison(monkeypatch)
    kept, right = (keep(value, blocks, threshold, by_shift, name) for name in ("triton", "reference"))
    for name, value in vars(right.blocks).items():
        assert not isinstance(value, Tensor) or torch.equal(getattr(kept.blocks, name), value), name
    assert kept.blocks.samples == right.blocks.samples
    for name in ("value_N", "slice_at_N", "shift_at_M"):
        assert torch.equal(getattr(kept, name), getattr(right, name)), name
    assert 0 < len(kept.value_N) < blocks.samples
    log_sum = torch.full_like(threshold, 9.0)
    tolerances = (1e-6, 1e-12, 1e-12, 1e-12)
    found, exact = (posterior(kept.value_N, kept.blocks, log_sum, name) for name in ("triton", "reference"))
    for got, expected, tolerance in zip(found, exact, tolerances, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-15)


@runnable
def test_single_precision_alone() -> None:
    double = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    blocks = ragged([1], [3], 0)
    with pytest.raises(TypeError, match="float32"):
        significant(double, pointers([3]), 0.5, "triton")
    with pytest.raises(TypeError, match="float32"):
        keep(double, blocks, double[:1], implementation="triton")
    images, weight, log_offset, orientations = world(1, 1, 8, 5, 1.0)
    with pytest.raises(TypeError, match="float16"):
        coarse(images.float(), weight, log_offset, orientations, 0.5, "triton")
    for fraction, name in ((1.0, "reference"), (0.5, "fortran")):
        with pytest.raises(ValueError, match="fraction" if fraction == 1 else "fortran"):
            coarse(images, weight, log_offset, orientations, fraction, name)


KINDS = dict.fromkeys(["start_B", "best", "best_B", "accepted_B", "first_B", "pointers", "entry"], "*i64")
KINDS |= dict.fromkeys(["slice_ptr", "shift_ptr", "value_ptr", "ptr"], "*i64")
KINDS |= dict.fromkeys(["count", "count_B", "kept_B", "room_B", "place", "used", "before", "number"], "*i32")
KINDS |= dict.fromkeys(["found_row", "found_part", "best_score_B"], "*i32")
KINDS |= dict.fromkeys(["size", "ask", "missing_B", "slice_N", "shift_M"], "*i32")
KINDS |= dict.fromkeys(["sum_BP", "total_B", "max_B", "log_sum_B", "threshold_B", "by_slice", "by_shift", "entropy"], "*fp64")
KINDS |= dict.fromkeys(["images", "slices", "halves"], "*fp16")
KINDS |= dict.fromkeys(["length", "first_b", "stride", "base", "n", "n_rows", "n_groups", "n_shifts"], "i32")
KINDS |= dict.fromkeys(["room", "slice_room", "shift_room", "shifts", "n_slices", "n_particles", "n_pixels", "samples"], "i32")
KINDS |= dict.fromkeys(["rest", "log_rest", "depth"], "fp32")
SIZES = {"STEP": 64, "PARTS": 16, "PLACED": True, "BY_SHIFT": True, "MARK": False, "WORDS": 32, "SLICES": 32, "SHIFTS": 32}
SIZES |= {"COLUMNS": 2048, "GRAIN": 64, "FIND": 4096, "ROWS": 16, "LARGEST": 1024.0, "NUMBERED": True, "ALIGNED": True}
KERNELS = ["coarse.triton weight", "coarse.triton scan", "coarse.triton again", "coarse.triton settle"]
KERNELS += ["significant.triton sum", "significant.triton list", "significant.triton threshold", "keep.triton count"]
KERNELS += ["keep.triton pointer", "keep.triton list", "keep.triton samples", "keep.triton posterior"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_a_gpu_that_need_not_be_there(name: str) -> None:
    """The interpreter accepts what the compiler does not."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    folder, which = name.split()
    kernel = getattr(import_module(f"verglas.kernels.{folder}"), f"_{which}_kernel")
    signature = {one: "constexpr" if one in SIZES else KINDS.get(one, "*fp32") for one in kernel.arg_names}
    constants = {(at,): SIZES[one] for at, one in enumerate(kernel.arg_names) if one in SIZES}
    pointers = {(at,): [["tt.divisibility", 16]] for at, one in enumerate(kernel.arg_names) if signature[one][0] == "*"}
    made = compile_kernel(ASTSource(kernel, signature, constants, pointers), target=GPUTarget("cuda", 90, 32)).asm
    assert len(made["cubin"]) > 1000


def test_in_the_interpreter() -> None:
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("the kernels run in this process")
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--deselect", f"{__file__}::test_in_the_interpreter"]
    command = [sys.executable, "-m", "pytest", "-q", *options, str(Path(__file__))]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout, done.stdout[-500:]
