"""verglas.nufft against the sums written out, finufft, its own adjoint, numerical gradients and the normal operator."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch

from verglas.errors import InputError
from verglas.nufft import Plan, Toeplitz, nufft1, nufft2
from verglas.nufft.direct import direct1, direct2
from verglas.nufft.fine import FineGrid
from verglas.nufft.own import Own
from verglas.nufft.peer import Peer
from verglas.nufft.quickest import Quickest

SHAPES = [(24, 31), (17, 20, 24)]


def case(shape: tuple[int, ...], count: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points (half of them on two planes through the origin), values [2, M] and modes [2, *shape]; float64."""
    generator = torch.Generator().manual_seed(len(shape))
    point_MD = (torch.rand(count, len(shape), generator=generator, dtype=torch.float64) - 0.5) * 9
    point_MD[: count // 4, -1] = 0.3 * point_MD[: count // 4, 0]
    point_MD[count // 4 : count // 2, 0] = 0
    values = torch.randn(2, count, generator=generator, dtype=torch.complex128)
    return point_MD, values, torch.randn(2, *shape, generator=generator, dtype=torch.complex128)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ["reference", "cpu", "finufft"])
@pytest.mark.parametrize(("accuracy", "upsampling"), [(1e-3, 2.0), (1e-6, 2.0), (1e-4, 1.25), (1e-12, 2.0)])
def test_error_is_what_was_asked_for(shape: tuple[int, ...], implementation: str, accuracy: float, upsampling: float) -> None:
    if implementation == "cpu" and accuracy < 1e-4:
        pytest.skip("each width is compiled: two are enough, the others differ by their tables alone")
    point_MD, values, modes = case(shape)
    plan = Plan(point_MD, shape, accuracy, upsampling, torch.complex128, implementation)
    assert implementation in plan.kernel
    limit = 3 * accuracy if implementation == "finufft" else accuracy  # finufft's tolerance is nominal
    assert off(plan.type1(values), direct1(point_MD, values, shape)) < limit
    assert off(plan.type2(modes), direct2(point_MD, modes)) < limit
    if implementation == "reference":  # no better than asked for by far: the width is the least that serves
        assert off(plan.type1(values), direct1(point_MD, values, shape)) > accuracy / 200


def test_error_in_single_precision() -> None:
    point_MD, values, modes = case(SHAPES[1])
    plan = Plan(point_MD, SHAPES[1], 1e-6, 2.0, torch.complex64, "reference")
    assert plan.type1(values).dtype == torch.complex64
    assert off(plan.type1(values), direct1(point_MD, values, SHAPES[1])) < 1.5e-6
    assert off(plan.type2(modes), direct2(point_MD, modes)) < 1.5e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_16_bits(shape: tuple[int, ...]) -> None:
    """No error beyond what is asked for, sums in single precision, one type the transpose of the other."""
    point_MD, values, modes = case(shape)
    for accuracy in (1e-3, 1e-4):
        plan = Plan(point_MD, shape, accuracy, 2.0, implementation="reference", tables=True)
        assert "16-bit tables" in plan.kernel
        one, other = plan.type1(values), plan.type2(modes, +1)
        assert off(one, direct1(point_MD, values, shape)) < accuracy and off(other, direct2(point_MD, modes)) < accuracy
    exact = Plan(point_MD, shape, accuracy, 2.0, implementation="reference").type1(values)
    assert 1e-7 < off(one, exact.to(torch.complex128)) < 1e-4  # they are rounded, by little
    difference = (one.to(torch.complex128).conj() * modes).sum() - (values.conj() * other.to(torch.complex128)).sum()
    assert float(difference.abs()) < 1e-6 * float(one.norm() * modes.norm())


def test_where_there_are_no_tables() -> None:
    point_MD = case(SHAPES[0])[0]
    for given in ({"implementation": "cpu"}, {"implementation": "reference", "dtype": torch.complex128}, {"accuracy": 1e-5}):
        with pytest.raises(InputError):
            Plan(point_MD, SHAPES[0], **{"accuracy": 1e-3, "tables": True, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_types_are_adjoint(shape: tuple[int, ...], sign: int) -> None:
    point_MD, values, modes = case(shape)
    plan = Plan(point_MD, shape, 1e-3, 2.0, torch.complex128, "cpu")
    one, other = plan.type1(values, sign), plan.type2(modes, -sign)
    difference = (one.conj() * modes).sum() - (values.conj() * other).sum()
    assert float(difference.abs()) < 1e-12 * float(one.norm() * modes.norm())


@pytest.mark.parametrize("sign", [-1, 1])
def test_batches_and_single_vectors(sign: int) -> None:
    point_MD, values, modes = case(SHAPES[0])
    plan = Plan(point_MD, SHAPES[0], 1e-3, dtype=torch.complex128, implementation="reference")
    torch.testing.assert_close(plan.type1(values, sign)[1], plan.type1(values[1], sign))
    torch.testing.assert_close(plan.type2(modes[None], sign)[0, 1], plan.type2(modes[1], sign))


@pytest.mark.parametrize("implementation", ["reference", "finufft"])
def test_no_points(implementation: str) -> None:
    plan = Plan(torch.zeros(0, 2), (8, 8), 1e-3, implementation=implementation)
    assert torch.equal(plan.type1(torch.zeros(3, 0)), torch.zeros(3, 8, 8, dtype=torch.complex64))
    assert plan.type2(torch.zeros(3, 8, 8)).shape == (3, 0)


def test_few_points_take_a_small_grid() -> None:
    """The fewer points, the less the grid is upsampled; the error stays."""
    point_MD, values, _ = case((40, 40, 40))
    few = Plan(point_MD, (40, 40, 40), 1e-3, dtype=torch.complex128, implementation="reference")
    many = FineGrid.of((40, 40, 40), 1e-3, None, "cpu", torch.float64, 10**7)
    assert few.fine.sizes == (50, 50, 50) and many.sizes == (80, 80, 80) and few.fine.window.width > many.window.width
    assert off(few.type1(values), direct1(point_MD, values, (40, 40, 40))) < 1e-3


def test_the_quickest_is_taken_for_each_type() -> None:
    point_MD, values, modes = case(SHAPES[0])
    plan = Plan(point_MD, SHAPES[0], 1e-3, implementation="quickest")
    assert "quickest of cpu" in plan.kernel and "finufft" in plan.kernel
    assert off(plan.type1(values), direct1(point_MD, values, SHAPES[0])) < 3e-3
    assert off(plan.type2(modes), direct2(point_MD, modes)) < 3e-3
    assert isinstance(plan.engine, Quickest)
    for kind in (1, 2):
        seconds = plan.engine.seconds[kind]
        assert plan.engine.chosen[kind] is plan.engine.engines[seconds.index(min(seconds))]
    assert "type 1: " in plan.kernel and "type 2: " in plan.kernel
    own, peer = plan.engine.engines
    assert isinstance(own, Own) and isinstance(peer, Peer)
    chosen = plan.engine.chosen.values()  # what is not needed any more is not kept
    assert (own._places is not None, peer._kept is not None) == (own in chosen, peer in chosen)
    plan.engine.forget()
    assert own._places is None and peer._kept is None
    assert off(plan.type1(values), direct1(point_MD, values, SHAPES[0])) < 3e-3


@pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("cufinufft"), reason="needs a GPU and cufinufft")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("accuracy", "dtype"), [(1e-3, torch.complex64), (1e-9, torch.complex128)])
def test_the_peer_on_a_gpu(shape: tuple[int, ...], accuracy: float, dtype: torch.dtype) -> None:
    point_MD, values, modes = (one.cuda() for one in case(shape))
    plan = Plan(point_MD, shape, accuracy, 2.0, dtype, "cufinufft")
    for vectors in (values, values[:1], values[1]):
        wanted = direct1(point_MD, vectors.view(-1, 300), shape).view(*vectors.shape[:-1], *shape)
        assert off(plan.type1(vectors), wanted) < 3 * accuracy
    assert off(plan.type2(modes), direct2(point_MD, modes)) < 3 * accuracy
    auto = Plan(point_MD, shape, 1e-3)
    assert off(auto.type1(values), direct1(point_MD, values, shape)) < 3e-3 and "cufinufft" in auto.kernel


def test_single_precision_of_the_peer_is_known() -> None:
    point_MD, *_ = case((24, 24))
    assert "finufft" in Plan(point_MD, (24, 24), 1e-4).kernel
    assert "finufft" not in Plan(point_MD, (2400, 24), 1e-4).kernel  # its points are in single precision
    assert "finufft" not in Plan(point_MD, (24, 24), 1e-4, dtype=torch.complex128).kernel
    with pytest.raises(InputError, match="cufinufft"):
        Plan(point_MD, (24, 24), implementation="cufinufft")


def test_gradients() -> None:
    shape = (3, 4, 4)
    point_MD, values, modes = case(shape, 5)
    for tensor in (point_MD, values, modes):
        tensor.requires_grad_()
    options = {"accuracy": 1e-9, "implementation": "reference"}
    tight = {"atol": 1e-6, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda p, c: nufft1(p, c, shape, -1, **options), (point_MD, values), **tight)
    assert torch.autograd.gradcheck(lambda p, f: nufft2(p, f, +1, **options), (point_MD, modes), **tight)
    plan = Plan(point_MD, shape, 1e-3, dtype=torch.complex128, implementation="reference")
    assert torch.autograd.gradgradcheck(lambda c: plan.type1(c).abs().square(), (values,), **tight)
    assert torch.autograd.gradgradcheck(lambda p, c: nufft1(p, c, shape, -1, **options), (point_MD, values), **tight)
    assert torch.autograd.gradgradcheck(lambda p, f: nufft2(p, f, +1, **options), (point_MD, modes), **tight)


@pytest.mark.parametrize(("points", "shape", "words", "said"), [
    (torch.tensor([[0.0, torch.nan, 0.0]]), (4, 4, 4), {}, "not finite"),
    (torch.tensor([[torch.inf, 0.0]]), (4, 4), {}, "not finite"),
    (torch.rand(3), (4, 4), {}, r"real coordinates \[M, 2\]"), (torch.ones(3, 2, dtype=torch.int64), (4, 4), {}, "int64"),
    (torch.rand(3, 2).numpy(), (4, 4), {}, "torch tensor"), (torch.rand(3, 2), (4, 4), {"implementation": "nope"}, "nope"),
])  # fmt: skip
def test_what_are_no_points_is_refused(points: torch.Tensor, shape: tuple[int, ...], words: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Plan(points, shape, **words)


@pytest.mark.parametrize("implementation", ["auto", "cpu", "reference"])
def test_nothing_is_transformed_into_nothing(implementation: str) -> None:
    plan = Plan(torch.rand(5, 3), (4, 4, 3), 1e-3, implementation=implementation)
    assert plan.type1(torch.zeros(0, 5)).shape == (0, 4, 4, 3) and plan.type2(torch.zeros(2, 0, 4, 4, 3)).shape == (2, 0, 5)
    empty = Plan(torch.zeros(0, 3), (4, 4, 3), 1e-3, implementation=implementation)
    assert empty.type2(torch.ones(2, 4, 4, 3)).shape == (2, 0) and not empty.type1(torch.zeros(0)).any()


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8), (12, 9, 20)])
def test_the_error_of_the_peer_that_is_chosen_is_the_one_asked_for(shape: tuple[int, ...]) -> None:
    """finufft asked for 1e-3 leaves 3.3e-3 of 8 x 8 modes."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        point_MD = 6.28 * torch.rand(37, len(shape), dtype=torch.float64, generator=generator)
        modes = torch.randn(1, *shape, dtype=torch.complex64, generator=generator)
        plan = Plan(point_MD, shape, 1e-3)
        assert "finufft" in plan.kernel
        assert off(plan.type2(modes), direct2(point_MD, modes.to(torch.complex128), +1)) < 1e-3


def test_normal_operator() -> None:
    """Type 2, weights, type 1 and the convolution that takes their place are the same to 1e-12."""
    shape = (6, 5, 8)
    point_MD, _, modes = case(shape)
    weight_M = torch.rand(len(point_MD), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = direct1(point_MD, weight_M * direct2(point_MD, modes), shape)
    found = Toeplitz.of(point_MD, weight_M, shape, 1e-13, 2.0, torch.complex128, "reference")(modes)
    assert off(found, wanted) < 1e-12
    exact = Toeplitz(direct1(point_MD, weight_M[None].to(modes), tuple(2 * n for n in shape))[0])
    assert off(exact(modes), wanted) < 1e-13


def test_normal_operator_of_pairs_of_points() -> None:
    shape = (6, 5, 8)
    half_MD, _, modes = case(shape, 40)
    point_MD, weight_M = torch.cat([half_MD, -half_MD]), torch.ones(80, dtype=torch.float64)
    kernel = direct1(point_MD, weight_M[None].to(modes), tuple(2 * n for n in shape))[0]
    assert off(Toeplitz(kernel, real=True)(modes.real), Toeplitz(kernel)(modes.real.to(modes.dtype)).real) < 1e-13


def test_a_map_and_its_slice() -> None:
    """Type 2 with sign -1 of a map is the transform of its projection."""
    box = 12
    map_ZYX = torch.rand(box, box, box, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    k = torch.arange(box) - box // 2
    ky, kx = torch.meshgrid(k, k, indexing="ij")
    point_MD = torch.stack([kx, ky, torch.zeros_like(kx)], -1).reshape(-1, 3).double() * (2 * math.pi / box)
    found = nufft2(point_MD, map_ZYX, -1, 1e-9, implementation="reference").view(box, box)
    wanted = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(map_ZYX.sum(0))))
    assert off(found, wanted) < 1e-9


def test_what_cannot_be_served_is_refused() -> None:
    point_MD, values, _ = case((8, 8))
    with pytest.raises(InputError, match="accuracy"):
        Plan(point_MD, (8, 8), 1e-9, dtype=torch.complex64)
    with pytest.raises(InputError, match="larger upsampling"):
        Plan(point_MD, (8, 8), 1e-12, 1.25, torch.complex128)
    with pytest.raises(InputError, match="coordinates"):
        Plan(point_MD, (8, 8, 8))
    with pytest.raises(InputError, match="last axes"):
        Plan(point_MD, (8, 8)).type1(values[:, :-1])
    with pytest.raises(InputError, match="sign"):
        Plan(point_MD, (8, 8)).type2(torch.zeros(8, 8), 2)
