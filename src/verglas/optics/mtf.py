"""Modulation transfer of a detector, as RELION's STAR tables give it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.io.star import read_star


@dataclass(frozen=True)
class MtfCurve:
    """MTF samples; frequency in 1/pixel of the original detector pixel (0 to 0.5, ascending), value 1 at 0."""

    frequency: np.ndarray
    value: np.ndarray

    @classmethod
    def read(cls, path: Path | str) -> MtfCurve:
        """Read rlnResolutionInversePixel and rlnMtfValue from a STAR file; InputError if they are missing or unusable."""
        for block in read_star(Path(path)).values():
            if block.is_loop and {"rlnResolutionInversePixel", "rlnMtfValue"} <= set(block.frame.columns):
                columns = block.frame[["rlnResolutionInversePixel", "rlnMtfValue"]].to_numpy(np.float64)
                return cls._checked(path, columns[:, 0], columns[:, 1])
        raise InputError(
            path,
            "holds no MTF curve",
            "a table with columns rlnResolutionInversePixel and rlnMtfValue",
            "Give the MTF file of your detector at your voltage.",
        )

    @classmethod
    def _checked(cls, path: Path | str, frequency: np.ndarray, value: np.ndarray) -> MtfCurve:
        usable = len(frequency) > 1 and np.isfinite(frequency).all() and np.isfinite(value).all()
        if not (usable and (np.diff(frequency) > 0).all() and (value > 0).all()):
            raise InputError(path, "MTF curve is not usable", "at least two rows, frequencies ascending, finite values above 0")
        return cls(frequency, value)

    def at(self, frequency: Tensor, original_pixel_size: float) -> Tensor:
        """MTF at frequencies in 1/Å (any shape), for a detector pixel in Å: linear between samples, constant beyond the last."""
        per_pixel = frequency.detach().cpu().double().numpy() * original_pixel_size
        values = np.interp(per_pixel, self.frequency, self.value)
        return torch.from_numpy(np.asarray(values)).to(frequency.device, frequency.dtype)
