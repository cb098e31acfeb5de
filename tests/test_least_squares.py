"""Least squares by conjugate gradients: the normal equations written out, what solves them, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from verglas.cli.main import main
from verglas.core.fourier import half_plane_pixels
from verglas.core.masks import soft_sphere
from verglas.core.rotations import random_rotations
from verglas.core.shells import fsc
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import read_map
from verglas.maximization import least_squares
from verglas.maximization.least_squares import NormalSums
from verglas.nufft.direct import direct2
from verglas.nufft.toeplitz import Toeplitz

BOX, SLICES = 8, 7


def slices(box: int, count: int, map_ZYX: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slices of a map, weighted: C X, C², poses, coordinates; float64."""
    generator = torch.Generator().manual_seed(1)
    rotation_R33 = random_rotations(count, generator)
    k_K3 = half_plane_pixels(box).coordinates_K3(torch.float64)
    point_M3 = (torch.einsum("rji,kj->rki", rotation_R33, k_K3) * (2 * math.pi / box)).reshape(-1, 3)  # p = A^-1 k
    value_RK = direct2(point_M3, map_ZYX[None].to(torch.complex128), -1)[0].view(count, -1) / box**2
    ctf_RK = torch.randn(count, len(k_K3), generator=generator, dtype=torch.float64)
    data_R2K = torch.view_as_real(value_RK * ctf_RK.square()).transpose(1, 2)
    return data_R2K, ctf_RK.square(), rotation_R33, k_K3


def blob(box: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(box, box, box, dtype=torch.float64, generator=generator) * soft_sphere(box, box / 4, 2)


def test_the_normal_equations_are_those_of_the_sums_written_out() -> None:
    data_R2K, weight_RK, rotation_R33, k_K3 = slices(BOX, SLICES, blob(BOX))
    sums = NormalSums(BOX, dtype=torch.float64, accuracy=1e-8)
    sums.add(data_R2K, weight_RK, rotation_R33, k_K3)
    found = sums.normal()
    # All coefficients of the plane: those of the half, and their conjugates, the origin once.
    p_M3 = torch.einsum("rji,kj->rki", rotation_R33, k_K3).reshape(-1, 3)
    axis = torch.arange(BOX).double() - BOX // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    angle_MV = p_M3 @ torch.stack([x, y, z]).view(3, -1) * (-2 * math.pi / BOX)
    a_MV = torch.polar(torch.ones_like(angle_MV), angle_MV) / BOX**2
    twice_M = torch.where(p_M3.norm(dim=1) < 1e-9, 1.0, 2.0).double()
    value_M = torch.complex(data_R2K[:, 0], data_R2K[:, 1]).flatten()
    rhs_V = (a_MV.conj().T @ (twice_M * value_M)).real
    normal_VV = (a_MV.conj().T @ ((twice_M * weight_RK.flatten())[:, None] * a_MV)).real
    torch.testing.assert_close(found.rhs_ZYX.flatten(), rhs_V, rtol=0, atol=1e-7 * float(rhs_V.abs().max()))
    trial = blob(BOX)
    wanted = (normal_VV @ trial.flatten()).view_as(trial)
    turned = Toeplitz(found.kernel_DDD, real=True)(trial)
    torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-7 * float(wanted.abs().max()))
    assert float(found.weight().min()) >= 0 and sums.slices == SLICES


def test_the_map_of_slices_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "LEAST", 1e-6)
    monkeypatch.setattr(least_squares, "RESIDUAL", 1e-6)
    box = 16
    truth = blob(box)
    sums = NormalSums(box, dtype=torch.float64)
    sums.add(*slices(box, 80, truth))
    found = sums.normal().map().double()
    curve_S = fsc(found, truth)  # white up to the corners of the transform: what lies beyond the radius is no part of slices
    assert float(curve_S[1:6].min()) > 0.998 and float(curve_S[7]) > 0.99
    assert float((found * truth).sum() / truth.square().sum()) == pytest.approx(0.55, abs=0.1)


def test_sums_are_additive_and_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    data_R2K, weight_RK, rotation_R33, k_K3 = slices(BOX, SLICES, blob(BOX))
    whole, parts = NormalSums(BOX, symmetry="C2"), NormalSums(BOX)
    whole.add(data_R2K.float(), weight_RK.float(), rotation_R33, k_K3.float())
    monkeypatch.setattr(least_squares, "SLICES_PER_FLUSH", 2)
    monkeypatch.setitem(least_squares.POINTS_AT_ONCE, "cpu", 1)
    for operator in symmetry_matrices("C2"):
        parts.add(data_R2K.float(), weight_RK.float(), rotation_R33 @ operator, k_K3.float())
    assert parts.settled_2ZYX2 is not None
    both = whole.normal(), parts.normal()
    for one, other in ((both[0].rhs_ZYX, both[1].rhs_ZYX), (both[0].kernel_DDD, both[1].kernel_DDD)):
        assert float((one - other).abs().max()) < least_squares.ACCURACY * float(one.abs().max())
    twice = whole.normal() + whole.normal()
    prior_S = whole.normal().data_prior(whole.normal().weight())
    monkeypatch.setattr(least_squares, "FIRST_REGULARISED_SHELL", 0)
    found, expected = twice.map(2 * prior_S, keep_scale=True), whole.normal().map(prior_S, keep_scale=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    torch.testing.assert_close(twice.shell_weight(), 2 * whole.normal().shell_weight())


def test_the_command(tmp_path: Path) -> None:
    words = ["simulate", "--n", "150", "--box", "24", "--pixel", "8", "--snr", "1", "--seed", "1", "--model", "demo"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "set")]) == 0
    options = ["--particles", str(tmp_path / "set/truth.star"), "--half-maps", "--device", "cpu"]
    means, truth = {}, torch.from_numpy(read_map(tmp_path / "set/truth.mrc").data_ZYX.copy())
    mask = soft_sphere(24, 9, 3)
    for name, more in {"plain": [], "exact": ["--gridding", "exact"], "cg": ["--solver", "cg"]}.items():
        assert main(["reconstruct", *options, *more, "--out", str(tmp_path / name)]) == 0
        found = torch.from_numpy(read_map(tmp_path / name / "map.mrc").data_ZYX.copy())
        means[name] = float(fsc(found * mask, truth * mask)[1:12].mean())
        assert (tmp_path / name / "map_wiener.mrc").exists() and (tmp_path / name / "fsc.csv").exists()
        scale = float((found * truth * mask).sum() / (truth.square() * mask).sum())
        assert scale == pytest.approx(1, abs=0.15)
    print(means)
    assert means["exact"] >= means["plain"] - 0.001 and means["cg"] >= means["exact"] - 0.001
    assert json.loads((tmp_path / "cg/result.json").read_text())["figures"]["resolution_masked"]["value"] < 40
    assert main(["reconstruct", *options, "--solver", "cg", "--gridding", "exact", "--out", str(tmp_path / "no")]) == 2


def test_the_prior_of_the_data_is_that_of_their_variances() -> None:
    """White map and noise of known variance: 1 / R = N³ s² / tau² over the shells."""
    box, scale = 24, 2.5
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(box, box, box, dtype=torch.float64, generator=generator) * soft_sphere(box, box / 4, 2)
    data_R2K, weight_RK, rotation_R33, k_K3 = slices(box, 60, truth)
    noise_R2K = scale / math.sqrt(2) * torch.randn(data_R2K.shape, dtype=torch.float64, generator=generator) / box
    sums = NormalSums(box, dtype=torch.float64)
    sums.add(data_R2K + weight_RK.sqrt()[:, None] * noise_R2K, weight_RK, rotation_R33, k_K3)
    equations = sums.normal()
    tau2 = float(truth.square().sum())  # of each coefficient of a white map
    expected = box**3 * (scale / box) ** 2 / tau2
    found_S = equations.data_prior(equations.weight())[3:-1]
    assert float(found_S.log().mean().exp()) == pytest.approx(expected, rel=0.25)
    assert float((found_S / expected).log().abs().max()) < 0.8, "in every shell"
