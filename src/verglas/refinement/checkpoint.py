"""Checkpoints: the whole state of a refinement in one file, exact to the bit, from which the run goes on.

Layout: a line "verglas checkpoint N", the length of the text as 8 bytes (little-endian), the text (JSON: state, options,
fingerprint, and a list of arrays), the arrays one after another (little-endian, C order), and last the BLAKE2b digest of
all that. Equal states give equal bytes. A file appears under its name only when it is whole and on the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from verglas.core.memory import in_host_memory
from verglas.errors import InputError
from verglas.io.atomic import atomic_path
from verglas.io.progress import say
from verglas.particles.table import ParticleTable
from verglas.refinement.config import AbInitioConfig, Classify2dConfig, ClassifyConfig, RefineConfig
from verglas.refinement.state import HalfModel, Poses, Schedule, State

VERSION = 3
KEPT = 2
_MAGIC = b"verglas checkpoint "
_DIGEST_BYTES = 32
_LONGEST_LINE = 64
_SUFFIX = ".checkpoint"
_CONFIGS = (RefineConfig, ClassifyConfig, Classify2dConfig, AbInitioConfig)
_CLASSES = {kind.__name__: kind for kind in (State, HalfModel, Poses, Schedule, *_CONFIGS)}
_FIX = "Go on from the checkpoint before it (remove this file), or start the run again with --overwrite."


def path_of(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration belongs; `newest` and `prune` know these names only."""
    return folder / f"run_it{iteration:03d}{_SUFFIX}"


def save(
    path: Path, state: State, config: RefineConfig, table_fingerprint: str, after: Callable[[], object] = lambda: None
) -> None:
    """Write a checkpoint, replacing one of that name; returns when it is on the disk. after: is called, and waited for, before
    the file gets its name: for what is to be on the disk before it.

    Raises OutputError if it cannot be written: then nothing has changed. A kill in the middle leaves the older files
    alone, and at most a hidden temporary one (`remove_leftovers` of verglas.refinement.files).
    """
    arrays: list[np.ndarray] = []
    content = {"state": _plain(state, arrays), "config": _plain(config, arrays), "fingerprint": table_fingerprint}
    content["arrays"] = [{"dtype": array.dtype.str, "shape": list(array.shape)} for array in arrays]
    text = json.dumps(content, sort_keys=True).encode()
    head = _MAGIC + b"%d\n" % VERSION + len(text).to_bytes(8, "little") + text
    with atomic_path(path, overwrite=True) as part, open(part, "wb") as file:
        pieces: list[bytes | memoryview] = [head, *(array.reshape(-1).view(np.uint8).data for array in arrays)]
        with ThreadPoolExecutor(1) as pool:  # takes as long as writing
            digest = pool.submit(_digest, pieces)
            for data in pieces:
                file.write(data)
        file.write(digest.result())
        file.flush()
        os.fsync(file.fileno())
        after()
    _sync_folder(path.parent)


def _digest(pieces: list[bytes | memoryview]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for data in pieces:
        digest.update(data)
    return digest.digest()


def load(path: Path) -> tuple[State, RefineConfig, str]:
    """State (tensors on the CPU), options, and the fingerprint of the particles.

    Raises InputError if the file is missing, no checkpoint, of another version of verglas, cut short or damaged.
    """
    content, body = _read(path)
    arrays = list(_arrays(content["arrays"], body))
    try:
        state, config = _object(content["state"], arrays), _object(content["config"], arrays)
    except (KeyError, TypeError) as error:
        raise InputError(path, f"its content does not fit ({error})", "a checkpoint of this version of verglas",
                         "Go on with the version that wrote it, or start the run again.") from error  # fmt: skip
    return state, config, content["fingerprint"]


def newest(folder: Path, notice: Callable[[str], None] = say) -> Path | None:
    """The newest sound checkpoint of a run, or None; damaged ones are passed over, which `notice` is told.

    Raises InputError for checkpoints of another version of verglas: they are sound, but not for this one.
    """
    for path in _all(folder):
        try:
            _read(path)
            return path
        except _Damaged as error:
            notice(f"{error.where}: {error.found}; the checkpoint before it is used, if there is one.")
    return None


def prune(folder: Path, keep: int = KEPT) -> None:
    """Remove all checkpoints of a run but the `keep` newest. Call it after `save`."""
    for path in _all(folder)[keep:]:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)  # every iteration asks for the same
def fingerprint(table: ParticleTable) -> str:
    """Short text that tells sets of particles apart: image numbers and stack names, CTF, optics; their order counts.

    Folders of the stacks do not count, so that a project may be moved.
    """
    digest = hashlib.blake2b(digest_size=16)
    where = table.image_locations()
    names = [path.name for path in where.paths]
    _feed(digest, [names[index] for index in where.stack_index_B.tolist()], where.image_index_B, table.group_index_B)
    for label in ("DefocusU", "DefocusV", "DefocusAngle", "PhaseShift", "CtfBfactor", "CtfScalefactor"):
        if f"rln{label}" in table.frame.columns:
            _feed(digest, [label], table.frame[f"rln{label}"].to_numpy(np.float64))
    for group in table.groups:
        facts = dataclasses.asdict(group) | {"mtf_file": Path(group.mtf_file).name if group.mtf_file else ""}
        _feed(digest, [f"{name}={value!r}" for name, value in sorted(facts.items())])
    return digest.hexdigest()


class _Damaged(InputError):
    """A checkpoint that is cut short or whose bytes have changed."""


def _all(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    numbered = {path: path.name.removeprefix("run_it").removesuffix(_SUFFIX) for path in folder.glob(f"run_it*{_SUFFIX}")}
    return sorted((path for path, number in numbered.items() if number.isdigit()), key=lambda p: int(numbered[p]), reverse=True)


def _feed(digest: Any, texts: list[str], *arrays: np.ndarray) -> None:
    """Add texts and arrays to a digest, so that no two lists give the same bytes."""
    data = json.dumps(texts).encode()
    for piece in (data, *(np.ascontiguousarray(array).tobytes() for array in arrays)):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)


def _plain(value: Any, arrays: list[np.ndarray]) -> Any:
    """`value` as JSON can hold it; tensors are appended to `arrays` and named by their position."""
    if isinstance(value, Tensor):
        array = in_host_memory(value).contiguous().numpy()
        arrays.append(array.astype(array.dtype.newbyteorder("<"), copy=False))
        return {"array": len(arrays) - 1}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {"class": type(value).__name__, "fields": {name: _plain(getattr(value, name), arrays) for name in names}}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, list):
        return [_plain(item, arrays) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _object(value: Any, arrays: list[Tensor]) -> Any:
    """The reverse of `_plain`. KeyError or TypeError if classes or fields are not those of this version."""
    if isinstance(value, list):
        return [_object(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "path" in value:
        return Path(value["path"])
    return _CLASSES[value["class"]](**{name: _object(field, arrays) for name, field in value["fields"].items()})


def _read(path: Path) -> tuple[dict[str, Any], memoryview]:
    """(the JSON text, bytes of the arrays) of a sound checkpoint; InputError for any other file."""
    try:
        with open(path, "rb") as file:
            _check_version(file, path)
            return _checked_content(file, path)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "a checkpoint of verglas", "Check the path.") from error


def _check_version(file: BinaryIO, path: Path) -> None:
    """Read the first line. InputError if it is no checkpoint, or one of another version."""
    line = file.readline(_LONGEST_LINE)
    if not line or (len(line) < len(_MAGIC) and _MAGIC.startswith(line)):
        raise _Damaged(path, "is cut short", "a whole checkpoint", _FIX)
    if not line.startswith(_MAGIC):
        raise _Damaged(path, "is no checkpoint", "a file written by `verglas refine`", _FIX)
    version = line.removeprefix(_MAGIC).strip().decode("ascii", "replace")
    if not line.endswith(b"\n"):
        raise _Damaged(path, "is cut short", "a whole checkpoint", _FIX)
    if version != str(VERSION):
        raise InputError(path, f"checkpoint of version {version}", f"version {VERSION}",
                         "Go on with the verglas that wrote it, or start the run again.")  # fmt: skip


def _checked_content(file: BinaryIO, path: Path) -> tuple[dict[str, Any], memoryview]:
    """(the JSON text, bytes of the arrays) of a checkpoint whose first line is read. _Damaged if the digest is not right."""
    rest = memoryview(bytearray(file.read()))
    if len(rest) < 8 + _DIGEST_BYTES:
        raise _Damaged(path, "is cut short", "a whole checkpoint", _FIX)
    digest = hashlib.blake2b(_MAGIC + b"%d\n" % VERSION, digest_size=_DIGEST_BYTES)
    digest.update(rest[:-_DIGEST_BYTES])
    if digest.digest() != rest[-_DIGEST_BYTES:]:
        raise _Damaged(path, "is cut short or damaged (its digest is wrong)", "a whole checkpoint", _FIX)
    end_of_text = 8 + int.from_bytes(rest[:8], "little")
    return json.loads(bytes(rest[8:end_of_text])), rest[end_of_text:-_DIGEST_BYTES]


def _arrays(described: list[dict[str, Any]], body: memoryview) -> Iterator[Tensor]:
    """The arrays of a checkpoint as tensors that own their memory."""
    start = 0
    for one in described:
        dtype, shape = np.dtype(one["dtype"]), tuple(one["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, dtype, count, start).astype(dtype.newbyteorder("="), copy=True)
        yield torch.from_numpy(array.reshape(shape))
        start += count * dtype.itemsize


def _sync_folder(folder: Path) -> None:
    """Make the new name in `folder` survive a power cut, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
