"""`backproject` as a physicist would write it: the adjoint of `project`, with a weight carried along."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.geometry import sample_positions, trilinear_corners


def backproject_reference(
    accumulator_V4: Tensor,
    rows: RowTable,
    data_R2K: Tensor,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
    columns: tuple[int, int] | None = None,
) -> None:
    """Add slices into a packed volume in place: each sample goes to its eight voxels with trilinear weights.

    accumulator_V4: (sum of data re, im, sum of weight, unused); data_R2K: real and imaginary plane of each slice;
    weight_RK: e.g. CTF^2 / sigma^2, None for no weight. sampling, coordinates and radius as in `project_reference`.
    columns: samples whose floor(p_x) is not in first .. last - 1 are left out, and `rows` need hold first .. last alone.
    """
    dtype = accumulator_V4.dtype
    position_RK3, sign_RK = sample_positions(sampling_R33.to(dtype), coordinates_K3.to(dtype))
    real_RK, imaginary_RK = data_R2K[:, 0], sign_RK * data_R2K[:, 1]
    kept_RK = torch.ones_like(sign_RK)
    if columns is not None:
        kept_RK = ((position_RK3[..., 0] >= columns[0]) & (position_RK3[..., 0] < columns[1])).to(dtype)
    for address_RK, weight_of_corner_RK in trilinear_corners(position_RK3, rows):
        corner_RK = weight_of_corner_RK * kept_RK
        address = torch.where(corner_RK > 0, address_RK, 0).flatten()
        accumulator_V4[:, 0].index_add_(0, address, (corner_RK * real_RK).flatten())
        accumulator_V4[:, 1].index_add_(0, address, (corner_RK * imaginary_RK).flatten())
        if weight_RK is not None:
            accumulator_V4[:, 2].index_add_(0, address, (corner_RK * weight_RK).flatten())
