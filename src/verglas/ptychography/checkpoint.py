"""Checkpoints of a reconstruction: what a pass left, as a result file with the engine's memory beside it. Goes on exactly.

A file is NAME_passNNNNN.checkpoint; it appears whole or not at all, and the one before it is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from verglas.errors import InputError
from verglas.ptychography.files_result import read_result, write_result
from verglas.ptychography.raw import open_hdf5
from verglas.ptychography.reconstruct import PassDone
from verglas.ptychography.scan import Scan

SUFFIX, KEPT = ".checkpoint", 2
MEMORY = "memory"
LOOKED_AT = 64  # patterns of which a fingerprint is taken


def save(folder: Path, name: str, done: PassDone, scan_fingerprint: str) -> None:
    """Write the checkpoint of a pass, then remove all of that name but the two newest. OutputError if the disk is full."""
    changes = {"object_change": done.object_change, "probe_change": done.probe_change}
    facts = {"number": done.number, "scan": scan_fingerprint, **changes}
    memory = {key: value.detach().cpu().numpy() for key, value in done.memory.items()}
    write_result(path_of(folder, name, done.number), done.found, facts, True, {MEMORY: memory})
    remove(folder, name, KEPT)


def path_of(folder: Path, name: str, number: int) -> Path:
    """The checkpoint of a pass."""
    return folder / f"{name}_pass{number:05d}{SUFFIX}"


def remove(folder: Path, name: str, keep: int = 0) -> None:
    """Remove the checkpoints of that name but the `keep` newest."""
    for old in numbered(folder, name)[keep:]:
        old.unlink(missing_ok=True)


def numbered(folder: Path, name: str) -> list[Path]:
    """Checkpoints of that name, newest first."""
    return sorted(folder.glob(f"{name}_pass*{SUFFIX}"), reverse=True)


def newest(folder: Path, name: str, scan_fingerprint: str, notice: Callable[[str], None]) -> PassDone | None:
    """The last pass of which there is a sound checkpoint; damaged ones are passed over, which `notice` is told. InputError if
    it belongs to other data."""
    for path in numbered(folder, name):
        try:
            done, mark = read(path)
        except InputError as error:
            notice(f"{error}; the checkpoint before it is used, if there is one")
            continue
        if mark != scan_fingerprint:
            found_text = "it belongs to other patterns or positions than the scan has now"
            raise InputError(path, found_text, "the scan that the run began with",
                             "Put the file back as it was, or start a new run.")  # fmt: skip
        return done
    return None


def read(path: Path) -> tuple[PassDone, str]:
    """A checkpoint: the pass, and the fingerprint of its scan. InputError if it is damaged."""
    found, facts = read_result(path)
    changes = facts["object_change"], facts["probe_change"]
    return PassDone(facts["number"], found.error_P[-1], *changes, 0.0, found, _memory(path)), facts["scan"]


def _memory(path: Path) -> dict[str, torch.Tensor]:
    with open_hdf5(path) as file:
        group = file.get(MEMORY)
        if not isinstance(group, h5py.Group):
            raise InputError(path, "it holds no memory of the engine", "a checkpoint")
        return {name: torch.from_numpy(np.asarray(group[name][()])) for name in group}


def fingerprint(scan: Scan) -> str:
    """Short text that tells scans apart: positions, size, and some of the patterns."""
    digest = hashlib.blake2b(digest_size=16)
    step = -(-len(scan) // LOOKED_AT)
    for piece in (np.array(scan.patterns_BYX.shape), scan.positions_B2.numpy(), scan.patterns_BYX[::step].numpy()):
        digest.update(np.ascontiguousarray(piece).tobytes())
    return digest.hexdigest()
