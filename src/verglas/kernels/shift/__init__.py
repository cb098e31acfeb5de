"""`shift`: shifted copies of images, all of them or those of lists. README.md gives the formula, `reference.py` defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.kernels import choose_single, implementation_of
from verglas.kernels.blocks import Blocks


def shift(
    image_B2K: Tensor, shift_T2: Tensor, x_K: Tensor, y_K: Tensor, box: int, out_dtype: torch.dtype = torch.float32,
    implementation: str = "auto", lists: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """[B, T, 2, K] copies of images moved by shift_T2 px (x, y), positive towards + (see `shift_reference`).

    lists: only the shifts `shift_M` of each particle, [M, 2, K] in their order.

    x_K, y_K: integer frequencies (int32) of a `box` px image. implementation: "auto", "reference", "cpu" or "triton";
    see `verglas.kernels.choose` (float64 images run the reference). TypeError where it cannot write `out_dtype`.
    """
    name = choose_single(image_B2K, implementation)
    return implementation_of("shift", name)(image_B2K, shift_T2, x_K, y_K, box, out_dtype, lists)
