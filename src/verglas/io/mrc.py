"""MRC maps and image stacks. A stack costs nothing to open: one header is read, images come as they are asked for."""

from __future__ import annotations

import bz2
import gzip
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias, cast

import numpy as np

from verglas.errors import InputError, OutputError
from verglas.io.atomic import atomic_path, check_target
from verglas.io.mrc_header import (
    HEADER_BYTES,
    MODE_OF_DTYPE,
    MODES,
    MrcHeader,
    check_length,
    make_header,
    parse_header,
    read_header,
    set_statistics,
)

Moments: TypeAlias = tuple[float, float, float, float]
"""Smallest, largest, sum and sum of squares of some values."""

LARGEST_COMPRESSED_MAP = 2**34  # bytes once unpacked; a header may ask for more, but no map of the field needs it
MAP_SUFFIXES = (".mrc", ".map")  # as maps are written
LARGEST_FLOAT16 = 65504.0
BYTES_AT_ONCE, WRITERS = 2**24, min(8, os.cpu_count() or 1)  # of a volume: written at a time by a thread, and how many of these
_SET_PIXEL = "Give it with --pixel, or put it right with `verglas map --pixel`."
_OPENERS: dict[str, Callable[..., BinaryIO]] = {".gz": gzip.open, ".bz2": bz2.open}  # type: ignore[dict-item]


@dataclass(frozen=True)
class Map:
    """A density map: data_ZYX float32, pixel_size in Å, origin (x, y, z) of the first voxel in Å, labels of the file."""

    data_ZYX: np.ndarray
    pixel_size: float
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    labels: tuple[str, ...] = ()

    @property
    def box(self) -> int:
        return int(self.data_ZYX.shape[-1])


def read_map(path: Path | str, cubic: bool = True, pixel_size: float | None = None) -> Map:
    """Read a .mrc, .map, .mrc.gz, .map.bz2 ... as float32, axes in the order z, y, x whatever the file's own order.

    cubic: insist on an even cube with one voxel size; pixel_size (Å) replaces what the header says.
    Raises InputError for files that are no maps or truncated, voxel size 0, values that are not finite.
    """
    header, stored = read_raw(path)
    data_ZYX = np.ascontiguousarray(stored.transpose(_to_zyx(header.axes)), dtype=np.float32)
    if not (np.isfinite(data_ZYX.min()) and np.isfinite(data_ZYX.max())):
        bad = int((~np.isfinite(data_ZYX)).sum())
        raise InputError(path, f"{bad} voxels are not finite numbers", "a map without NaN or infinity", "Compute the map again.")
    if cubic:
        _check_cubic(data_ZYX.shape, path)
    size = header.voxel_xyz[0] if pixel_size is None else pixel_size
    if not (size > 0 and math.isfinite(size)):
        raise InputError(path, f"voxel size {size:g}", "a size above 0 Å", _SET_PIXEL)
    if pixel_size is None:
        _check_voxel(header, path)
    return Map(data_ZYX, size, header.origin_xyz, header.labels)


def read_raw(path: Path | str) -> tuple[MrcHeader, np.ndarray]:
    """Header and data as stored (nz, ny, nx in file dtype); memory-mapped unless the file is compressed."""
    opener = _OPENERS.get(Path(path).suffix.lower())
    if opener is None:
        header = read_header(path)
        return header, np.memmap(path, header.dtype, "r", header.offset, header.shape)
    try:
        with opener(path, "rb") as file:
            header = parse_header(_read_up_to(file, HEADER_BYTES), path)
            total = header.offset + header.data_bytes
            if total > LARGEST_COMPRESSED_MAP:
                raise InputError(path, f"its header asks for {total / 2**30:.0f} GiB",
                                 f"at most {LARGEST_COMPRESSED_MAP / 2**30:.0f} GiB in a compressed map", "Unpack it first.")
            body = _read_up_to(file, total - HEADER_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(path, f"cannot be unpacked ({error})", "a whole compressed MRC file", "Copy the file again.") from error
    check_length(header, HEADER_BYTES + len(body), path)
    start = header.offset - HEADER_BYTES
    return header, np.frombuffer(body, header.dtype, math.prod(header.shape), start).reshape(header.shape)


def _read_up_to(file: BinaryIO, count: int) -> bytearray:
    """At most `count` bytes, memory growing only with what the file really holds."""
    read = bytearray()
    while len(read) < count:
        chunk = file.read(min(count - len(read), 2**24))
        if not chunk:
            break
        read += chunk
    return read


def _to_zyx(axes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Transpose that brings stored (sections, rows, columns) into the order (z, y, x)."""
    stored = (axes[2], axes[1], axes[0])
    return stored.index(3), stored.index(2), stored.index(1)


def _check_cubic(shape: tuple[int, ...], path: Path | str) -> None:
    nz, ny, nx = shape
    if not nx == ny == nz:
        raise InputError(path, f"box of {nx} x {ny} x {nz} voxels", "a cube", "Pad or crop it with `verglas map --box`.")
    if nx % 2:
        raise InputError(path, f"odd box of {nx} voxels", "an even box", "Pad it with `verglas map --box`.")


def _check_voxel(header: MrcHeader, path: Path | str) -> None:
    sizes = header.voxel_xyz[: 3 if header.shape[0] > 1 else 2]  # a single image has no size along z
    if max(sizes) > 1.001 * min(sizes):
        raise InputError(path, f"voxels of {' x '.join(f'{v:.4f}' for v in sizes)} Å", "one size along x, y and z", _SET_PIXEL)


def check_map_target(path: Path, overwrite: bool) -> None:
    """Raise InputError or OutputError now if `write_map` should not or could not write `path`: before the work, not after."""
    if path.suffix.lower() not in MAP_SUFFIXES:
        raise InputError(path, f"suffix '{path.suffix}'", "a name that ends in .mrc or .map")
    check_target(path, overwrite)


def write_map(path: Path | str, map: Map, overwrite: bool = False, dtype: str = "float32") -> None:
    """Write a volume (space group 1, statistics, origin, labels); dtype "float32" (mode 2) or "float16" (mode 12)."""
    shape = cast(tuple[int, int, int], map.data_ZYX.shape)
    header = make_header(shape, _mode(dtype), map.pixel_size, False, map.origin, map.labels)
    data = _convert(map.data_ZYX, dtype, path)
    write_planes(path, header, lambda part: (data[part], moments_of(data[part])), overwrite)


def write_planes(
    path: Path | str, header: np.ndarray, planes: Callable[[slice], tuple[np.ndarray, Moments]], overwrite: bool = False
) -> None:  # fmt: skip
    """Write a volume, some planes at a time by several threads.

    header: from `make_header`; planes: a run of z -> [n, Y, X] in the type of the file and its moments, asked for in any thread.
    """
    count, bytes_each = int(header["nz"]), int(header["ny"]) * int(header["nx"]) * np.dtype(MODES[int(header["mode"])]).itemsize
    step = max(1, BYTES_AT_ONCE // bytes_each)
    with atomic_path(Path(path), overwrite) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor(WRITERS) as pool:

        def write(first: int) -> Moments:
            data_ZYX, moments = planes(slice(first, min(first + step, count)))
            left, place = np.ascontiguousarray(data_ZYX).reshape(-1).view(np.uint8).data, HEADER_BYTES + first * bytes_each
            while len(left):
                done = os.pwrite(file.fileno(), left, place)
                left, place = left[done:], place + done
            return moments

        smallest, largest, total, squares = zip(*pool.map(write, range(0, count, step)))
        values = count * int(header["ny"]) * int(header["nx"])
        mean = sum(total) / values
        deviation = math.sqrt(max(sum(squares) / values - mean**2, 0.0))
        set_statistics(header, min(smallest), max(largest), mean, deviation)
        file.write(header.tobytes())


def moments_of(data_ZYX: np.ndarray) -> Moments:
    """Of these planes; one by one, as double precision takes twice the memory."""
    total = squares = 0.0
    for plane_YX in data_ZYX:
        double_P = plane_YX.astype(np.float64).ravel()
        total += float(double_P.sum())
        squares += float(np.vdot(double_P, double_P))
    return float(data_ZYX.min()), float(data_ZYX.max()), total, squares


def _mode(dtype: str) -> int:
    if dtype not in MODE_OF_DTYPE:
        raise ValueError(f"dtype must be one of {sorted(MODE_OF_DTYPE)}, got {dtype!r}")
    return MODE_OF_DTYPE[dtype]


def _convert(values: np.ndarray, dtype: str, path: Path | str) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    if dtype == "float16" and np.isinf(converted).any() and np.isfinite(values).all():
        raise OutputError(_too_large_for_float16(path, float(np.abs(values).max())))
    return converted


def _too_large_for_float16(path: Path | str, value: float) -> str:
    return f"{path}: values up to {value:.4g} do not fit float16 ({LARGEST_FLOAT16:g}). Write float32 instead."


class Stack:
    """Images of one MRC file. Opening reads the header; nothing stays open, so thousands of stacks may be held at once."""

    def __init__(self, path: Path, header: MrcHeader) -> None:
        self.path, self.header = path, header
        self.n: int = header.shape[0]
        self.box_yx: tuple[int, int] = header.shape[1:]
        self.mode: int = header.mode
        self.pixel_size: float = header.voxel_xyz[0]
        """Å as the file says, 0 where it does not say."""

    @classmethod
    def open(cls, path: Path | str) -> Stack:
        """Raises InputError if the file is missing, no MRC file, compressed, or shorter than its header promises."""
        path = Path(path)
        if path.suffix.lower() in _OPENERS:
            raise InputError(path, "a compressed image stack", "an unpacked .mrcs", f"Unpack it first: {_unpacker(path)} {path}")
        return cls(path, read_header(path))

    def __len__(self) -> int:
        return self.n

    def raw(self) -> np.ndarray:
        """All images [N, Y, X] in the dtype of the file, memory-mapped and read-only."""
        return np.memmap(self.path, self.header.dtype, "r", self.header.offset, self.header.shape)

    def read(self, indices: np.ndarray | slice) -> np.ndarray:
        """Images `indices` (0-based; a run of neighbours is one read) as float32 [B, Y, X]; values are not checked."""
        run = indices if isinstance(indices, slice) else self._as_run(np.asarray(indices, dtype=np.int64).reshape(-1))
        if isinstance(run, slice) and run.step in (None, 1):
            return self._read_run(*run.indices(self.n)[:2])
        return self.raw()[run].astype(np.float32)

    def _read_run(self, start: int, stop: int) -> np.ndarray:
        count, pixels = max(stop - start, 0), math.prod(self.box_yx)
        with open(self.path, "rb") as file:
            file.seek(self.header.offset + start * pixels * self.header.dtype.itemsize)
            values = np.fromfile(file, self.header.dtype, count * pixels)
        if len(values) != count * pixels:
            raise InputError(self.path, "became shorter after it was opened", f"{self.n} images", "Do not write to it meanwhile.")
        return values.reshape(count, *self.box_yx).astype(np.float32, copy=False)

    def _as_run(self, indices: np.ndarray) -> np.ndarray | slice:
        if len(indices) == 0:
            return slice(0, 0)
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.n:
            wrong = low + 1 if low < 0 else high + 1
            raise InputError(self.path, f"image {wrong} asked for", f"1 to {self.n}, the images in this stack")
        is_run = high - low + 1 == len(indices) and bool((np.diff(indices) == 1).all())
        return slice(low, high + 1) if is_run else indices


def _unpacker(path: Path) -> str:
    return "gunzip" if path.suffix.lower() == ".gz" else "bunzip2"


class StackWriter:
    """Write a stack of known length image batch by image batch; it takes its name when it is complete.

    with StackWriter(path, n=1000, box_yx=(64, 64), pixel_size=3.54) as stack:
        stack.append(images_BYX)
    """

    def __init__(self, path: Path | str, n: int, box_yx: tuple[int, int], pixel_size: float, dtype: str = "float32",
                 overwrite: bool = False) -> None:
        self.path, self.n, self.box_yx, self.dtype, self.overwrite = Path(path), n, box_yx, dtype, overwrite
        self.header = make_header((n, *box_yx), _mode(dtype), pixel_size, is_stack=True)
        self.written = 0
        self._sum = self._sum_of_squares = 0.0
        self._smallest, self._largest = math.inf, -math.inf

    def __enter__(self) -> StackWriter:
        self._context = self._writing()
        self._context.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._context.__exit__(kind, error, trace)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with atomic_path(self.path, self.overwrite) as temporary:
            self._check_space()
            with open(temporary, "wb") as self._file:
                self._file.write(self.header.tobytes())
                yield
                if self.written != self.n:
                    raise OutputError(f"{self.path} was declared with {self.n} images, but only {self.written} came; "
                                      "it was not written.")
                self._finish_header()

    def _finish_header(self) -> None:
        if self.n == 0:
            return
        count = self.n * math.prod(self.box_yx)
        mean = self._sum / count
        deviation = math.sqrt(max(self._sum_of_squares / count - mean**2, 0.0))
        set_statistics(self.header, self._smallest, self._largest, mean, deviation)
        self._file.seek(0)
        self._file.write(self.header.tobytes())

    def _check_space(self) -> None:
        needed = HEADER_BYTES + self.n * math.prod(self.box_yx) * np.dtype(self.dtype).itemsize
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OutputError(f"{self.path} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there. "
                              "Free some space, write to another disk, or write float16.")

    def append(self, images_BYX: np.ndarray) -> None:
        """Add images [B, Y, X] of any dtype; ValueError if their box or their number does not fit."""
        self._check_fit(images_BYX)
        if len(images_BYX) == 0:
            return
        data = _convert(images_BYX, self.dtype, self.path)
        squares = float(np.square(data, dtype=np.float64).sum())
        self._add(data, (float(data.min()), float(data.max()), float(data.sum(dtype=np.float64)), squares))

    def append_measured(self, images_BYX: np.ndarray, statistics: tuple[float, float, float, float]) -> None:
        """Add images that already have the dtype of the file, as a GPU hands them over.

        statistics: smallest, largest, sum, sum of squares of these images, before they were rounded.
        """
        self._check_fit(images_BYX)
        farthest = max(-statistics[0], statistics[1])
        if self.dtype == "float16" and farthest > LARGEST_FLOAT16:
            raise OutputError(_too_large_for_float16(self.path, farthest))
        self._add(images_BYX, statistics)

    def _add(self, images_BYX: np.ndarray, statistics: tuple[float, float, float, float]) -> None:
        smallest, largest, total, total_of_squares = statistics
        self._file.write(np.ascontiguousarray(images_BYX).data)
        self.written += len(images_BYX)
        self._smallest, self._largest = min(self._smallest, smallest), max(self._largest, largest)
        self._sum += total
        self._sum_of_squares += total_of_squares

    def _check_fit(self, images_BYX: np.ndarray) -> None:
        if images_BYX.ndim != 3 or images_BYX.shape[1:] != tuple(self.box_yx):
            raise ValueError(f"images are {images_BYX.shape}, expected [B, {self.box_yx[0]}, {self.box_yx[1]}]")
        if self.written + len(images_BYX) > self.n:
            raise ValueError(f"{self.path} was declared with {self.n} images, got {self.written + len(images_BYX)}")


__all__ = ["MODES", "Map", "Stack", "StackWriter", "read_map", "read_raw", "write_map"]
