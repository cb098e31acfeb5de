"""The images of a refinement, read once and kept, and what does not change of each particle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.particles.loader import ImageLoader
from verglas.particles.table import ParticleTable

Progress = Callable[[str, int, int], None]
IMAGES_READ_AT_ONCE = 2**22  # pixels


@dataclass(frozen=True)
class Dataset:
    """images: one tensor [n, Y, X] per optics group; place_B: where each particle's image is in its group's tensor;
    group_B: number of its optics group; ctf: None where the images need none.
    """

    table: ParticleTable
    images: list[Tensor]
    place_B: Tensor
    group_B: Tensor
    ctf: CtfParameters | None
    groups: list[OpticsGroup]

    @classmethod
    def read(
        cls, table: ParticleTable, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
    ) -> Dataset:  # fmt: skip
        """Read all images of `table` into memory of `device`; dtype float16 halves what they take."""
        groups, group_B = table.groups, torch.from_numpy(table.group_index_B.copy())
        box = max(group.box for group in groups)
        loader = ImageLoader(table, batch_size=max(16, IMAGES_READ_AT_ONCE // box**2), device=device)
        place_B = torch.zeros(len(table), dtype=torch.int64)
        images = []
        for number in range(len(groups)):
            mine = (group_B == number).nonzero().squeeze(1)
            place_B[mine] = torch.arange(len(mine))
            size = loader.box_of_group.get(number, 0)
            images.append(torch.empty(len(mine), size, size, dtype=dtype, device=device))
        done = 0
        for batch in loader:
            images[batch.group_index][place_B[torch.from_numpy(batch.index_B)].to(device)] = batch.image_BYX.to(device, dtype)
            done += len(batch)
            if progress is not None:
                progress("reading images", done, len(table))
        return cls(table, images, place_B, group_B, contrast(table), groups)

    def __len__(self) -> int:
        return len(self.place_B)

    def images_of(self, row_B: Tensor, group: int) -> Tensor:
        """Images of rows of one optics group [B, Y, X]."""
        images = self.images[group]
        return images[self.place_B[row_B].to(images.device)]


def contrast(table: ParticleTable) -> CtfParameters | None:
    """CTF parameters of all particles, None if every optics group is corrected already."""
    return None if all(group.ctf_corrected for group in table.groups) else table.ctf()


def micrograph_groups(table: ParticleTable) -> tuple[Tensor, list[str]]:
    """Scale group of every particle (int64 [B]) and their names: rlnGroupName, else the micrograph, else one for all.

    Sorted by name as in RELION's files.
    """
    for label in ("rlnGroupName", "rlnMicrographName"):
        if label in table.frame.columns:
            codes, names = pd.factorize(table.frame[label].astype(str), sort=True)
            return torch.from_numpy(codes.astype(np.int64)), [str(name) for name in names]
    return torch.zeros(len(table), dtype=torch.int64), ["all"]
