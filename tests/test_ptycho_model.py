"""The batched model against the reference: patterns, gradients (autograd, finite differences), polynomials along a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fft import fftshift, ifftshift

from ptycho_world import CASES, World, world
from verglas.ptychography.model import Model
from verglas.ptychography.noise import noise_named
from verglas.ptychography.polynomial import value
from verglas.ptychography.reference import loss_reference, pattern_reference
from verglas.ptychography.simulation import Setting, make_truth, patterns
from verglas.ptychography.simulation_options import DetectorOptions, PathOptions
from verglas.ptychography.unknowns import Line, Unknowns


def unknowns_of(one: World, dtype: torch.dtype = torch.float64) -> Unknowns:
    found = one.found
    background = ifftshift(found.background_YX) if one.geometry.kind == "far" else found.background_YX
    everything = Unknowns(
        found.object_OLYX, found.probe_MYX, found.scale_B, background, found.positions_B2, found.eigen_KYX, found.opr_BK
    )
    kinds = {True: dtype.to_complex(), False: dtype}
    return Unknowns(**{n: v.to(kinds[v.is_complex()]) if n != "positions_B2" else v for n, v in everything.items()})


def model_of(one: World, moves: bool = True, dtype: torch.dtype = torch.float64) -> Model:
    window = (one.found.probe_MYX.shape[1], one.found.probe_MYX.shape[2])
    return Model(one.geometry, window, one.found.pixel, torch.zeros(1, dtype=dtype), moves)


def everything(one: World) -> Tensor:
    return torch.arange(len(one.counts_BYX))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_patterns(case: str, dtype: torch.dtype, tolerance: float) -> None:
    one = world(case)
    (found,) = model_of(one, dtype=dtype).waves(Line(unknowns_of(one, dtype)), everything(one)).intensity
    expected = torch.stack([pattern_reference(one.found, one.geometry, b) for b in range(len(found))])
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_whole_positions_need_no_fractions() -> None:
    one = world("far, modes", whole=True)
    line = Line(unknowns_of(one))
    (with_ramps,) = model_of(one).waves(line, everything(one)).intensity
    (without,) = model_of(one, moves=False).waves(line, everything(one)).intensity
    assert (with_ramps - without).abs().max() < 1e-12 * without.max()


def gradient_of(one: World, noise: str, moves: bool = True) -> Unknowns:
    """By the model, in two batches."""
    model, unknowns = model_of(one, moves), unknowns_of(one)
    if not moves:
        unknowns = unknowns.only(*(name for name, _ in unknowns.items()))
    into = Unknowns(**{name: torch.zeros_like(t) for name, t in unknowns.items() if moves or name != "positions_B2"})
    line, likelihood = Line(unknowns), noise_named(noise)
    for rows in everything(one).split(3):
        waves = model.waves(line, rows)
        slope = likelihood.slope(waves.intensity[0], one.counts_BYX[rows]) * one.mask_YX
        model.add_gradient(line, waves, slope, into)
    return into


def reference_gradient(one: World, noise: str) -> Unknowns:
    """By autograd through the reference; the background back in the order of the FFT."""
    names = ("object_OLYX", "probe_MYX", "scale_B", "background_YX", "positions_B2", "eigen_KYX", "opr_BK")
    leaves = {n: v.clone().requires_grad_() for n in names if (v := getattr(one.found, n)) is not None}
    loss_reference(replace(one.found, **leaves), one.geometry, one.counts_BYX, one.mask_YX, noise == "poisson").backward()
    gradient = {name: leaf.grad for name, leaf in leaves.items()}
    if one.geometry.kind == "far":
        gradient["background_YX"] = ifftshift(gradient["background_YX"])
    return Unknowns(**gradient)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("noise", ["amplitude", "poisson"])
def test_gradients_are_those_of_autograd(case: str, noise: str) -> None:
    one = world(case)
    found, expected = gradient_of(one, noise), reference_gradient(one, noise)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-9 * gradient.abs().max(), name


def test_gradients_at_whole_positions() -> None:
    one = world("far, three slices", whole=True)
    found, expected = gradient_of(one, "amplitude", moves=False), reference_gradient(one, "amplitude")
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() < 1e-9 * expected[name].abs().max(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("noise", ["amplitude", "poisson"])
def test_gradients_are_finite_differences(case: str, noise: str) -> None:
    one = world(case)
    gradient = gradient_of(one, noise)
    draw = torch.Generator().manual_seed(1)
    for name, slope in gradient.items():
        direction = torch.randn(slope.shape, generator=draw, dtype=slope.dtype)
        along = direction if name != "background_YX" or one.geometry.kind == "near" else fftshift(direction)

        def loss(step: float, name: str = name, along: Tensor = along) -> Tensor:
            moved = replace(one.found, **{name: getattr(one.found, name) + step * along})
            return loss_reference(moved, one.geometry, one.counts_BYX, one.mask_YX, noise == "poisson")

        h = 1e-4  # differences of fourth order: their own error is of order h^4
        measured = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        predicted = Unknowns(**{name: slope}).dot(Unknowns(**{name: direction}))
        scale = max(abs(predicted), float(slope.norm() * direction.norm()) * 1e-2)
        assert abs(predicted - measured) < 1e-6 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_intensity_is_a_polynomial_along_a_step(case: str) -> None:
    one = world(case)
    unknowns, model = unknowns_of(one), model_of(one)
    draw = torch.Generator().manual_seed(2)
    step = {n: torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in unknowns.items() if n != "positions_B2"}
    along = model.waves(Line(unknowns, Unknowns(**step)), everything(one)).intensity
    for length in (-0.3, 0.7):
        moved = unknowns.plus(Unknowns(**step), length)
        (expected,) = model.waves(Line(moved), everything(one)).intensity
        assert (value(along, length) - expected).abs().max() < 1e-11 * expected.max()


def test_degrees_along_a_step() -> None:
    one = world("far")
    unknowns, model = unknowns_of(one), model_of(one)
    for names, coefficients in ((("object_OLYX",), 3), (("object_OLYX", "probe_MYX"), 5)):
        assert len(model.waves(Line(unknowns, unknowns.only(*names)), everything(one)).intensity) == coefficients


@pytest.mark.parametrize("near_field", [False, True])
def test_simulated_scans_are_what_the_model_predicts(near_field: bool) -> None:
    """The simulation has code of its own, splits positions by rounding down, and so moves probes by up to a whole pixel."""
    setting = Setting(
        path=PathOptions(positions=6), detector=DetectorOptions(window=64, noiseless=True, near_field=near_field),
    )  # fmt: skip
    truth = make_truth(setting)
    counts = torch.from_numpy(np.concatenate(list(patterns(truth, setting)))).double()
    object_OLYX, probe_MYX = torch.from_numpy(truth.object_YX)[None, None], torch.from_numpy(truth.probe_MYX)
    numbers = Unknowns(
        object_OLYX, probe_MYX, torch.ones(6).double(), torch.zeros(64, 64).double(), torch.from_numpy(truth.position_B2)
    )
    model = Model(truth.geometry, (64, 64), truth.geometry.object_pixel((64, 64)), counts)
    (found,) = model.waves(Line(numbers), torch.arange(6)).intensity
    found = found if near_field else fftshift(found, (1, 2))
    assert (found.sqrt() - counts.sqrt()).square().sum() < 1e-4 * counts.sum()
