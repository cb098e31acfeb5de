"""The images of a refinement, in memory or streamed, and what does not change of each particle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.distributed.handout import owners
from verglas.distributed.ranks import ALONE, Ranks, each_its_part
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.particles.files import ImageFiles
from verglas.particles.loader import ImageBatch
from verglas.particles.resident import read_all
from verglas.particles.streaming import ImageStream
from verglas.particles.table import ParticleTable
from verglas.refinement.residency import Residency, images_at_once

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Dataset:
    """images: one tensor [n, Y, X] per optics group, in the order of the files (none if they are read anew each time); place_B:
    where each particle's image is in its group's tensor; group_B: number of its optics group; ctf: None where the images need
    none. scales: (deviation, mean) [n, 2] of groups whose images were rescaled; stream: hands out the images that do not stay
    on the device; budget: bytes of two batches, image_bytes: of a pixel in them. owner_B: the rank that keeps each image (its
    place_B is -1 elsewhere: such images are read when they are asked for), None: this process keeps all; on_device: where they
    stay.
    """

    table: ParticleTable
    images: list[Tensor]
    place_B: Tensor
    group_B: Tensor
    ctf: CtfParameters | None
    groups: list[OpticsGroup]
    scales: dict[int, Tensor] = field(default_factory=dict)
    stream: ImageStream | None = None
    budget: float = math.inf
    image_bytes: int = 4
    owner_B: Tensor | None = None
    on_device: bool = True

    @classmethod
    def read(
        cls, table: ParticleTable, device: torch.device | str = "cpu", residency: Residency | None = None,
        progress: Progress | None = None, ranks: Ranks = ALONE, set_B: Tensor | None = None,
    ) -> Dataset:  # fmt: skip
        """Read all images of `table`, or only open them, as `residency` says (None: into memory of `device`, in their own type).

        Of several ranks each reads its share, and the share of every set of rows (set_B, half-sets) is alike. Raises InputError
        for stacks or images that cannot be used; images that are streamed from files are checked as they come.
        """
        residency, device = residency or Residency(), torch.device(device)
        files, group_B = ImageFiles(table), torch.from_numpy(table.group_index_B.copy())
        image_bytes = max(dtype.itemsize for dtype in files.dtype_of_group.values())
        owner_B = None
        if ranks.size > 1:
            order_B = torch.from_numpy(files.in_file_order(np.arange(len(table))))
            owner_B = owners(order_B, group_B if set_B is None else set_B * len(table.groups) + group_B, ranks.size)
        data = cls(table, [], torch.full((len(table),), -1), group_B, contrast(table), table.groups, budget=residency.budget,
                   image_bytes=image_bytes, owner_B=owner_B, on_device=residency.home == "device")  # fmt: skip
        if residency.home != "disk":
            mine_B = np.ones(len(table), bool) if owner_B is None else (owner_B == ranks.rank).numpy()
            with each_its_part(ranks):
                data._fill(files, mine_B, device, residency, progress)
        if not residency.streams and owner_B is None:
            files.close()
            return data
        source = partial(data._copy, files) if residency.home == "host" else None
        return replace(data, stream=ImageStream(files, device, source))

    def __len__(self) -> int:
        return len(self.place_B)

    def images_of(self, row_B: Tensor, group: int) -> Tensor:
        """Images of rows of one optics group [B, Y, X], in their own type or float32; good until the next call."""
        if self.stream is not None and not self._stay(row_B):
            return self.stream.take(row_B)
        images = self.images[group]
        place_B = self.place_B[row_B].to(images.device)
        image_BYX = images[place_B]
        if group in self.scales:
            scale_B2 = self.scales[group][place_B]
            image_BYX = image_BYX.float().mul_(scale_B2[:, 0, None, None]).add_(scale_B2[:, 1, None, None])
        return image_BYX

    def largest_batch(self, group: int) -> int:
        """Particles of an optics group at once, at most."""
        return images_at_once(self.budget, self.groups[group].box ** 2 * self.image_bytes)

    def announce(self, row_B: Tensor, size: int) -> None:
        """Say which rows of one optics group will be asked for next, in order, `size` at a time: they are read ahead."""
        if self.stream is not None and not self._stay(row_B):
            self.stream.announce(row_B, size)

    def batches(self, row_B: np.ndarray, size: int = 64) -> Iterator[ImageBatch]:
        """The images of any rows, group by group, float32 on the device."""
        group_B = self.group_B[row_B].numpy()
        for group in np.unique(group_B).tolist():
            mine = torch.from_numpy(row_B[group_B == group])
            at_once = min(size, self.largest_batch(group))
            self.announce(mine, at_once)
            for part in mine.split(at_once):
                yield ImageBatch(part.numpy(), self.images_of(part, group).float(), self.groups[group], group)

    def _stay(self, row_B: Tensor) -> bool:
        """Whether all these images stay on the device."""
        return self.on_device and bool((self.place_B[row_B] >= 0).all())

    def _fill(
        self, files: ImageFiles, mine_B: np.ndarray, device: torch.device, residency: Residency, progress: Progress | None
    ) -> None:
        """Read the images of this process, group by group; says where each is."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress("reading images", done * len(self) // max(1, int(mine_B.sum())), len(self))

        home = device if residency.home == "device" else torch.device("cpu")
        rescale = residency.home == "device" and residency.image_bytes == 2
        for group in range(len(self.groups)):
            row_n = files.in_file_order(np.flatnonzero(mine_B & (files.table.group_index_B == group)))
            self.place_B[torch.from_numpy(row_n)] = torch.arange(len(row_n))
            image_nYX, scale_n2 = read_all(files, row_n, home, rescale, advance) if len(row_n) else (torch.empty(0), None)
            self.images.append(image_nYX)
            if scale_n2 is not None:
                self.scales[group] = scale_n2

    def _copy(self, files: ImageFiles, row_B: np.ndarray, out_BYX: np.ndarray) -> None:
        """Fill an array with images of one optics group that are in memory of the host; of other ranks', from the files."""
        if (self.place_B[row_B] < 0).any():
            files.read(row_B, out_BYX)
            return
        images = self.images[int(self.group_B[row_B[0]])]
        torch.index_select(images, 0, self.place_B[row_B], out=torch.from_numpy(out_BYX))


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
