"""maximization/reconstruct.py: from images of any optics group to slices of one model, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from blobs import Blobs
from verglas.core.fourier import centred_irfft2, half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere
from verglas.core.shells import fsc
from verglas.maximization import point_group
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.point_group import apply_in_planes, apply_point_group
from verglas.maximization.reconstruct import Geometry, GroupSlices, _split
from verglas.maximization.solve import gather_sums
from verglas.optics.ctf import CtfParameters, ctf_reference_BK
from verglas.optics.group import OpticsGroup

GEOMETRY = Geometry(box=32, pixel_size=3.0, radius=16)
PLAIN = OpticsGroup("plain", 1, 300.0, 2.7, 0.1, 3.0, 32)
BLOBS = Blobs.random(20, spread=26.0, sigma=3.6, seed=1)
MAP = BLOBS.map(32, 3.0)
N = 300
POSES = random_rotations(N, torch.Generator().manual_seed(2))
ORIGINS = 4 * torch.randn(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
DEFOCUS = 8000 + 12000 * torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
ZERO = torch.zeros(N, dtype=torch.float64)
CTF = CtfParameters(DEFOCUS + 400, DEFOCUS - 400, ZERO + 30, ZERO, ZERO, ZERO + 1)


def images(group: OpticsGroup, ctf_power: int = 1, origins: torch.Tensor = ORIGINS, extra_phase: float = 0.0) -> torch.Tensor:
    """Images [N, Y, X] as a microscope with the group's optics would give them: content displaced by -origin; its frequency
    s shows the model at M s. extra_phase: times u^2 u_x, radians, as an odd aberration."""
    pixels = half_plane_pixels(group.box)
    s_K2 = pixels.frequency_K2(group.pixel_size, torch.float64)
    u_K2 = s_K2 @ torch.tensor(group.magnification, dtype=torch.float64).T
    field = group.box * group.pixel_size
    slices = BLOBS.slices(POSES, u_K2, field, GEOMETRY.pixel_size)
    angle = 2 * math.pi * origins @ s_K2.T + extra_phase * u_K2.square().sum(1) * u_K2[:, 0]
    slices = slices * torch.polar(torch.ones_like(angle), angle) * ctf_reference_BK(s_K2, CTF, group) ** ctf_power
    return centred_irfft2(pixels.scatter(slices), group.box).float()


def reconstructed(*groups: tuple[OpticsGroup, torch.Tensor]) -> torch.Tensor:
    """Map from the images of one group or more."""
    sums = Accumulator(GEOMETRY.box, GEOMETRY.radius)
    for group, image in groups:
        slicer = GroupSlices(group, GEOMETRY, use_ctf=True, device="cpu")
        data, weight = slicer(image, ORIGINS, CTF)
        sums.add(data, weight, POSES, slicer.coordinates_K3)
    return gather_sums([sums]).map().double()


def agreement(found: torch.Tensor) -> tuple[float, float]:
    """Lowest FSC with the truth over shells 1-12 (0.75 of Nyquist), and grey values over the true ones."""
    return float(fsc(found, MAP)[1:13].min()), float((found * MAP).sum() / MAP.square().sum())


def test_data_and_weight_by_definition() -> None:
    """data = CTF X exp(-2 pi i s.origin), weight = CTF^2, of the exact slices; without CTF data = X, weight = 1."""
    slicer = GroupSlices(PLAIN, GEOMETRY, use_ctf=True, device="cpu")
    assert slicer.tables.pixels.count == half_plane_pixels(32).count and slicer.tables.field == 1
    s_K2 = slicer.tables.pixels.frequency_K2(3.0, torch.float64)
    ctf = ctf_reference_BK(s_K2, CTF, PLAIN)
    slices = BLOBS.slices(POSES, s_K2, 96.0, 3.0)
    inside = slicer.tables.pixels.shell_K < 16  # at Nyquist a shifted real image has lost its phase
    data, weight = slicer(images(PLAIN), ORIGINS, CTF)
    found = torch.complex(data[:, 0], data[:, 1])
    assert (found - slices * ctf**2)[:, inside].abs().max() < 1e-5 * slices.abs().max()
    assert torch.allclose(weight.double(), ctf**2, atol=1e-4)
    without = GroupSlices(PLAIN, GEOMETRY, use_ctf=False, device="cpu")
    data, weight = without(images(PLAIN), ORIGINS, CTF)
    found = torch.complex(data[:, 0], data[:, 1])
    assert (found - slices * ctf)[:, inside].abs().max() < 1e-5 * slices.abs().max()
    assert (weight == 1).all()


def test_origin_is_the_shift_that_centres() -> None:
    """By hand: a point at x = +6, y = -3 Å (2 and -1 px) has origin (-6, 3) Å; its slice is that of a point at the centre."""
    image = torch.zeros(1, 32, 32)
    image[0, 16 - 1, 16 + 2] = 32**2
    slicer = GroupSlices(PLAIN, GEOMETRY, use_ctf=False, device="cpu")
    data, _ = slicer(image, torch.tensor([[-6.0, 3.0]], dtype=torch.float64), CTF[:1])
    assert torch.allclose(data[0, 0], torch.ones(slicer.tables.pixels.count), atol=1e-4)
    assert float(data[0, 1].abs().max()) < 1e-4


@pytest.mark.parametrize("what", ["plain", "premultiplied", "corrected"])
def test_what_was_done_to_the_images_is_taken_into_account(what: str) -> None:
    group = replace(PLAIN, ctf_premultiplied=what == "premultiplied", ctf_corrected=what == "corrected")
    power = {"plain": 1, "premultiplied": 2, "corrected": 1}[what]  # the CTF of a corrected group is 1 everywhere
    similar, scale = agreement(reconstructed((group, images(group, power))))
    assert similar > 0.99 and scale == pytest.approx(1, abs=0.03)
    if what != "plain":  # the flag matters
        _, wrong = agreement(reconstructed((PLAIN, images(group, power))))
        assert abs(wrong - 1) > 0.1


ANISOTROPIC = ((1.04, 0.015), (0.015, 0.97))


@pytest.mark.parametrize(
    "change",
    [
        {"box": 48, "pixel_size": 2.0},  # finer pixels, same field
        {"box": 48},  # a wider field
        {"box": 28, "pixel_size": 3.3},
        {"magnification": ANISOTROPIC},
        {"magnification": ((1.02, 0.03), (-0.03, 1.02))},  # not symmetric: its transpose would turn the other way
        {"box": 40, "pixel_size": 2.5, "magnification": ANISOTROPIC, "voltage_kv": 200.0},
    ],
    ids=str,
)
def test_every_group_gives_the_same_map_in_the_same_grey_values(change: dict) -> None:
    group = replace(PLAIN, **change)
    similar, scale = agreement(reconstructed((group, images(group))))
    assert similar > 0.99 and scale == pytest.approx(1, abs=0.03)
    if "magnification" in change:
        ignored, _ = agreement(reconstructed((replace(group, magnification=PLAIN.magnification), images(group))))
        assert ignored < similar - 0.02


def test_groups_together() -> None:
    fine, skewed = replace(PLAIN, box=48, pixel_size=2.5), replace(PLAIN, magnification=ANISOTROPIC, ctf_premultiplied=True)
    found = reconstructed((PLAIN, images(PLAIN)), (fine, images(fine)), (skewed, images(skewed, ctf_power=2)))
    similar, scale = agreement(found)
    assert similar > 0.99 and scale == pytest.approx(1, abs=0.03)


def test_beam_tilt_is_demodulated() -> None:
    """phi = -2 pi Cs L^2 u^2 (t.u) 1e-3 (docs/conventions.md), t = (20, 0) mrad."""
    tilted = replace(PLAIN, beam_tilt_mrad=(20.0, 0.0))
    image = images(PLAIN, extra_phase=-2 * math.pi * 2.7e7 * tilted.wavelength_angstrom**2 * 20e-3)
    similar, _ = agreement(reconstructed((tilted, image)))
    ignored, _ = agreement(reconstructed((PLAIN, image)))
    assert similar > 0.99 and ignored < 0.9


def test_pixels_reach_as_far_as_the_model_is_kept() -> None:
    """Radius 10 of a 96 Å model field: 10 pixels of a like image, 15 of one of 144 Å, never more than its Nyquist."""
    kept = replace(GEOMETRY, radius=10)
    found = [
        GroupSlices(replace(PLAIN, **change), kept, False, "cpu").tables.pixels.radius
        for change in ({}, {"box": 48}, {"box": 48, "pixel_size": 2.0}, {"box": 16, "pixel_size": 6.0})
    ]
    assert found == [10, 15, 10, 8]


def test_batches_are_split_by_half() -> None:
    sums = [Accumulator(8), Accumulator(8)]
    mixed = [(s, rows.tolist()) for s, rows in _split(sums, np.array([1, 2]), np.array([2, 1, 2, 2]))]
    assert [rows for _, rows in mixed] == [[1], [0, 2, 3]] and mixed[0][0] is sums[0] and mixed[1][0] is sums[1]
    alone = list(_split(sums, np.array([1, 2]), np.array([2, 2])))
    assert len(alone) == 1 and alone[0][0] is sums[1] and alone[0][1] == slice(None)


@pytest.mark.parametrize("symmetry", ["C1", "C2", "C3", "D2", "D7"])
def test_c_and_d_groups_are_applied_in_place_plane_by_plane(symmetry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point_group, "PLANES_AT_ONCE", 500)
    rows = packed_sphere(9.0)
    sums_V4 = torch.randn(rows.count, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = apply_point_group(sums_V4.clone(), rows, symmetry)[:, :3]
    apply_in_planes(sums_V4, rows, symmetry)
    inside = rows.coordinates_V3().square().sum(1) < rows.radius**2
    torch.testing.assert_close(sums_V4[inside, :3], expected[inside], rtol=1e-12, atol=1e-12)
