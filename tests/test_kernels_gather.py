"""One test over all versions of `gather` and `scatter`: against definitions, adjoint to each other, all written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verglas.kernels import implementation_of

# positions, modes of the object, of the light, whether each position has a light of its own, window
CASES = [(1, 1, 1, False, (1, 1)), (18, 1, 1, False, (16, 20)), (5, 2, 3, True, (33, 9))]


def inputs(batch: int, objects: int, modes: int, own: bool, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Object, corners (the outermost ones among them), light and exit waves, complex128."""
    draw = torch.Generator().manual_seed(batch)

    def field(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.complex128)

    corner = torch.stack([torch.randint(0, high, (batch,), generator=draw) for high in (10, 6)], 1)
    corner[-1] = torch.tensor([9, 5])
    image = field(objects, shape[0] + 9, shape[1] + 5)
    return image, corner, field(batch if own else 1, modes, *shape), field(batch, objects, modes, *shape)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_versions_agree(name: str, case: tuple[int, int, int, bool, tuple[int, int]]) -> None:
    image, corner, light, wave = inputs(*case)
    single = [one.to(torch.complex64) for one in (image, light, wave)]
    found = implementation_of("gather", name)(single[0], corner, single[1])
    expected, into, into_light = torch.zeros_like(wave), torch.zeros_like(image), torch.zeros_like(light)
    for b, (y, x) in enumerate(corner.tolist()):
        at = (slice(None), slice(y, y + case[4][0]), slice(x, x + case[4][1]))
        lit = light[b if case[3] else 0]
        expected[b] = image[at][:, None] * lit
        into[at] += (lit.conj() * wave[b]).sum(1)
        into_light[b if case[3] else 0] += (image[at][:, None].conj() * wave[b]).sum(0)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    summed = torch.ones_like(single[0])
    of_light = implementation_of("scatter", name)(single[2], corner, single[0], single[1], summed)
    assert (summed - 1 - into).abs().max() < 1e-6 * into.abs().max()
    assert (of_light - into_light).abs().max() < 1e-6 * into_light.abs().max()
    alone = implementation_of("scatter", name)(single[2], corner, single[0], single[1], None)
    assert (alone - of_light).abs().max() < 1e-6 * into_light.abs().max()


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(name: str, case: tuple[int, int, int, bool, tuple[int, int]]) -> None:
    """<gather(object), wave> is <object, what falls to it>, and the same of the light."""
    image, corner, light, wave = inputs(*case)
    into = torch.zeros_like(image)
    of_light = implementation_of("scatter", name)(wave, corner, image, light, into)
    product = torch.vdot(implementation_of("gather", name)(image, corner, light).flatten(), wave.flatten())
    for field, fallen in ((image, into), (light, of_light)):
        assert (torch.vdot(field.flatten(), fallen.flatten()) - product).abs() < 1e-12 * wave.norm() * field.norm()
