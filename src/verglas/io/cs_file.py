"""cryoSPARC's .cs files: NumPy structured arrays, read with suspicion, joined by uid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from verglas.errors import InputError
from verglas.io.atomic import atomic_path

LONGEST_HEADER = 2**18
Fields = dict[str, np.ndarray]


def load_cs(path: Path | str) -> Fields:
    """Fields of a .cs file by name, each [particles] or [particles, n].

    Raises InputError for what is no structured NumPy array, holds Python objects (never unpickled), is truncated, or
    has no uid.
    """
    try:
        with open(path, "rb") as file:
            array = _read_array(file, path)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "a cryoSPARC .cs file", "Check the path.") from error
    if "uid" not in (array.dtype.names or ()) or array["uid"].ndim != 1 or array["uid"].dtype.kind not in "iu":
        raise InputError(path, "has no field uid of whole numbers", "a cryoSPARC .cs file of particles", "Export it again.")
    if len(array) == 0:
        raise InputError(path, "holds no particles", "at least one row", "Export the particles again.")
    fields = {name: array[name] for name in array.dtype.names or ()}
    for name, values in fields.items():
        _check_kind(name, values, path)
    return fields


def _check_kind(name: str, values: np.ndarray, path: Path | str) -> None:
    if values.dtype.kind not in "iufbSU":
        raise InputError(path, f"field {name[:40]!r} is of type {str(values.dtype)[:40]}", "numbers or text", "Export it again.")
    if values.dtype.kind == "U" and values.dtype.itemsize:
        # NumPy keeps text as 4-byte code points and does not check them; Python breaks on what is no character.
        codes = np.ascontiguousarray(values).view(values.dtype.str[0] + "u4")
        if codes.size and (codes.max() > 0x10FFFF or bool(((codes >= 0xD800) & (codes < 0xE000)).any())):
            raise InputError(path, f"field {name[:40]!r} holds no valid text", "Unicode text", "Export the particles again.")


def _read_array(file: BinaryIO, path: Path | str) -> np.ndarray:
    shape, dtype = _read_npy_header(file, path)
    start = file.tell()
    held = file.seek(0, 2) - start
    needed = math.prod(shape) * dtype.itemsize
    if held < needed:
        raise InputError(path, f"truncated: {held} bytes of data", f"{needed} bytes ({math.prod(shape)} rows)", "Copy it again.")
    file.seek(start)
    return np.fromfile(file, dtype, shape[0])


def _read_npy_header(file: BinaryIO, path: Path | str) -> tuple[tuple[int, ...], np.dtype]:
    wrong = "a cryoSPARC .cs file (a NumPy structured array)"
    try:
        version = npy.read_magic(file)
        length_bytes = 2 if version == (1, 0) else 4
        length = int.from_bytes(file.read(length_bytes), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"header of {length} bytes")
        file.seek(-length_bytes, 1)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _fortran, dtype = reader(file, max_header_size=LONGEST_HEADER)  # type: ignore[call-arg]  # stubs lag behind
    except OSError:
        raise
    except Exception as error:  # the header is a Python literal: a damaged one fails in a dozen ways
        raise InputError(path, f"not a NumPy file ({str(error)[:80]})", wrong, "Check that this is the right file.") from error
    if dtype.hasobject:
        raise InputError(path, "holds Python objects", wrong, "verglas does not unpickle; export the particles again.")
    if dtype.names is None or len(shape) != 1 or shape[0] < 0 or dtype.itemsize == 0:
        raise InputError(path, f"an array of {str(dtype)[:60]} and shape {shape}", wrong, "Check that this is the right file.")
    return shape, dtype


def join_passthrough(fields: Fields, path: Path | str, others: Sequence[Path | str]) -> Fields:
    """`fields` of `path` with the fields that only the passthrough files hold, joined by uid; InputError if a uid is missing."""
    joined = dict(fields)
    for other in others:
        extra = load_cs(other)
        order = np.argsort(extra["uid"], kind="stable")
        known = extra["uid"][order]
        place = np.searchsorted(known, fields["uid"])
        found = place < len(known)
        found[found] = known[place[found]] == fields["uid"][found]
        if not found.all():
            raise InputError(other, f"{int((~found).sum())} of {len(found)} particles of {path} are not in it",
                             "the passthrough file of the same job", "Give the passthrough file that belongs to it.")
        row = order[place]
        joined.update({name: values[row] for name, values in extra.items() if name not in joined})
    return joined


def save_cs(path: Path | str, fields: Mapping[str, np.ndarray], overwrite: bool = False) -> None:
    """Write fields as one structured array; uid comes first as cryoSPARC has it."""
    names = ["uid", *(name for name in fields if name != "uid")]
    array = np.empty(len(fields["uid"]), [(name, fields[name].dtype, fields[name].shape[1:]) for name in names])
    for name in names:
        array[name] = fields[name]
    with atomic_path(Path(path), overwrite) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
