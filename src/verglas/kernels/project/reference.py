"""`project` as a physicist would write it; any device, any dtype, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.geometry import sample_positions, trilinear_corners


def project_reference(values_V2: Tensor, rows: RowTable, sampling_R33: Tensor, coordinates_K3: Tensor) -> Tensor:
    """Slices of a packed Fourier volume by trilinear interpolation.

    values_V2: (re, im) of each stored voxel; sampling_R33: maps image coordinates to voxels (padding included);
    coordinates_K3: integer image frequencies (x, y, z). Returns [R, 2, K], the real and the imaginary plane.
    Samples beyond the table's radius are 0.
    """
    position_RK3, sign_RK = sample_positions(sampling_R33.to(values_V2.dtype), coordinates_K3.to(values_V2.dtype))
    real_RK = torch.zeros_like(sign_RK)
    imaginary_RK = torch.zeros_like(sign_RK)
    for address_RK, weight_RK in trilinear_corners(position_RK3, rows):
        corner_RK2 = values_V2[address_RK]
        real_RK = real_RK + weight_RK * corner_RK2[..., 0]
        imaginary_RK = imaginary_RK + weight_RK * corner_RK2[..., 1]
    return torch.stack([real_RK, sign_RK * imaginary_RK], 1)
