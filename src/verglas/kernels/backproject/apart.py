"""Sums whose data and weights lie in arrays of their own: 12 bytes a voxel in place of 16, and either of them alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Apart:
    """data_V2: sums of data (re, im); weight_V: sums of weights. None: not wanted; one of them is there."""

    data_V2: Tensor | None
    weight_V: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.some.device

    @property
    def dtype(self) -> torch.dtype:
        return self.some.dtype

    @property
    def some(self) -> Tensor:
        """One that is there."""
        found = self.data_V2 if self.weight_V is None else self.weight_V
        assert found is not None
        return found
