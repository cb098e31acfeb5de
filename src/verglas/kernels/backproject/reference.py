"""`backproject` as a physicist would write it: the adjoint of `project`, with a weight carried along."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.kernels.backproject.apart import Apart
from verglas.kernels.geometry import sample_positions, trilinear_corners


def backproject_reference(
    accumulator_V4: Tensor | Apart,
    rows: RowTable,
    data_R2K: Tensor | None,
    weight_RK: Tensor | None,
    sampling_R33: Tensor,
    coordinates_K3: Tensor,
    columns: tuple[int, int] | None = None,
) -> None:
    """Add slices into a packed volume in place: each sample goes to its eight voxels with trilinear weights.

    accumulator_V4: (sum of data re, im, sum of weight, unused), or both apart; data_R2K: real and imaginary plane of each slice,
    None if only weights are added; weight_RK: e.g. CTF^2 / sigma^2, None for no weight. sampling, coordinates and radius as in
    `project_reference`.
    columns: samples whose floor(p_x) is not in first .. last - 1 are left out, and `rows` need hold first .. last alone.
    """
    dtype = accumulator_V4.dtype
    position_RK3, sign_RK = sample_positions(sampling_R33.to(dtype), coordinates_K3.to(dtype))
    kept_RK = torch.ones_like(sign_RK)
    if columns is not None:
        kept_RK = ((position_RK3[..., 0] >= columns[0]) & (position_RK3[..., 0] < columns[1])).to(dtype)
    apart = accumulator_V4 if isinstance(accumulator_V4, Apart) else Apart(accumulator_V4[:, :2], accumulator_V4[:, 2])
    added = [] if data_R2K is None or apart.data_V2 is None else [
        (apart.data_V2[:, 0], data_R2K[:, 0]), (apart.data_V2[:, 1], sign_RK * data_R2K[:, 1])
    ]  # fmt: skip
    added += [] if weight_RK is None or apart.weight_V is None else [(apart.weight_V, weight_RK)]
    for address_RK, weight_of_corner_RK in trilinear_corners(position_RK3, rows):
        corner_RK = weight_of_corner_RK * kept_RK
        address = torch.where(corner_RK > 0, address_RK, 0).flatten()
        for sum_V, value_RK in added:
            sum_V.index_add_(0, address, (corner_RK * value_RK).flatten())
