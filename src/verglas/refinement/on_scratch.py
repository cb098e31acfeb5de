"""Images copied once to a disk of the computer that works on them (--scratch), and read from there from then on."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from verglas.distributed.ranks import Ranks, each_its_part
from verglas.distributed.scratch import Scratch, check_space
from verglas.distributed.shares import Shares
from verglas.particles.copies import copies_of, copy, size_of
from verglas.particles.files import ImageFiles


def move_to_scratch(
    files: ImageFiles, parent: Path, shares: Shares | None, ranks: Ranks, advance: Callable[[int], None] | None = None
) -> None:
    """Copy this rank's images into a folder of its own in `parent`, which is gone with `files`. From then on they, and those of
    the other ranks of this host, are read from there. InputError if they do not fit, or `parent` cannot be written to."""
    with each_its_part(ranks):
        scratch = Scratch(parent)
        weakref.finalize(files, scratch.remove)
    copies = copies_of(files, rows_of(shares, ranks.rank, files), scratch.path)
    with each_its_part(ranks):
        check_space(parent, size_of(files, copies), ranks)
    with each_its_part(ranks):
        copy(files, copies, advance)
    host = socket.gethostname()
    for rank, (name, folder) in enumerate(ranks.everyones((host, scratch.path), "scratch")):
        if name == host:
            for one in copies_of(files, rows_of(shares, rank, files), folder):
                files.read_from(one.path, one.row_n)


def rows_of(shares: Shares | None, rank: int, files: ImageFiles) -> np.ndarray:
    """The rows that a rank begins the run with; None: one rank has all."""
    return np.arange(len(files.table)) if shares is None else np.flatnonzero((shares.home_B == rank).numpy())
