"""farfield.cu on the CPU, thread by thread (block_on_cpu.h), or on a GPU, and cpu.py: against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from farfield_on_cpu import device_of_kernels
from verglas.kernels import farfield as package
from verglas.kernels.farfield import Counted, Lit, Step, along, cuda, farfield, products
from verglas.kernels.farfield.reference import exit_gradient
from verglas.ptychography.noise import noise_named

LENGTHS = torch.tensor([0.0, -0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64)  # more than one launch takes


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the kernels run."""
    yield from device_of_kernels(tmp_path_factory.mktemp("farfield"))


def case(
    shape: tuple[int, int], modes: int = 1, moved: bool = False, noise: str = "amplitude", dtype: torch.dtype = torch.int16,
    positions: int = 3,
) -> tuple[Lit, Step, Counted]:  # fmt: skip
    """Random fields (complex128), a step, and counts that fit the fields but for a part; some pixels bad and some empty."""
    draw = torch.Generator().manual_seed(sum(shape) + modes)

    def field(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.complex128)

    corner = torch.stack([torch.randint(0, high, (positions,), generator=draw) for high in (10, 6)], 1)
    corner[-1] = torch.tensor([9, 5])
    size = (shape[0] + 9, shape[1] + 5)
    fraction = torch.rand(positions, 2, generator=draw, dtype=torch.float64) - 0.5 if moved else None
    lit = Lit(field(*size), 3 * field(modes, *shape), corner, fraction)
    step = Step(0.1 * field(*size), 0.2 * field(modes, *shape))
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
    fraction = None if lit.fraction_B2 is None else lit.fraction_B2.to(device)
    fields = (lit.object_YX.to(device, torch.complex64), lit.light_MYX.to(device, torch.complex64))
    return Lit(*fields, lit.corner_B2.to(device), fraction)


def single_step(step: Step, device: str) -> Step:
    return Step(*(None if one is None else one.to(device, torch.complex64) for one in step))


def single_counts(counted: Counted, device: str) -> Counted:
    real = [one.to(device, torch.float32) for one in (counted.scale_N, counted.weight_YX, counted.background_YX)]
    return Counted(counted.counts_NYX.to(device), real[0], counted.rows_B.to(device), real[1], real[2], counted.noise)


CASES = [
    ((32, 64), {}), ((64, 32), {"modes": 3, "noise": "poisson", "dtype": torch.float32}), ((32, 32), {"moved": True, "modes": 2}),
    ((32, 32), {"positions": 35, "dtype": torch.float16}), ((32, 128), {"positions": 1, "dtype": torch.int32}),
    ((256, 32), {"positions": 1}), ((32, 512), {"positions": 1}), ((32, 1024), {"positions": 1}),
]  # fmt: skip


@pytest.mark.parametrize("shape, options", CASES, ids=str)
@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_misfit_and_gradient(name: str, device: str, shape: tuple[int, int], options: dict[str, object]) -> None:
    lit, _, counted = case(shape, **options)  # type: ignore[arg-type]
    into = torch.zeros_like(lit.object_YX)
    sums, of_light, _ = farfield(lit, counted, into, True, implementation="reference")
    device = device if name == "cuda" else "cpu"
    found_into = torch.ones_like(lit.object_YX, dtype=torch.complex64, device=device)
    args = single(lit, device), single_counts(counted, device)
    found, found_light, _ = farfield(*args, found_into, True, implementation=name)
    assert of_light is not None and found_light is not None and found_light.shape == lit.light_MYX.shape
    assert (found.cpu() - sums).abs().max() < 1e-5 * sums.abs().max()
    assert (found_into.cpu() - 1 - into).norm() < 3e-6 * into.norm()
    assert (found_light.cpu() - of_light).norm() < 3e-6 * of_light.norm()
    again, none, _ = farfield(*args, None, False, implementation=name)
    assert none is None and torch.equal(again, found)


@pytest.mark.parametrize("shape, options", [*CASES[:4], ((256, 32), {"positions": 1}), ((512, 32), {"positions": 1})], ids=str)
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_misfit_along_a_step(name: str, device: str, shape: tuple[int, int], options: dict[str, object], fitted: bool) -> None:
    lit, step, counted = case(shape, **options)  # type: ignore[arg-type]
    if not fitted:
        step = Step(step.object_YX, None)
    device = device if name == "cuda" else "cpu"
    expected = along(lit, step, counted, LENGTHS, "reference")
    found = along(single(lit, device), single_step(step, device), single_counts(counted, device), LENGTHS.to(device), name)
    assert ((found.cpu() - expected).abs().max(0).values < 1e-5 * expected.abs().max(0).values).all()
    sums = farfield(lit, counted, None, False, implementation="reference").totals_3
    assert expected[0, 0] == pytest.approx(float(sums[0]), rel=1e-12)


@pytest.mark.parametrize("shape, options", CASES[:4], ids=str)
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_products_with_the_gradient(
    name: str, device: str, shape: tuple[int, int], options: dict[str, object], fitted: bool
) -> None:
    lit, step, counted = case(shape, **options)  # type: ignore[arg-type]
    if not fitted:
        step = Step(step.object_YX, None)
    device = device if name == "cuda" else "cpu"
    expected = products(lit, step, counted, implementation="reference")
    given = single(lit, device), single_step(step, device), single_counts(counted, device)
    found = products(*given, implementation=name)
    kept = farfield(given[0], given[2], None, False, implementation=name).exit_BMYX
    assert torch.equal(products(*given, kept, name), found)
    gradient_B = exit_gradient(lit, counted)[0].abs().square().sum((1, 2, 3))
    norm_B3 = torch.stack([expected[:, 0], expected[:, 1], gradient_B], 1).sqrt()
    size_B5 = torch.stack([norm_B3[:, i] * norm_B3[:, j] for i, j in ((0, 0), (1, 1), (0, 1), (0, 2), (1, 2))], 1)
    assert ((found.cpu() - expected).abs() <= 1e-5 * size_B5).all()
    assert fitted == bool(expected[:, 1].any())


@pytest.mark.parametrize("name", ["cuda", "cpu"])
@pytest.mark.parametrize("options", [{}, {"modes": 2, "positions": 34}, {"positions": 1}, {"moved": True}], ids=str)
def test_curvature(name: str, device: str, options: dict[str, object]) -> None:
    lit, _, counted = case((32, 64), **options)  # type: ignore[arg-type]
    expected = torch.zeros(32, 64).double()
    farfield(lit, counted, None, False, expected, "reference")
    device = device if name == "cuda" else "cpu"
    found = torch.ones(32, 64, device=device)
    farfield(single(lit, device), single_counts(counted, device), None, False, found, name)
    assert (found.cpu() - 1 - expected).abs().max() < 1e-5 * expected.max()
    (y, x), seen = lit.corner_B2[-1].tolist(), lit.object_YX.abs().square()
    if len(lit.corner_B2) == 1:
        assert torch.allclose(expected, counted.scale_N[counted.rows_B[0]] * seen[y : y + 32, x : x + 64])


@pytest.mark.parametrize("moved", [False, True])
def test_blocks_that_sum_several_positions(device: str, moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are many positions; their last group is smaller."""
    lit, _, counted = case((32, 32), modes=2, moved=moved, positions=11)
    args = single(lit, device), single_counts(counted, device)
    found = []
    for blocks in (cuda.BLOCKS, 5):
        monkeypatch.setattr(cuda, "BLOCKS", blocks)
        seen = torch.zeros(32, 32, device=device)
        found.append((farfield(*args, None, True, seen, "cuda").light_MYX, seen, cuda.Launches(*args).group))
    (one, seen, single_one), (several, seen_again, group) = found
    assert single_one == 1 and 2 <= group < 11 and one is not None and several is not None
    assert (one - several).norm() < 1e-6 * one.norm() and (seen - seen_again).norm() < 1e-6 * seen.norm()


@pytest.mark.parametrize("moved", [False, True])
def test_definition_is_autograd(moved: bool) -> None:
    lit, step, counted = case((12, 10), modes=2, dtype=torch.float32, moved=moved)
    leaves = [one.clone().requires_grad_() for one in (lit.object_YX, lit.light_MYX)]
    leaf = Lit(leaves[0], leaves[1], lit.corner_B2, lit.fraction_B2)
    sums, _, _ = farfield(leaf, counted, None, False, implementation="reference")
    sums[0].backward()
    into = torch.zeros_like(lit.object_YX)
    _, of_light, _ = farfield(lit, counted, into, True, implementation="reference")
    for found, one in ((into, leaves[0]), (of_light, leaves[1])):
        assert one.grad is not None and found is not None
        assert (found - one.grad).abs().max() < 1e-9 * one.grad.abs().max()
    h = 1e-5
    low, _, high = along(lit, step, counted, torch.tensor([0.5 - h, 0.5, 0.5 + h], dtype=torch.float64), "reference")
    middle = along(lit, step, counted, torch.tensor([0.5], dtype=torch.float64), "reference")[0]
    assert middle[1] == pytest.approx(float((high - low)[0] / (2 * h)), rel=1e-5)
    assert middle[2] == pytest.approx(float((high - low)[1] / (2 * h)), rel=1e-5)


def test_what_the_kernels_cannot_take() -> None:
    assert package.why_not(torch.device("meta"), torch.float32, (64, 64)) == "device meta"
    assert package.why_not(torch.device("cpu"), torch.float64, (100, 64)) is None
    assert "float64" in str(package.why_not(torch.device("cuda"), torch.float64, (64, 64)))
    assert "100 x 64 px" in str(package.why_not(torch.device("cuda"), torch.float32, (100, 64)))
    lit, _, counted = case((32, 32))
    with pytest.raises(TypeError, match="complex128"):
        farfield(lit, counted, None, False, implementation="cuda")
    many = Lit(torch.ones(40, 40).cfloat(), torch.ones(1, 32, 32).cfloat(), torch.zeros(65536, 2).long())
    with pytest.raises(TypeError, match="65536 waves"):
        farfield(many, single_counts(counted, "cpu"), None, False, implementation="cuda")
    with pytest.raises(ValueError, match="triton"):
        farfield(lit, counted, None, False, implementation="triton")
