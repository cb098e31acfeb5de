"""References of two dimensions: slices against exact transforms, sums against images, the in-plane grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import matrix_from_euler
from verglas.expectation.classes import ClassGrid
from verglas.expectation.in_plane import InPlaneGrid
from verglas.maximization.gather import WeightedSlices
from verglas.maximization.planes import (
    GATHERED_BYTES,
    PlaneAccumulator,
    centring_shifts,
    moved_planes,
    plane_spectra,
    solve_planes,
)
from verglas.projection.planes import FourierPlanes, plane_coordinates

BOX, CLASSES = 32, 3
PIXELS = half_plane_pixels(BOX)
SPOTS = [[(3.0, 1.0), (-2.0, 4.0)], [(-4.0, 2.0), (1.0, -3.0)], [(0.0, -5.0), (4.0, 4.0)]]  # (x, y) of each class, px
WIDTH = 2.0  # standard deviation of a spot, px


def images() -> Tensor:
    axis = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    y, x = axis[:, None], axis[None]
    return torch.stack([sum(torch.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * WIDTH**2)) for a, b in one) for one in SPOTS])


def exact(number: int, psi: float) -> Tensor:
    """Transform [K] of class `number` turned: r_image = Rz(psi) r_object; of sums of Gaussians, without a grid."""
    turn = matrix_from_euler(*torch.tensor([0.0, 0.0, psi], dtype=torch.float64))[:2, :2]
    k_K2 = PIXELS.coordinates_K3(torch.float64)[:, :2]
    total = torch.zeros(PIXELS.count, dtype=torch.complex128)
    for spot in SPOTS[number]:
        phase = -2 * math.pi / BOX * (k_K2 @ (turn @ torch.tensor(spot, dtype=torch.float64)))
        total += torch.polar(torch.ones_like(phase), phase)
    size = 2 * math.pi * WIDTH**2 * torch.exp(-2 * (math.pi * WIDTH / BOX) ** 2 * k_K2.square().sum(1))
    return total * size / BOX**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_are_transforms_of_turned_classes(dtype: torch.dtype) -> None:
    planes = FourierPlanes.from_images(images(), BOX // 2, 2.0, "cpu", dtype)
    psi_R = torch.tensor([0.0, 37.0, 90.0, -150.0, 200.0], dtype=torch.float64)
    class_R = torch.tensor([0, 2, 1, 0, 2])
    rotation_R33 = matrix_from_euler(torch.zeros_like(psi_R), torch.zeros_like(psi_R), psi_R)
    found_R2K = planes.slices(rotation_R33, class_R, PIXELS.coordinates_K3(dtype))
    for found, number, psi in zip(found_R2K, class_R.tolist(), psi_R.tolist()):
        wanted = exact(number, psi)
        error_K = (torch.complex(found[0], found[1]) - wanted).abs() / wanted.abs().max()
        off_origin_K = (PIXELS.x_K != 0) | (PIXELS.y_K != 0)  # at the origin nothing is interpolated, but corrected all the same
        assert float(error_K[off_origin_K].max()) < 0.02 and float(error_K.max()) < 0.05


def test_nothing_beyond_the_radius() -> None:
    planes = FourierPlanes.from_images(images(), 8, 2.0, "cpu")
    slices_R2K = planes.slices(torch.eye(3, dtype=torch.float64)[None], torch.tensor([1]), PIXELS.coordinates_K3())
    beyond_K = PIXELS.x_K**2 + PIXELS.y_K**2 > 8**2
    assert (slices_R2K[0][:, beyond_K] == 0).all() and (slices_R2K[0][:, ~beyond_K] != 0).any(0).all()
    lifted_K3, inside_K = plane_coordinates(PIXELS.coordinates_K3(), 8)
    assert bool((lifted_K3[:, 2] == 1).all()) and bool((inside_K == ~beyond_K).all())


def weighted(angles: int, dtype: torch.dtype = torch.float64) -> WeightedSlices:
    """Exact transforms of all classes at evenly spread angles, weight 2."""
    psi_U = torch.arange(angles * CLASSES, dtype=torch.float64) * (360 / angles)
    class_U = torch.arange(angles * CLASSES) // angles
    values_UK = torch.stack([exact(number, psi) for number, psi in zip(class_U.tolist(), psi_U.tolist())])
    zero_U = torch.zeros_like(psi_U)
    data_U2K = 2 * torch.stack([values_UK.real, values_UK.imag], 1).to(dtype)
    return WeightedSlices(data_U2K, torch.full((len(psi_U), PIXELS.count), 2.0, dtype=dtype),
                          matrix_from_euler(zero_U, zero_U, psi_U), PIXELS.coordinates_K3(dtype), class_U,
                          torch.arange(len(psi_U)))  # fmt: skip


@pytest.mark.parametrize("at_once", [True, False])
def test_averages_of_turned_images_are_the_images(at_once: bool) -> None:
    slices, sums = weighted(60), PlaneAccumulator(BOX, CLASSES, BOX // 2, 2.0, "cpu", torch.float64)
    orientations = len(slices.class_U)
    sums.add(slices, orientations if not at_once else int(GATHERED_BYTES))  # so many that they would not fit
    found = solve_planes(sums, None)
    assert float((found.image_CYX - images()).abs().max()) < 0.03
    tau2_CS = plane_spectra(images(), 2.0)
    damped = solve_planes(sums, tau2_CS, 2.0)
    assert float(damped.image_CYX.square().sum()) < float(found.image_CYX.square().sum())
    assert torch.allclose(damped.ssnr_CS[:, 1:8], (2 * tau2_CS / damped.sigma2_CS)[:, 1:8])


def test_batches_add_up_and_a_class_without_images_is_empty() -> None:
    whole, parts = (PlaneAccumulator(BOX, CLASSES + 1, BOX // 2, 2.0, "cpu", torch.float64) for _ in range(2))
    slices = weighted(24)
    whole.add(slices, len(slices.class_U))
    for first in range(0, len(slices.class_U), 10):
        part = slice(first, first + 10)
        parts.add(WeightedSlices(slices.data_U2K[part], slices.weight_UK[part], slices.rotation_U33[part],
                                 slices.coordinates_K3, slices.class_U[part], slices.index_U[part]),
                  len(slices.class_U))  # fmt: skip
    assert torch.allclose(whole.totals(), parts.totals(), atol=1e-12)
    assert bool((solve_planes(whole, None).image_CYX[CLASSES] == 0).all())


def test_slices_and_sums_are_adjoint() -> None:
    """<P x, d> = <x, B d> for voxels x as free numbers and any data d."""
    torch.manual_seed(1)
    planes = FourierPlanes.from_images(torch.randn(CLASSES, BOX, BOX, dtype=torch.float64), 12, 2.0, "cpu", torch.float64)
    slices = weighted(7)
    data_U2K = torch.randn_like(slices.data_U2K)
    cut_U2K = planes.slices(slices.rotation_U33, slices.class_U, slices.coordinates_K3)
    sums = PlaneAccumulator(BOX, CLASSES, 12, 2.0, "cpu", torch.float64)
    sums.turn(WeightedSlices(data_U2K, slices.weight_UK, *(getattr(slices, name) for name in
              ("rotation_U33", "coordinates_K3", "class_U", "index_U"))))  # fmt: skip
    assert sums.rows.count == planes.volume.rows.count
    added = float((sums.running_V4[:, :2] * planes.volume.values).sum())
    assert float((cut_U2K * data_U2K).sum()) == pytest.approx(added, rel=1e-9)


def test_centring_brings_the_mass_to_the_middle() -> None:
    moved_CYX = moved_planes(images(), torch.tensor([[2.0, -1.0], [0.5, 0.0], [0.0, 3.0]]))
    shift_C2 = centring_shifts(moved_CYX, 100.0)
    assert float(centring_shifts(moved_planes(moved_CYX, shift_C2), 100.0).abs().max()) < 0.05
    assert centring_shifts(moved_CYX, 0.5).norm(dim=1).max() <= 0.5 + 1e-9
    mean_C2 = torch.tensor(SPOTS, dtype=torch.float64).mean(1)
    expected_C2 = -mean_C2 - torch.tensor([[2.0, -1.0], [0.5, 0.0], [0.0, 3.0]])
    assert torch.allclose(shift_C2, expected_C2.double(), atol=0.1)


def test_children_surround_their_angle_in_every_class() -> None:
    grid = ClassGrid(InPlaneGrid.build(12.0, 1, 0.25), CLASSES)
    assert grid.count == 30 * CLASSES and grid.n_directions == CLASSES
    orientation_O = torch.arange(grid.count)
    assert torch.equal(grid.direction_of(orientation_O), grid.class_of(orientation_O))
    coarse, fine = grid.rotations(orientation_O), grid.child_rotations(torch.arange(2 * grid.count)).unflatten(0, (-1, 2))
    for child, offset in ((0, -3.0), (1, 3.0)):
        zero = torch.zeros(grid.count, dtype=torch.float64)
        turned = matrix_from_euler(zero, zero, zero + offset) @ coarse
        assert torch.allclose(fine[:, child], turned)
    first = matrix_from_euler(*torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64))
    assert torch.allclose(coarse[0], first)  # perturbed by a quarter of a step
