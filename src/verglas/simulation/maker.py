"""Everything that one optics group needs to make its finished images, set up once, then called on batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2
from verglas.simulation.imaging import HalfPlane, Transfer
from verglas.simulation.noise import Junk, NoiseModel, WhiteNoise
from verglas.simulation.options import ImageOptions
from verglas.simulation.signal import SignalSource
from verglas.simulation.truth import Truth

PROBES = 64  # particles whose mean signal power sets the scale of a group: the first ones, whatever the batch


@dataclass(frozen=True)
class Scene:
    """What all groups of a simulation share: the truth, its rotations, the junk (junk_of_B: its number, -1 for particles)."""

    truth: Truth
    rotation_B33: Tensor
    junk: Junk
    junk_of_B: Tensor

    @classmethod
    def of(cls, truth: Truth, mass: float, extent: float, seed: int) -> Scene:
        """mass: sum of an image of the model; extent: Å over which junk may spread."""
        is_junk_B = torch.from_numpy(truth.class_B == 0)
        number_B = torch.where(is_junk_B, is_junk_B.long().cumsum(0) - 1, -1)
        return cls(truth, truth.rotations(), Junk.draw(int(is_junk_B.sum()), mass, extent, seed), number_B)


@dataclass(frozen=True)
class ImageMaker:
    """Finished images of one optics group. scale: factor from the model's grey values to the images'; noise None: none."""

    scene: Scene
    source: SignalSource
    transfer: Transfer
    scale: float
    noise: NoiseModel | None
    white: WhiteNoise

    @classmethod
    def build(cls, scene: Scene, source: SignalSource, plane: HalfPlane, options: ImageOptions, seed: int) -> ImageMaker:
        """Choose the scale so that the mean signal variance of the first particles is the SNR (noise has variance 1)."""
        transfer, truth = Transfer.of(plane), scene.truth
        white = WhiteNoise(seed, plane.device)
        bare = cls(scene, source, transfer, 1.0, None, white)
        mine_B = truth.group_B == plane.group.number - 1
        members = torch.from_numpy(mine_B & (truth.class_B > 0)).nonzero().squeeze(1)
        if len(members) == 0:  # nothing but junk in this group: its scale is free
            members = torch.from_numpy(mine_B).nonzero().squeeze(1)
        signal_BYX, ctf_BYX = bare.signal(members[:PROBES])
        power = float(plane.variance_B(signal_BYX).double().mean())
        wanted = options.snr if options.noise else 1.0
        noise = NoiseModel.of(plane, options.ice, ctf_BYX) if options.noise else None
        return cls(scene, source, transfer, (wanted / power) ** 0.5, noise, white)

    def signal(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Transforms without noise and scale, and CTFs, of the particles `index_B` (CPU): [B, box, box/2 + 1] each."""
        plane, truth = self.transfer.plane, self.scene.truth
        class_B = torch.from_numpy(truth.class_B)[index_B]
        projected_BYX = self.source(self.scene.rotation_B33[index_B].to(plane.device), (class_B - 1).to(plane.device))
        junk = (class_B == 0).nonzero().squeeze(1)
        if len(junk):
            projected_BYX[junk.to(plane.device)] = self.scene.junk.transforms(self.scene.junk_of_B[index_B[junk]], plane)
        origin_B2 = torch.from_numpy(truth.origin_B2)[index_B].to(plane.device)
        ctf_BYX = self.transfer.ctf_BYX(truth.ctf[index_B].to(plane.device))
        return self.transfer.image(projected_BYX, origin_B2, ctf_BYX), ctf_BYX

    def __call__(self, index_B: Tensor) -> Tensor:
        """Finished images [B, box, box], float32, on the device."""
        box = self.transfer.plane.group.box
        fourier_BYX, ctf_BYX = self.signal(index_B)
        fourier_BYX *= self.scale
        if self.noise is not None:
            fourier_BYX += self.noise.transforms(self.white(index_B, box), ctf_BYX)
        return centred_irfft2(fourier_BYX, box)
