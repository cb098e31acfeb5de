"""A Fourier volume of which every rank has a layer: it is sliced like a whole one, but ranks make the slices together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import PixelList
from verglas.distributed.rounds import Pixels, Rounds
from verglas.projection.volume import FourierVolume, sampling_matrices


@dataclass(frozen=True, kw_only=True)
class LayeredVolume(FourierVolume):
    """values, rows: of this rank's layer. rounds: in which slices are made; number: of the volume there."""

    rounds: Rounds
    number: int

    def slices(
        self, rotation_R33: Tensor, pixels: PixelList | Tensor, factor_K: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """As those of a whole volume; to be asked for between the beginning and the end of `rounds`."""
        coordinates = pixels.coordinates_K3(self.values.dtype) if isinstance(pixels, PixelList) else pixels
        if out is None:
            shape = (len(rotation_R33), 2, len(coordinates))
            out = torch.empty(shape, dtype=self.values.dtype, device=self.values.device)
        self.rounds.slices(self.number, rotation_R33, coordinates, factor_K, out)
        return out

    def slices_here(self, rotation_R33: Tensor, pixels: Pixels, out: Tensor) -> None:
        """Fill in the pixels that this rank has."""
        self.sampled(sampling_matrices(rotation_R33, self.padding), pixels.coordinates_k3, pixels.factor_k, out)
