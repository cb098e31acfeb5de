"""Passes over the stored voxels of a packed volume where they are Numba's (`voxels_cpu`), which the first of them loads."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor


def compiled(values: Tensor) -> bool:
    """Whether these passes take the place of the plain torch formulas: on the CPU."""
    return values.device.type == "cpu"


def __getattr__(name: str) -> Any:
    return getattr(import_module("verglas.kernels.voxels_cpu"), name)
