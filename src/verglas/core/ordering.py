"""Order of pixels that keeps neighbours together."""


from __future__ import annotations

import torch
from torch import Tensor


def spread_bits(value: Tensor) -> Tensor:
    """Put a zero between the bits of non-negative integers below 2^16 (half of a Morton code)."""
    value = value.long()
    for shift, pattern in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        value = (value | (value << shift)) & pattern
    return value


def morton_order(x_K: Tensor, y_K: Tensor) -> Tensor:
    """Order (int64 [K]) of pixels along a Morton curve: a run of pixels is a compact patch of the image."""
    return torch.argsort(spread_bits(x_K - x_K.min()) | (spread_bits(y_K - y_K.min()) << 1), stable=True)
