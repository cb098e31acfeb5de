"""Scans as named arrays: .npz (also .bz2, .gz, .xz of one) or the datasets of an HDF5 file, by the names that programs give them.

tike, PtyGer: data [1, B, Y, X] with the direct beam in the corner, scan [1, B, 2] or [2, 1, B] in pixels, of the window's first
pixel, probe [1, 1, 1, modes, Y, X], psi. pty-chi: dp, probe_position_y_m and _x_m, probe, obj_pixel_size_m, wavelength_m.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from verglas.errors import InputError
from verglas.ptychography.raw import RawScan, array_of, as_stack, same_size

if TYPE_CHECKING:
    import h5py

NAMES = {
    "patterns": ("patterns", "data", "dp", "diffraction", "diffraction_patterns", "intensities", "intensity", "cbed"),
    "amplitudes": ("amplitudes", "diffamp", "amplitude"),
    "pixels": ("scan", "positions_px", "positions_pixels", "probe_position_px", "positions"),
    "metres": ("positions_m", "translation", "positions_meters"),
    "rows": ("probe_position_y_m", "positions_y_m", "ycoords", "y"),
    "columns": ("probe_position_x_m", "positions_x_m", "xcoords", "x"),
    "probe": ("probe", "probeguess", "probe_guess", "prb"),
    "object": ("object", "psi", "obj", "objectguess", "object_guess"),
    "mask": ("mask", "good_pixels", "valid_pixels"),
    "background": ("background",),
    "energy": ("energy_ev", "energy"),
    "wavelength": ("wavelength_m", "wavelength", "lambda"),
    "distance": ("distance_m", "distance", "detector_distance", "detector_distance_m"),
    "detector_pixel": ("detector_pixel_m", "detector_pixel_size", "psize", "dx"),
    "object_pixel": ("obj_pixel_size_m", "object_pixel_m", "pixel_size_m"),
}
OPENERS: dict[str, Callable[[Path, str], Any]] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}


def read_npz(path: Path) -> RawScan:
    """A scan from an .npz, compressed once more or not."""
    try:
        if path.suffix in OPENERS:
            with OPENERS[path.suffix](path, "rb") as stream:
                archive = np.load(io.BytesIO(stream.read()))
        else:
            archive = np.load(path)
        found = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, zipfile.BadZipFile, lzma.LZMAError, AttributeError) as error:
        raise InputError(
            path, f"it cannot be read ({error})", "an .npz with named arrays", "Copy it again; it may be cut short."
        ) from error
    except ValueError as error:  # arrays of Python objects
        raise InputError(path, f"an array that is not one of numbers ({error})", "patterns of one size in one array") from error
    return named(found, path, "arrays (.npz)")


def read_plain_hdf5(file: h5py.File) -> RawScan:
    """A scan from the datasets of an HDF5 file, in whatever groups they are."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if hasattr(item, "dtype") and item.dtype.kind in "iufcb":
            found.setdefault(name.rpartition("/")[2], array_of(item))

    file.visititems(visit)
    path = Path(file.filename)
    return named(_joined(found, path), path, "arrays (HDF5)")


def _joined(found: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Images that each have a numbered dataset of their own become one stack."""
    numbered = sorted((name for name in found if name.isdigit() and found[name].ndim in (2, 3)), key=int)
    if not numbered or _pick(found, "patterns") is not None:
        return found
    return found | {"patterns": same_size([found[name] for name in numbered], path)}


def named(found: Mapping[str, np.ndarray], path: Path, kind: str) -> RawScan:
    """The scan that arrays make by their names; InputError says what is missing, and what there is."""
    amplitude, patterns = _pick(found, "amplitudes"), _pick(found, "patterns")
    if patterns is None and amplitude is not None:
        patterns = np.square(amplitude)
    if patterns is None:
        raise InputError(path, f"arrays {_listed(found)}", f"patterns under one of the names {', '.join(NAMES['patterns'])}")
    position_BC, unit = _positions(found, path)
    raw = RawScan(path, kind, as_stack(patterns, path), position_BC, position_unit=unit, direct_beam="")
    raw.probe, raw.object = _pick(found, "probe"), _pick(found, "object")
    mask, background = _pick(found, "mask"), _pick(found, "background")
    raw.mask_YX = None if mask is None else mask.reshape(mask.shape[-2:]) > 0
    raw.background_YX = background
    energy, wavelength = _value(found, "energy"), _value(found, "wavelength")
    if energy is not None:
        raw.energy = energy if energy > 200 else 1e3 * energy  # keV
    elif wavelength is not None:
        raw.energy = 1.2398419843e-6 / wavelength
    raw.distance, raw.detector_pixel = _value(found, "distance"), _value(found, "detector_pixel")
    pixel = _value(found, "object_pixel")
    if pixel and raw.position_unit == "m" and not (raw.distance and raw.detector_pixel and raw.energy):
        raw.position_BC, raw.position_unit = raw.position_BC / pixel, "px"
        raw.notes.append(f"object pixels of {1e9 * pixel:.4g} nm, as the file says")
    return raw


def _positions(found: Mapping[str, np.ndarray], path: Path) -> tuple[np.ndarray, Literal["m", "px"]]:
    rows, columns = _pick(found, "rows"), _pick(found, "columns")
    if rows is not None and columns is not None and rows.size == columns.size:
        return np.stack([np.asarray(rows, float).ravel(), np.asarray(columns, float).ravel()], 1), "m"
    units: dict[str, Literal["m", "px"]] = {"pixels": "px", "metres": "m"}
    for key, unit in units.items():
        array = _pick(found, key)
        if array is None:
            continue
        array = np.asarray(array, float)
        array = array.reshape([edge for edge in array.shape if edge != 1] or [1])
        if array.ndim == 2 and array.shape[1] not in (2, 3) and array.shape[0] in (2, 3):
            array = array.T  # PtyGer has the axes first
        if array.ndim != 2 or array.shape[1] not in (2, 3):
            raise InputError(path, f"positions of shape {list(array.shape)}", "a row and a column for each pattern")
        return array[:, :2], unit
    raise InputError(path, f"arrays {_listed(found)}", f"positions under one of the names {', '.join(NAMES['pixels'])}")


def _pick(found: Mapping[str, np.ndarray], what: str) -> np.ndarray | None:
    lower = {name.lower(): name for name in found}
    return next((found[lower[name]] for name in NAMES[what] if name in lower), None)


def _value(found: Mapping[str, np.ndarray], what: str) -> float | None:
    array = _pick(found, what)
    return None if array is None or not array.size else float(np.asarray(array).ravel()[0])


def _listed(found: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in found.items()) or "none"
