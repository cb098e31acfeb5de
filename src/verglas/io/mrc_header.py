"""The 1024-byte header of an MRC file: parsed with suspicion, written by the book.

Follows MRC2014 (Cheng et al. 2015, J. Struct. Biol. 192, 146). Nothing is allocated from a number in a header before
it has been checked against the size of the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from verglas.errors import InputError

Triple = tuple[float, float, float]
Axes = tuple[int, int, int]

HEADER_BYTES = 1024
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
MODE_OF_DTYPE = {"float32": 2, "float16": 12}
OTHER_MODES = {3: "complex 16-bit integers", 4: "complex 32-bit floats", 16: "RGB", 101: "4-bit integers"}
LARGEST_EDGE = 2**31 - 1

_FIELDS = [
    ("nx", "i4"), ("ny", "i4"), ("nz", "i4"), ("mode", "i4"), ("nstart", "i4", 3), ("m", "i4", 3), ("cell", "f4", 3),
    ("angles", "f4", 3), ("axes", "i4", 3), ("dmin", "f4"), ("dmax", "f4"), ("dmean", "f4"), ("ispg", "i4"),
    ("nsymbt", "i4"), ("extra1", "V8"), ("exttyp", "S4"), ("nversion", "i4"), ("extra2", "V84"), ("origin", "f4", 3),
    ("map", "S4"), ("stamp", "u1", 4), ("rms", "f4"), ("nlabl", "i4"), ("labels", "S80", 10),
]  # fmt: skip
HEADER_DTYPE = np.dtype(_FIELDS)
assert HEADER_DTYPE.itemsize == HEADER_BYTES


@dataclass(frozen=True)
class MrcHeader:
    """What a header says, in verglas' terms.

    shape: (nz, ny, nx) as stored; dtype: with byte order; offset: first byte of the data; voxel_xyz: Å, 0 where the
    file does not say; origin_xyz: Å; axes: which axis (1 x, 2 y, 3 z) columns, rows and sections run along.
    """

    shape: tuple[int, int, int]
    mode: int
    dtype: np.dtype
    offset: int
    voxel_xyz: Triple
    origin_xyz: Triple
    axes: Axes
    space_group: int
    labels: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def big_endian(self) -> bool:
        return self.dtype.byteorder == ">"


def parse_header(raw: bytes | bytearray, path: Path | str) -> MrcHeader:
    """Header of `path` from its first 1024 bytes; InputError says why it is none."""
    if len(raw) < HEADER_BYTES:
        raise InputError(path, f"only {len(raw)} bytes long", "an MRC file (header of 1024 bytes)", _text_hint(raw))
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        record = np.frombuffer(raw[:HEADER_BYTES], dtype=HEADER_DTYPE.newbyteorder(order))[0]
        if _plausible(record):
            return _interpret(record, order, path)
    little = np.frombuffer(raw[:HEADER_BYTES], dtype=HEADER_DTYPE.newbyteorder("<"))[0]
    sizes = ", ".join(str(int(little[name])) for name in ("nx", "ny", "nz", "mode"))
    raise InputError(path, f"not an MRC file: its first four numbers (nx, ny, nz, mode) would be {sizes}",
                     "positive sizes and mode 0, 1, 2, 6 or 12", _text_hint(raw))


def _plausible(record: np.void) -> bool:
    """RELION's and everyone's test of the byte order: machine stamps are often wrong, small positive numbers are not."""
    sizes = [int(record[name]) for name in ("nx", "ny", "nz")]
    known = int(record["mode"]) in MODES or int(record["mode"]) in OTHER_MODES
    # Swapped, every size below 65,536 has zero low bytes, so a small nx decides where both orders are positive.
    return known and all(0 < size <= LARGEST_EDGE for size in sizes) and sizes[0] < 2**24


def _interpret(record: np.void, order: Literal["<", ">"], path: Path | str) -> MrcHeader:
    mode = int(record["mode"])
    if mode not in MODES:
        raise InputError(path, f"MRC mode {mode} ({OTHER_MODES[mode]})", "mode 0, 1, 2, 6 or 12",
                         "Convert it with the program that wrote it.")
    extended = int(record["nsymbt"])
    if extended < 0:
        raise InputError(path, f"extended header of {extended} bytes", "0 or more", "The header is damaged.")
    voxel = cast(Triple, tuple(_voxel(float(c), int(m)) for c, m in zip(record["cell"], record["m"])))
    axes = cast(Axes, tuple(int(a) for a in record["axes"]))
    axes = axes if sorted(axes) == [1, 2, 3] else (1, 2, 3)
    shape = (int(record["nz"]), int(record["ny"]), int(record["nx"]))
    dtype = np.dtype(MODES[mode]).newbyteorder(order)
    return MrcHeader(shape, mode, dtype, HEADER_BYTES + extended, voxel, _origin(record, voxel, axes), axes,
                     int(record["ispg"]), _labels(record))


def _voxel(cell: float, intervals: int) -> float:
    """Å per voxel, 0 if unknown. A 4-byte float holds 7 digits: its shortest decimal (3.54, not 3.53999996) is meant."""
    size = cell / intervals if intervals > 0 else 0.0
    return float(str(np.float32(size))) if math.isfinite(size) and size > 0 else 0.0


def _origin(record: np.void, voxel: Triple, axes: Axes) -> Triple:
    """The origin field in Å; older files give whole voxels in nstart (along columns, rows, sections) instead."""
    origin = [float(v) for v in record["origin"]]
    if not all(map(math.isfinite, origin)):
        origin = [0.0, 0.0, 0.0]
    if not any(origin):
        for start, axis in zip(record["nstart"], axes):
            origin[axis - 1] = int(start) * voxel[axis - 1]
    return origin[0], origin[1], origin[2]


def _labels(record: np.void) -> tuple[str, ...]:
    count = min(max(int(record["nlabl"]), 0), 10)
    texts = [bytes(label).split(b"\0")[0].decode("ascii", "replace").strip() for label in record["labels"][:count]]
    return tuple(text for text in texts if text)


def _text_hint(raw: bytes | bytearray) -> str:
    if raw and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in raw[:512]):
        return "It looks like a text file; check the name."
    return "Check that the file is what its name says and was copied whole."


def read_header(path: Path | str) -> MrcHeader:
    """Header of an uncompressed MRC file, checked against the length of the file."""
    try:
        with open(path, "rb") as file:
            header = parse_header(file.read(HEADER_BYTES), path)
            length = file.seek(0, 2)
    except IsADirectoryError:
        raise InputError(path, "is a folder", "an MRC file") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "an MRC file", "Check the path.") from error
    check_length(header, length, path)
    return header


def check_length(header: MrcHeader, length: int, path: Path | str) -> None:
    """InputError if a file of `length` bytes cannot hold what its header promises."""
    needed = header.offset + header.data_bytes
    if length < needed:
        nz, ny, nx = header.shape
        whole = max(0, length - header.offset) // (ny * nx * header.dtype.itemsize)
        raise InputError(path, f"truncated: {length} bytes hold {whole} sections of {nx} x {ny}",
                         f"{needed} bytes ({nz} sections)", "Copy or write the file again.")


def make_header(shape_ZYX: tuple[int, int, int], mode: int, pixel_size: float, is_stack: bool,
                origin_xyz: Triple = (0.0, 0.0, 0.0), labels: tuple[str, ...] = ()) -> np.ndarray:
    """A little-endian MRC2014 header (0-d structured array) without statistics; add them with `set_statistics`."""
    nz, ny, nx = shape_ZYX
    header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
    header["nx"], header["ny"], header["nz"], header["mode"] = nx, ny, nz, mode
    # A stack is many images, not one volume: one interval along z, space group 0.
    intervals = (nx, ny, 1 if is_stack else nz)
    header["m"] = intervals
    header["cell"] = [count * pixel_size for count in intervals]
    header["angles"], header["axes"], header["ispg"] = 90.0, (1, 2, 3), 0 if is_stack else 1
    header["nversion"], header["origin"], header["map"] = 20141, origin_xyz, b"MAP "
    header["stamp"] = (0x44, 0x44, 0, 0)
    texts = [text.encode("ascii", "replace")[:80] for text in labels[:10]] or [b"Written by verglas"]
    header["nlabl"] = len(texts)
    header["labels"] = [text.ljust(80) for text in texts] + [b""] * (10 - len(texts))
    return header


def set_statistics(header: np.ndarray, smallest: float, largest: float, mean: float, deviation: float) -> None:
    """Density statistics of the data, deviation from the mean (rms) included."""
    header["dmin"], header["dmax"], header["dmean"], header["rms"] = smallest, largest, mean, deviation
