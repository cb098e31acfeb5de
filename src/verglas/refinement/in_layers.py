"""References and sums of one set of particles: whole, or, where these do not fit, a layer of each on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verglas.distributed.ranks import Ranks
from verglas.distributed.rounds import Pixels, Rounds
from verglas.expectation.images import ModelGrid
from verglas.expectation.slices import Reference, volume_of
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.layered import Across, LayeredAccumulator
from verglas.projection.layered import LayeredVolume
from verglas.projection.volume import FourierVolume

if TYPE_CHECKING:
    from verglas.refinement.computing import Computing


def references_of(maps: list[Tensor], grid: ModelGrid, on: Computing) -> tuple[list[FourierVolume], InLayers | None]:
    """What slices are cut from, of each map; and what answers other ranks where these are layers."""
    layers = InLayers.of(maps, grid, on.device, on.dtype, on.ranks, on.ready) if on.in_layers else None
    volumes = list[FourierVolume](layers.volumes if layers is not None else [])
    if layers is None:
        dtype = on.operand if on.cells or on.operand != torch.float16 else on.dtype
        volumes += [volume_of(map_ZYX, grid, on.device, dtype, on.ready) for map_ZYX in maps]
    on.ready.clear()
    return volumes, layers


@dataclass(frozen=True)
class InLayers:
    """What answers for this rank in rounds: its layers of the references, one of each class, and of the sums. radius: shells;
    dtype: of all of them."""

    volumes: list[LayeredVolume]
    across: Across
    radius: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, maps: list[Tensor], grid: ModelGrid, device: torch.device, dtype: torch.dtype, ranks: Ranks,
        ready: Sequence[Reference] = (),
    ) -> InLayers | None:  # fmt: skip
        """Layers of the transforms of some maps, which all ranks have; None where volumes have too few planes for all ranks.
        ready: references that may serve. All ranks call it alike."""
        across = Across.of(grid.box, grid.radius, grid.padding, device, ranks)
        if across is None:
            return None
        made = cls([], across, grid.radius, dtype)
        for number, map_ZYX in enumerate(maps):
            found = next((one.volume for one in ready if one.serves(map_ZYX, grid)), None)
            values_V2 = found.values if isinstance(found, LayeredVolume) else across.reference(map_ZYX, dtype)
            padding = across.padding
            volume = LayeredVolume(values_V2, across.mine, grid.box, padding, rounds=made.rounds, number=number)
            made.volumes.append(volume)
        return made

    @cached_property
    def rounds(self) -> Rounds:
        """In which ranks ask one another."""
        return Rounds(self.across.slabs.ranks, self.across.layers, self.across.padding, self.dtype, self)

    @cached_property
    def sums(self) -> list[Accumulator]:
        """Of each class, made when they are first needed."""
        return [LayeredAccumulator(self.radius, self.dtype, self.across, self.rounds, k) for k in range(len(self.volumes))]

    def serve(self) -> None:
        """Answer other ranks until none of them asks for anything; references are then forgotten here."""
        self.rounds.serve()
        self.volumes.clear()

    def slices_here(self, number: int, rotation_R33: Tensor, pixels: Pixels, out_R2K: Tensor) -> None:
        """As `Layered` says."""
        self.volumes[number].slices_here(rotation_R33, pixels, out_R2K)

    def add_here(self, number: int, values_R3K: Tensor, rotation_R33: Tensor, pixels: Pixels) -> None:
        """As `Layered` says."""
        one = self.sums[number]
        assert isinstance(one, LayeredAccumulator)
        one.add_here(values_R3K, rotation_R33, pixels)
