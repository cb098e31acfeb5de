"""Parts of the model beyond one object and one probe are found, not only fitted: modes of probe and object, change, slices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptycho_world import made_up, scan_of, smooth
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.reconstruct import PassDone, reconstruct
from verglas.ptychography.scan import Geometry, Reconstruction

TRUTH = made_up()
LIT = slice(14, 42)


def found_of(truth: Reconstruction, geometry: Geometry | None = None, **options: object) -> PassDone:
    *_, done = reconstruct(scan_of(truth, geometry), PtychoOptions(**options))  # type: ignore[arg-type]
    return done


def space_shared(found_MYX: Tensor, true_MYX: Tensor) -> float:
    """Share of the true modes' power in the space that the found ones span: modes may be mixed among themselves."""
    basis, _ = torch.linalg.qr(found_MYX.to(torch.complex128).flatten(1).T)
    true = true_MYX.flatten(1).T
    return float((basis.mH @ true).abs().square().sum() / true.abs().square().sum())


def likeness(found_YX: Tensor, true_YX: Tensor) -> float:
    """Correlation of two real images but for means."""
    a, b = found_YX.double() - found_YX.double().mean(), true_YX.double() - true_YX.double().mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def phase(found: Reconstruction, mode: int = 0, layer: int = 0) -> Tensor:
    """Phase of neighbours' products along columns where all light was: free of a constant; its slope is a constant."""
    rows, columns = (slice(LIT.start - int(o), LIT.stop - int(o)) for o in found.origin_2)
    object_YX = found.object_OLYX[mode, layer, rows, columns]
    return torch.angle(object_YX[:, 1:] * object_YX[:, :-1].conj())


def test_modes_of_the_probe() -> None:
    second = TRUTH.probe_MYX * torch.linspace(-1, 1, 32, dtype=torch.float64) * 1.5
    truth = replace(TRUTH, probe_MYX=torch.cat([TRUTH.probe_MYX, second]))
    two, one = (found_of(truth, probe_modes=count, passes=40) for count in (2, 1))
    assert space_shared(two.found.probe_MYX, truth.probe_MYX) > 0.96 > 0.92 > space_shared(one.found.probe_MYX, truth.probe_MYX)
    assert likeness(phase(two.found), phase(TRUTH)) > 0.95 and two.error < 0.5 * one.error


def test_a_probe_that_changes() -> None:
    eigen = TRUTH.probe_MYX * smooth(32, 32, seed=9, width=3)
    weight_B = 0.3 * torch.randn(len(TRUTH.positions_B2), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = found_of(replace(TRUTH, eigen_KYX=eigen, opr_BK=weight_B[:, None]), opr_modes=1, passes=30).found
    assert found.opr_BK is not None and found.eigen_KYX is not None
    assert abs(likeness(found.opr_BK[:, 0], weight_B)) > 0.98
    true_MYX = torch.cat([TRUTH.probe_MYX, eigen])
    assert space_shared(torch.cat([found.probe_MYX, found.eigen_KYX]), true_MYX) > 0.98 > space_shared(found.probe_MYX, true_MYX)


def test_slices() -> None:
    """Far enough apart, each slice is found in its own place."""
    geometry = Geometry("far", 1e-10, 2.0, 75e-6, (1.5e-2,))
    second = torch.exp(0.4j * smooth(*TRUTH.object_OLYX.shape[-2:], seed=8, width=1.5))
    object_OLYX = torch.cat([TRUTH.object_OLYX, second[None, None]], 1)
    truth = replace(TRUTH, object_OLYX=object_OLYX, pixel=geometry.object_pixel((32, 32)))
    found = found_of(truth, geometry, passes=40).found
    for layer in (0, 1):
        own, other = (likeness(phase(found, layer=layer), phase(truth, layer=one)) for one in (layer, 1 - layer))
        assert own > 0.9 and abs(other) < 0.2, (layer, own, other)


def test_modes_of_the_object() -> None:
    """An object that shakes between two states: patterns are their sum, and two modes explain what one cannot."""
    states = torch.cat([TRUTH.object_OLYX, TRUTH.object_OLYX.roll((2, 1), (-2, -1))]) / 2**0.5
    two, one = (found_of(replace(TRUTH, object_OLYX=states), object_modes=count, passes=30) for count in (2, 1))
    assert two.error < 0.4 * one.error
