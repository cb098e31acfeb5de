"""The images of a refinement, in memory or streamed, and what does not change of each particle."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.core.memory import uploaded
from verglas.distributed.ranks import ALONE, Ranks, each_its_part
from verglas.distributed.shares import Shares
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.particles.files import ImageFiles, opened
from verglas.particles.loader import ImageBatch
from verglas.particles.resident import read_all
from verglas.particles.streaming import ImageStream
from verglas.particles.table import ParticleTable
from verglas.refinement.on_scratch import move_to_scratch
from verglas.refinement.residency import Residency, images_at_once
from verglas.refinement.taken_over import TakenOver, unscaled

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Dataset:
    """images: one tensor [n, Y, X] per optics group, in the order of the files (none if they are read anew each time); place_B:
    where each particle's image is in its group's tensor; group_B: number of its optics group; ctf: None where the images need
    none. scales: (deviation, mean) [n, 2] of groups whose images were rescaled; stream: hands out the images that do not stay
    on the device; budget: bytes of two batches, image_bytes: of a pixel in them. shares: which rank begins with which particles,
    and at first keeps their images (place_B is -1 elsewhere: such images are read when they are asked for), None: this process
    has all; taken_over: images that came to this rank later; on_device: where images stay.
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
    shares: Shares | None = None
    taken_over: TakenOver | None = None
    on_device: bool = True

    @classmethod
    def read(
        cls, table: ParticleTable, device: torch.device | str = "cpu", residency: Residency | None = None,
        progress: Progress | None = None, ranks: Ranks = ALONE, set_B: Tensor | None = None,
        apart: bool = False,
    ) -> Dataset:  # fmt: skip
        """Read all images of `table`, or only open them, as `residency` says (None: into memory of `device`, in their own type).

        Of several ranks each reads its share, and the share of every set of rows (set_B, half-sets) is alike, or, apart, of as
        few sets as possible; the lead alone reads headers. Raises InputError for stacks or images that cannot be used; images
        that are streamed from files are checked as they come.
        """
        residency, device = residency or Residency(), torch.device(device)
        files, group_B = _opened(table, ranks), torch.from_numpy(table.group_index_B.copy())
        image_bytes = max(dtype.itemsize for dtype in files.dtype_of_group.values())
        shares = None
        if ranks.size > 1:
            order_B = torch.from_numpy(files.in_file_order(np.arange(len(table))))
            shares = Shares(order_B, group_B if set_B is None else set_B * len(table.groups) + group_B, ranks,
                            set_B if apart else None)  # fmt: skip
        mine_B = np.ones(len(table), bool) if shares is None else (shares.owner_B == ranks.rank).numpy()
        passes = (residency.scratch is not None) + (residency.home != "disk")
        advance = _counted(progress, passes * int(mine_B.sum()), len(table))
        if residency.scratch is not None:
            move_to_scratch(files, residency.scratch, shares, ranks, advance)
        ctf = contrast(table)
        ctf = None if ctf is None else ctf.to(device)
        data = cls(table, [], torch.full((len(table),), -1), group_B, ctf, table.groups, budget=residency.budget,
                   image_bytes=image_bytes, shares=shares, on_device=residency.home == "device")  # fmt: skip
        if residency.home != "disk":
            begin = time.perf_counter()
            with each_its_part(ranks):
                data._fill(files, mine_B, device, residency, advance)
            if shares is not None:
                shares.reading = max(ranks.everyones((time.perf_counter() - begin) / max(1, int(mine_B.sum()))))
        if not residency.streams and shares is None:
            files.close()
            return data
        source = partial(data._copy, files) if residency.home == "host" else None
        stream, home = ImageStream(files, device, source), residency.place(device)
        later = None if shares is None or home is None else TakenOver(files, home, residency.rounded, residency.room)
        return replace(data, stream=stream, taken_over=later)

    def __len__(self) -> int:
        return len(self.place_B)

    def images_of(self, row_B: Tensor, group: int) -> Tensor:
        """Images of rows of one optics group [B, Y, X], in their own type or float32; good until the next call."""
        begin = time.perf_counter()
        if self.stream is not None and not bool(self._stay(row_B).all()):
            image_BYX = self.stream.take(row_B)
            if self.shares is not None and self.on_device:
                self.shares.waited += time.perf_counter() - begin
            return image_BYX
        later_B = self.place_B[row_B] < 0
        if not bool(later_B.any()):
            return self._kept(row_B, group)
        assert self.taken_over is not None and self.shares is not None
        self.taken_over.wait_for(row_B[later_B])
        self.shares.waited += time.perf_counter() - begin
        later_BYX = self.taken_over.images_of(row_B[later_B], group)
        image_BYX = later_BYX.new_empty(len(row_B), *later_BYX.shape[1:])
        image_BYX[later_B.to(later_BYX.device)] = later_BYX
        image_BYX[~later_B.to(later_BYX.device)] = self._kept(row_B[~later_B], group)
        return image_BYX

    def _kept(self, row_B: Tensor, group: int) -> Tensor:
        """Images that were read at the start."""
        images = self.images[group]
        place_B = uploaded(self.place_B[row_B], images.device)
        return unscaled(images[place_B], self.scales[group][place_B] if group in self.scales else None)

    def follow_speed(self, samples_B: Tensor) -> list[str]:
        """Between iterations, by all ranks: particles move from slow ranks to quick ones, if that pays; the images of those that
        come to this one are read from now on, behind its back. samples_B: significant samples of each particle. Returns notices.
        """
        if self.shares is None:
            return []
        mine = self.shares.follow(samples_B)
        if self.taken_over is not None:
            self.taken_over.begin(mine[self.place_B[mine] < 0])
        return list(self.shares.said)

    def largest_batch(self, group: int) -> int:
        """Particles of an optics group at once, at most."""
        return images_at_once(self.budget, self.groups[group].box ** 2 * self.image_bytes)

    def announce(self, row_B: Tensor, size: int) -> None:
        """Say which rows of one optics group will be asked for next, in order, `size` at a time: they are read ahead."""
        if self.stream is not None:
            parts = zip(row_B.split(size), self._stay(row_B).split(size), strict=True)
            missing = [part for part, here_B in parts if not bool(here_B.all())]
            self.stream.announce(torch.cat(missing) if missing else row_B[:0], size)

    def announce_next(self, row_B: Tensor) -> None:
        """Say which rows of one optics group, another rank's, come after the batch asked for next: they are read, and kept
        on the device as far as there is room."""
        if self.taken_over is not None and self.on_device:
            self.taken_over.begin(row_B[self.place_B[row_B] < 0], own=False)
        if self.stream is not None and not bool(self._stay(row_B).all()):
            self.stream.announce_next(row_B)

    def batches(self, row_B: np.ndarray, size: int = 64) -> Iterator[ImageBatch]:
        """The images of any rows, group by group, float32 on the device."""
        group_B = self.group_B[row_B].numpy()
        for group in np.unique(group_B).tolist():
            mine = torch.from_numpy(row_B[group_B == group])
            at_once = min(size, self.largest_batch(group))
            self.announce(mine, at_once)
            for part in mine.split(at_once):
                yield ImageBatch(part.numpy(), self.images_of(part, group).float(), self.groups[group], group)

    def _stay(self, row_B: Tensor) -> Tensor:
        """Which of these images stay on the device."""
        if not self.on_device:
            return torch.zeros(len(row_B), dtype=torch.bool)
        here_B = self.place_B[row_B] >= 0
        return here_B if self.taken_over is None else here_B | self.taken_over.has(row_B)

    def _fill(
        self, files: ImageFiles, mine_B: np.ndarray, device: torch.device, residency: Residency, advance: Callable[[int], None]
    ) -> None:
        """Read the images of this process, group by group; says where each is."""
        home = residency.place(device)
        assert home is not None
        for group in range(len(self.groups)):
            row_n = files.in_file_order(np.flatnonzero(mine_B & (files.table.group_index_B == group)))
            self.place_B[torch.from_numpy(row_n)] = torch.arange(len(row_n))
            image_nYX, scale_n2 = torch.empty(0), None
            if len(row_n):
                image_nYX, scale_n2 = read_all(files, row_n, home, residency.rounded, advance)
            self.images.append(image_nYX)
            if scale_n2 is not None:
                self.scales[group] = scale_n2

    def _copy(self, files: ImageFiles, row_B: np.ndarray, out_BYX: np.ndarray) -> None:
        """Fill an array with images of one optics group that are in memory of the host; of other ranks', from the files."""
        row_n, out_nYX = torch.from_numpy(row_B), torch.from_numpy(out_BYX)
        if bool((self.place_B[row_n] >= 0).all()):
            torch.index_select(self.images[int(self.group_B[row_n[0]])], 0, self.place_B[row_n], out=out_nYX)
        elif self.taken_over is not None and bool(self.taken_over.has(row_n).all()):
            out_nYX.copy_(self.taken_over.images_of(row_n, int(self.group_B[row_n[0]])))
        else:
            files.read(row_B, out_BYX)


def _opened(table: ParticleTable, ranks: Ranks) -> ImageFiles:
    """The files of a table, whose headers the lead alone reads."""
    with each_its_part(ranks):
        stacks = opened(table) if ranks.is_lead else None
    return ImageFiles(table, ranks.agreed(stacks, "headers"))


def _counted(progress: Progress | None, count: int, total: int) -> Callable[[int], None]:
    """Counts up to `count` images of this process, and tells `progress` so as if all ranks had got as far, of `total`."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress("reading images", done * total // max(1, count), total)

    return advance


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
