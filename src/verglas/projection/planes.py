"""References of two dimensions in the machinery of three: the transform of class c fills the planes z = +(c+1) and -(c+1) of one
packed volume.

A slice of class c at in-plane angle psi is then a sample of that volume at S k, with k = (x, y, 1) and

    S = [q Rz(psi)^-1 0]      q: padding
        [    0        c+1]

so that z is whole, where trilinear interpolation is bilinear in the plane. Kernels turn positions of x < 0 into -p and take the
conjugate there: that is in plane -(c+1), which holds the same transform. So all classes are cut by one call of
kernels/project, and added to by one call of kernels/backproject.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import centred_rfft2
from verglas.core.masks import radius_grid
from verglas.core.rows import RowTable, packed_planes
from verglas.projection.volume import FourierVolume, padded_size


def plane_gridding_correction(box: int, padding: float, device: torch.device | str = "cpu") -> Tensor:
    """sinc^2(rho / (N padding)) on the image grid [Y, X]: what bilinear interpolation multiplies an image by, nearly."""
    return torch.sinc(radius_grid(box, 2, device) / (box * padding)).square_()


def plane_sampling(rotation_R33: Tensor, class_R: Tensor, padding: float) -> Tensor:
    """The matrices S of the module's text, float64 [R, 3, 3]; rotations about z, of classes counted from 0."""
    sampling_R33 = torch.zeros_like(rotation_R33, dtype=torch.float64)
    sampling_R33[:, :2, :2] = padding * rotation_R33[:, :2, :2].double().transpose(1, 2)
    sampling_R33[:, 2, 2] = class_R + 1
    return sampling_R33


def plane_coordinates(coordinates_K3: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """k = (x, y, 1) of image frequencies, and which lie within the radius, bool [K]; those beyond are put at the origin."""
    inside_K = coordinates_K3.norm(dim=1) <= radius + 0.005
    lifted_K3 = coordinates_K3 * inside_K[:, None]
    lifted_K3[:, 2] = 1
    return lifted_K3, inside_K


def plane_table(radius: int, padding: float, classes: int, device: torch.device | str = "cpu") -> RowTable:
    """Where the voxels of all classes lie. radius: largest image frequency."""
    return packed_planes(float(int(radius * padding + 0.5)), classes, device)


def voxel_places(rows: RowTable, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """For every packed voxel its place in [C, size, size/2 + 1] transforms (0 if it has none), and whether it has one."""
    x, y, z = rows.coordinates_V3().long().unbind(1)
    has_one = (z != 0) & (z.abs() <= classes) & (x <= size // 2) & (y.abs() <= size // 2)
    place = ((z.abs() - 1) * size + y % size) * (size // 2 + 1) + x
    return torch.where(has_one, place, 0), has_one


@dataclass(frozen=True)
class FourierPlanes:
    """Transforms of C images up to image frequency `radius`, ready to be sliced; padding: in force."""

    volume: FourierVolume
    classes: int
    radius: int

    @classmethod
    def from_images(
        cls, image_CYX: Tensor, radius: int, padding: float, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> FourierPlanes:
        """In units of the forward-normalised transform of the images; dtype as `FourierVolume.from_map`."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        fourier_CYX, padding = padded_planes(image_CYX.to(device, work), padding)
        classes, size = len(image_CYX), fourier_CYX.shape[1]
        rows = plane_table(radius, padding, classes, device)
        place_V, has_one_V = voxel_places(rows, size, classes)
        values_V2 = torch.view_as_real(fourier_CYX).reshape(-1, 2)[place_V] * has_one_V[:, None]
        volume = FourierVolume.of_voxels(values_V2, rows, image_CYX.shape[-1], padding, dtype)
        return cls(volume, classes, radius)

    def slices(
        self, rotation_R33: Tensor, class_R: Tensor, coordinates_K3: Tensor, factor_K: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[R, 2, K] of classes at poses A = Rz(psi); the rest as `FourierVolume.slices`. 0 beyond the radius."""
        lifted_K3, inside_K = plane_coordinates(coordinates_K3, self.radius)
        factor_K = inside_K.to(lifted_K3) if factor_K is None else factor_K * inside_K
        sampling_R33 = plane_sampling(rotation_R33, class_R, self.volume.padding)
        return self.volume.sampled(sampling_R33, lifted_K3, factor_K, out)


def padded_planes(image_CYX: Tensor, padding: float) -> tuple[Tensor, float]:
    """Gridding-corrected, zero-padded, centred transforms [C, P, P/2 + 1] in units of 1/N^2 transforms; the padding in force."""
    box = image_CYX.shape[-1]
    size = padded_size(box, padding)
    first = size // 2 - box // 2
    corrected_CYX = image_CYX / plane_gridding_correction(box, size / box, image_CYX.device).to(image_CYX.dtype)
    padded_CYX = image_CYX.new_zeros(len(image_CYX), size, size)
    padded_CYX[:, first : first + box, first : first + box] = corrected_CYX
    return centred_rfft2(padded_CYX).mul_(size**2 / box**2), size / box
