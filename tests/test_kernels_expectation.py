"""The expectation's kernels on the CPU against their definitions in float64, on ragged lists with odd and empty cases."""

from __future__ import annotations

import math

import numba
import pytest
import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2, centred_rfft2, half_plane_pixels
from verglas.kernels import choose_single
from verglas.kernels.blocks import Blocks, owner
from verglas.kernels.collect import collect
from verglas.kernels.compare import compare
from verglas.kernels.shift import shift
from verglas.kernels.significant import significant, significant_reference
from verglas.kernels.spectra import spectra

SLICES_EACH, SHIFTS_EACH = (0, 1, 70, 3, 12, 5, 130), (4, 1, 7, 84, 0, 4, 3)
N_SLICES, N_SHIFTS, N_SHELLS = 150, 84, 6
THREADS = numba.get_num_threads()
SIZES = (1, 37, 300, 1301)  # one coefficient, odd, several vectors, several runs


def ragged(seed: int = 0) -> Blocks:
    """Seven particles, among them one without slices, one without shifts, more slices than a task takes."""
    g = torch.Generator().manual_seed(seed)
    slices = [torch.randperm(N_SLICES, generator=g)[:n].sort().values for n in SLICES_EACH]
    shifts = [torch.randperm(N_SHIFTS, generator=g)[:m] for m in SHIFTS_EACH]
    return Blocks.build(pointers(SLICES_EACH), torch.cat(slices), pointers(SHIFTS_EACH), torch.cat(shifts))


def pointers(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def operands(n_coefficients: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 (shifted, weight, slices); rows that no particle names are NaN, so that reading one shows."""
    g = torch.Generator().manual_seed(seed)
    blocks = ragged()
    shifted = torch.full((len(SLICES_EACH), N_SHIFTS, 2, n_coefficients), math.nan, dtype=torch.float64)
    for i in range(blocks.particles):
        _, shifts, _ = blocks.lists(i)
        shifted[i, shifts] = torch.randn(len(shifts), 2, n_coefficients, generator=g, dtype=torch.float64)
    weight = torch.rand(len(SLICES_EACH), n_coefficients, generator=g, dtype=torch.float64)
    slices = torch.randn(N_SLICES, 2, n_coefficients, generator=g, dtype=torch.float64)
    slices[torch.bincount(blocks.slice_N, minlength=N_SLICES) == 0] = math.nan
    return shifted.float().double(), weight.float().double(), slices.float().double()


def posterior(blocks: Blocks, seed: int = 2) -> Tensor:
    """Float64 weights of the samples, five of six exactly 0."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(blocks.samples, generator=g) * (torch.rand(blocks.samples, generator=g) > 5 / 6)
    return weight.double()


def assert_close(got: Tensor, expected: Tensor, scale: float) -> None:
    """Within single precision of sums whose terms add up to `scale` in absolute value (at most)."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert torch.isfinite(got).all()
    assert (got.double() - expected).abs().max() < 3e-7 * scale


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that kernels make for their results are NaN at first, so that an entry that is never written shows."""
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).fill_(math.nan))


@pytest.mark.parametrize("n_coefficients", SIZES)
def test_compare_is_its_definition(n_coefficients: int, poisoned: None) -> None:
    shifted, weight, slices = operands(n_coefficients)
    blocks = ragged()
    expected = compare(shifted, weight, slices, blocks)
    got = compare(shifted.float(), weight.float(), slices.float(), blocks)
    assert_close(got, expected, 4 * n_coefficients**0.5 + 2 * n_coefficients)


def test_double_precision_runs_the_reference_and_single_the_kernel() -> None:
    assert choose_single(torch.zeros(1, dtype=torch.float64)) == "reference"
    assert choose_single(torch.zeros(1)) == "cpu"
    shifted, weight, slices = operands(5)
    with pytest.raises(TypeError, match="float64"):
        compare(shifted, weight, slices, ragged(), implementation="cpu")


def test_compare_of_no_particles_is_empty() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    blocks = Blocks.build(torch.zeros(1, dtype=torch.int64), nothing, torch.zeros(1, dtype=torch.int64), nothing)
    assert compare(torch.zeros(0, 4, 2, 9), torch.zeros(0, 9), torch.zeros(3, 2, 9), blocks).shape == (0,)


@pytest.mark.parametrize("n_coefficients", SIZES)
def test_collect_is_its_definition(n_coefficients: int) -> None:
    shifted, weight, _ = operands(n_coefficients)
    blocks = ragged()
    p = posterior(blocks)
    g = torch.Generator().manual_seed(3)
    before = torch.randn(N_SLICES, 2, n_coefficients, generator=g), torch.rand(N_SLICES, n_coefficients, generator=g)
    expected = before[0].double(), before[1].double()
    collect(p, shifted, weight, blocks, *expected)
    got = before[0].clone(), before[1].clone()
    collect(p.float(), shifted.float(), weight.float(), blocks, *got)
    assert_close(got[0], expected[0], 30)
    assert_close(got[1], expected[1], 30)
    untouched = torch.bincount(blocks.slice_N, minlength=N_SLICES) == 0
    assert untouched.any() and torch.equal(got[0][untouched], before[0][untouched])


def test_collect_is_the_adjoint_of_the_cross_term() -> None:
    """<compare's cross term of P, p> = <P, collect of p> with the arrays taken as free real vectors."""
    shifted, weight, slices = operands(301)
    slices, blocks = slices.nan_to_num(), ragged()
    p = posterior(blocks)
    data, total = torch.zeros(N_SLICES, 2, 301), torch.zeros(N_SLICES, 301)
    collect(p.float(), shifted.float(), weight.float(), blocks, data, total)
    cross = compare(shifted.float(), torch.zeros_like(weight).float(), slices.float(), blocks)
    left, right = (cross.double() * p).sum(), (data.double() * slices).sum()
    assert abs(left - right) < 1e-6 * (data.double() * slices).abs().sum()
    power = compare(shifted.float(), weight.float(), slices.float(), blocks) - cross
    left, right = (power.double() * p).sum(), -0.5 * (total.double() * slices.square().sum(1)).sum()
    assert abs(left - right) < 1e-6 * abs(right)


@pytest.mark.skipif(THREADS < 2, reason="Numba has one thread")
def test_collect_gives_the_same_bits_on_one_thread_and_two() -> None:
    shifted, weight, _ = operands(700)
    blocks = ragged()
    found = []
    for threads in (1, 2):
        data, total = torch.zeros(N_SLICES, 2, 700), torch.zeros(N_SLICES, 700)
        numba.set_num_threads(threads)
        try:
            collect(posterior(blocks).float(), shifted.float(), weight.float(), blocks, data, total)
        finally:
            numba.set_num_threads(THREADS)
        found.append((data, total))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_collect_does_not_depend_on_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted, weight, _ = operands(300)
    blocks = ragged()
    found = []
    for threads in (1, 2, 7, 64):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        data, total = torch.zeros(N_SLICES, 2, 300), torch.zeros(N_SLICES, 300)
        collect(posterior(blocks).float(), shifted.float(), weight.float(), blocks, data, total)
        found.append((data, total))
    assert all(torch.equal(found[0][0], data) and torch.equal(found[0][1], total) for data, total in found[1:])


def test_collect_wants_ascending_slices_and_writes_in_place() -> None:
    shifted, weight, _ = (t.float() for t in operands(4))
    blocks = ragged()
    data, total = torch.zeros(N_SLICES, 2, 4), torch.zeros(N_SLICES, 4)
    with pytest.raises(ValueError, match="contiguous"):
        collect(posterior(blocks), shifted, weight, blocks, data, torch.zeros(4, N_SLICES).T)
    falling = Blocks.build(blocks.slice_ptr_B1, blocks.slice_N.flip(0), blocks.shift_ptr_B1, blocks.shift_M)
    with pytest.raises(ValueError, match="ascending"):
        collect(posterior(blocks), shifted, weight, falling, data, total)


@pytest.mark.parametrize("n_coefficients", SIZES)
def test_spectra_is_its_definition(n_coefficients: int, poisoned: None) -> None:
    shifted, weight, slices = operands(n_coefficients)
    blocks = ragged()
    p = posterior(blocks)
    shell = torch.arange(n_coefficients) * (N_SHELLS + 2) // n_coefficients  # the last two are left out
    expected = spectra(p, shifted, weight, slices, blocks, shell, N_SHELLS)
    got = spectra(p.float(), shifted.float(), weight.float(), slices.float(), blocks, shell, N_SHELLS)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, float(posterior_mass(p, blocks).max()) * (n_coefficients / N_SHELLS + 4))
    empty = posterior_mass(p, blocks) == 0
    assert empty.any() and not got[0][empty].any() and not got[1][empty].any()


def posterior_mass(p: Tensor, blocks: Blocks) -> Tensor:
    """Sum of the weights of each particle."""
    return torch.zeros(blocks.particles, dtype=p.dtype).index_add_(0, blocks.sample_indices()[0], p)


@pytest.mark.parametrize("box", [24, 110])
def test_shift_is_its_definition_and_its_adjoint_moves_back(box: int, poisoned: None) -> None:
    pixels = half_plane_pixels(box)
    g = torch.Generator().manual_seed(4)
    image = torch.randn(3, 2, pixels.count, generator=g)
    shifts = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-2.25, 3.5], [40.3, -17.9], [0.0, -1.0]], dtype=torch.float64)
    expected = shift(image.double(), shifts, pixels.x_K, pixels.y_K, box, torch.float64)
    got = shift(image, shifts, pixels.x_K, pixels.y_K, box)
    assert_close(got, expected, 10)
    assert torch.equal(got[:, 0], image)
    back = torch.stack([shift(got[:, t], -shifts[t : t + 1], pixels.x_K, pixels.y_K, box)[:, 0] for t in range(len(shifts))], 1)
    assert (back - image[:, None]).abs().max() < 3e-6
    with pytest.raises(TypeError, match="float16"):
        shift(image, shifts, pixels.x_K, pixels.y_K, box, torch.float16)


@pytest.mark.parametrize("double", [True, False], ids=["reference", "compiled"])
def test_images_may_be_those_of_the_lists_alone(double: bool, poisoned: None) -> None:
    """Shifted copies of the lists alone are those of all shifts, and all kernels read them alike."""
    pixels, blocks = half_plane_pixels(24), ragged()
    _, weight, slices = operands(pixels.count)
    g = torch.Generator().manual_seed(6)
    image = torch.randn(blocks.particles, 2, pixels.count, generator=g, dtype=torch.float64)
    shifts, p, shell_K = 9 * torch.randn(N_SHIFTS, 2, generator=g, dtype=torch.float64), posterior(blocks), pixels.shell_K
    if not double:
        image, weight, slices, p = image.float(), weight.float(), slices.float(), p.float()
    at = shifts, pixels.x_K, pixels.y_K, 24, image.dtype
    every = shift(image, *at)
    listed = shift(image, *at, lists=blocks)
    particle_M = owner(blocks.shift_ptr_B1)
    assert len(listed) == len(blocks.shift_M) and torch.equal(listed, every[particle_M, blocks.shift_M.long()])
    assert torch.equal(compare(listed, weight, slices, blocks), compare(every, weight, slices, blocks))
    found = [spectra(p, images, weight, slices, blocks, shell_K, N_SHELLS) for images in (listed, every)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    tables = [(torch.zeros_like(slices), torch.zeros_like(slices[:, 0])) for _ in range(2)]
    for images, table in zip((listed, every), tables, strict=True):
        collect(p, images, weight, blocks, *table)
    assert torch.equal(tables[0][0], tables[1][0]) and torch.equal(tables[0][1], tables[1][1])


def test_positive_shift_moves_content_to_positive() -> None:
    box = 16
    pixels = half_plane_pixels(box)
    image = torch.zeros(1, box, box)
    image[0, 8, 8] = 1.0
    value = pixels.gather(centred_rfft2(image))
    moved = shift(torch.stack([value.real, value.imag], 1), torch.tensor([[3.0, -2.0]]), pixels.x_K, pixels.y_K, box)
    real = centred_irfft2(pixels.scatter(torch.complex(moved[:, 0, 0], moved[:, 0, 1])), box)
    assert divmod(int(real[0].argmax()), box) == (6, 11)  # y = 8 - 2, x = 8 + 3


RUNS = {
    "one sample": [[3.5]],
    "uniform": [[2.0] * 1000],
    "ties at the crossing": [[0.0, -1.0, -1.0, -1.0, -9.0], [-1.0, 0.0, -1.0]],
    "all impossible": [[-math.inf] * 4, [0.0, -math.inf]],
    "empty run": [[], [1.0, 2.0], []],
    "far apart": [[-1e6, 1e6, 1e6 - 0.5, -math.inf]],
    "not a number": [[0.0, math.nan, 1.0], [3.0, 1.0]],
    "infinite": [[0.0, math.inf, 1.0], [3.0, 1.0]],
    "one dominates": [[0.0, -50.0, -70.0, -200.0]],
}


def run_values(runs: list[list[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor([value for run in runs for value in run], dtype=dtype), pointers(tuple(len(run) for run in runs))


def assert_same_significance(log_weight: Tensor, ptr: Tensor, fraction: float) -> None:
    got, expected = significant(log_weight, ptr, fraction, "cpu"), significant_reference(log_weight, ptr, fraction)
    for name in ("max_B", "best_B", "threshold_B", "count_B"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name)
    torch.testing.assert_close(got.log_sum_B, expected.log_sum_B, rtol=1e-14, atol=1e-12, equal_nan=True)
    run_N = owner(ptr)
    accepted_N = log_weight >= got.threshold_B[run_N]
    assert torch.equal(torch.bincount(run_N[accepted_N], minlength=len(got.count_B)), got.count_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RUNS)
def test_significant_is_its_definition_in_odd_cases(name: str, dtype: torch.dtype) -> None:
    for fraction in (0.5, 0.9, 0.999):
        assert_same_significance(*run_values(RUNS[name], dtype), fraction)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_significant_is_its_definition_on_random_runs(spread: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    sizes = (5, 2000, 1, 317, 20_000)
    log_weight = (spread * torch.randn(sum(sizes), generator=g, dtype=torch.float64) + 300).to(dtype)
    log_weight[100:150] = -math.inf
    assert_same_significance(log_weight, pointers(sizes), 0.999)


def test_significant_by_hand() -> None:
    """Weights 1/2, 1/4, 1/8, 1/8: 0.7 needs two, 0.76 three and then, the last two being equal, four."""
    log_weight = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float64).log()
    ptr = torch.tensor([0, 4])
    found = significant(log_weight, ptr, 0.7)
    assert (int(found.best_B), int(found.count_B), float(found.threshold_B)) == (1, 2, math.log(0.25))
    assert float(found.log_sum_B) == pytest.approx(0, abs=1e-15)
    assert int(significant(log_weight, ptr, 0.76).count_B) == 4
    assert (log_weight >= found.threshold_B).nonzero().flatten().tolist() == [1, 3]
    with pytest.raises(ValueError, match="fraction"):
        significant(log_weight, ptr, 1.0)
