"""`shift` as a physicist would write it; any device, any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks, owner


def shift_reference(
    image_B2K: Tensor, shift_T2: Tensor, x_K: Tensor, y_K: Tensor, box: int, out_dtype: torch.dtype = torch.float32,
    lists: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """See README.md: [B, T, 2, K], or [M, 2, K] with lists; computed in the precision of `image_B2K`, rounded to `out_dtype`."""
    cos_TK, sin_TK = (part.to(image_B2K.dtype) for part in turn_planes(shift_T2, x_K, y_K, box))
    real_B1K, imaginary_B1K = image_B2K[:, None, 0], image_B2K[:, None, 1]
    if lists is not None:
        image_M, shift_M = owner(lists.shift_ptr_B1, len(lists.shift_M)), lists.shift_M.long()
        real_B1K, imaginary_B1K = image_B2K[image_M, 0], image_B2K[image_M, 1]
        cos_TK, sin_TK = cos_TK[shift_M], sin_TK[shift_M]
    shifted_real = real_B1K * cos_TK - imaginary_B1K * sin_TK
    shifted_imaginary = real_B1K * sin_TK + imaginary_B1K * cos_TK
    return torch.stack([shifted_real, shifted_imaginary], -2).to(out_dtype)


def turn_planes(shift_T2: Tensor, x_K: Tensor, y_K: Tensor, box: int) -> tuple[Tensor, Tensor]:
    """(real, imaginary) [T, K] each, float64, of exp(-2 pi i (x s_x + y s_y) / box)."""
    shift_T2 = shift_T2.double()
    angle_TK = (-2 * math.pi / box) * (shift_T2[:, :1] * x_K + shift_T2[:, 1:] * y_K)
    return torch.cos(angle_TK), torch.sin(angle_TK)
