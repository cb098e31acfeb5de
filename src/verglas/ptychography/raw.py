"""A scan as its file has it, before units, axes and the order of the detector are settled (`files.read_scan` does that)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from verglas.errors import InputError

if TYPE_CHECKING:
    import h5py

LENGTHS = {
    "m": 1.0,
    "meter": 1.0,
    "metre": 1.0,
    "cm": 1e-2,
    "mm": 1e-3,
    "um": 1e-6,
    "µm": 1e-6,
    "micron": 1e-6,
    "nm": 1e-9,
    "angstrom": 1e-10,
}
ELECTRON_VOLT = 1.602176634e-19  # J
ENERGIES = {"j": 1 / ELECTRON_VOLT, "ev": 1.0, "kev": 1e3}  # in eV


@dataclass
class RawScan:
    """patterns_BYX: any real type; position_BC: columns as `position_axes` says ("yx", "-x-y", ...), in `position_unit`.

    direct_beam: where the format puts it, "" if it has no rule. mask_YX: True is good. probe, object: complex, their last two
    axes Y X.
    energy eV, distance and detector_pixel m, None where the file does not say. notes: what else a person should know.
    """

    path: Path
    format: str
    patterns_BYX: np.ndarray
    position_BC: np.ndarray
    position_axes: str = "yx"
    position_unit: Literal["m", "px"] = "m"
    near_field: bool = False
    direct_beam: Literal["middle", "corner", ""] = "middle"
    energy: float | None = None
    distance: float | None = None
    detector_pixel: float | None = None
    mask_YX: np.ndarray | None = None
    background_YX: np.ndarray | None = None
    probe: np.ndarray | None = None
    object: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for reading; InputError if it is none, or damaged."""
    import h5py

    if not path.is_file():
        raise InputError(path, "it is a folder" if path.is_dir() else "there is no such file", "a scan in HDF5")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise InputError(
            path,
            f"it cannot be read as HDF5 ({error})",
            "a whole HDF5 file (.cxi, .h5, .nxs, .ptyd)",
            "If it was copied or is still being written, wait for its end and copy it again.",
        ) from error


def array_of(dataset: h5py.Dataset) -> np.ndarray:
    """A dataset as an array: mapped into memory where it lies in one piece in its file, else read."""
    offset = dataset.id.get_offset() if dataset.chunks is None and dataset.external is None and not dataset.is_virtual else None
    if offset is None or dataset.size == 0:
        return np.asarray(dataset[()])
    return np.memmap(dataset.file.filename, dataset.dtype, "c", offset, dataset.shape)


def number(group: h5py.Group, *names: str, units: dict[str, float] | None = None, unit: str = "") -> float | None:
    """The first of these datasets that is there and holds a number, in the base unit of `units`; `unit`: if it says none."""
    for name in names:
        found = group.get(name)
        if found is None or not hasattr(found, "dtype") or found.dtype.kind not in "fiu" or not found.size:
            continue
        value = float(np.asarray(found[()]).ravel()[0])
        if not units:
            return value
        told = text_of(found.attrs.get("units", unit)).strip().lower() or unit
        if told not in units:
            raise InputError(group.file.filename, f"unit '{told}' of {found.name}", f"one of {', '.join(units)}")
        return value * units[told]
    return None


def text_of(value: Any) -> str:
    """Text of an attribute or dataset, whichever way it is stored."""
    if isinstance(value, np.ndarray):
        value = value.ravel()[0] if value.size else ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def as_stack(patterns: np.ndarray, path: Path) -> np.ndarray:
    """Patterns as [B, Y, X]; a raster [rows, columns, Y, X], or an axis of length 1 in front, is flattened."""
    if patterns.ndim < 3 or patterns.dtype.kind not in "iufb":
        found = f"patterns of shape {list(patterns.shape)}, type {patterns.dtype}"
        raise InputError(path, found, "real numbers [positions, rows, columns]")
    return patterns.reshape(-1, *patterns.shape[-2:])


def same_size(stacks: list[np.ndarray], path: Path) -> np.ndarray:
    """Stacks of patterns joined; InputError that names the first one of another size."""
    if len(stacks) == 1:
        return stacks[0]
    first = stacks[0].shape[-2:]
    start = 0
    for one in stacks:
        if one.shape[-2:] != first:
            found = f"patterns from number {start} on have {list(one.shape[-2:])} px, those before {list(first)} px"
            raise InputError(path, found, "patterns of one size", "Crop or bin them alike.")
        start += 1 if one.ndim == 2 else len(one)
    return np.concatenate([one if one.ndim > 2 else one[None] for one in stacks])
